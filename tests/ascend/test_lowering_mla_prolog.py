from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ascend._lowering import assert_dynamic, assert_near, lower, lower_only
from tests.passes._mla import Prolog, QuantizedProlog, Spelling, inputs

OPERATOR = "npu_mla_prolog_v3_functional"
TENSORS = {"token_x", "weight_dq", "weight_uq_qr", "weight_uk", "weight_dkv_kr", "rmsnorm_gamma_cq"}
TENSORS |= {"rmsnorm_gamma_ckv", "rope_sin", "rope_cos", "kv_cache", "kr_cache", "cache_index"}
PLAIN = Spelling()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "spelling",
    [
        PLAIN,
        PLAIN.but(cache="scatter_nd", rope="interleave_rope", norm="functional"),
        PLAIN.but(cache="static_copy", uk="matmul"),
        PLAIN.but(cache="npu", rope="interleave_rope"),
        PLAIN.but(down="merged", up="matmul", uk="npu"),
        PLAIN.but(tokens=2),
    ],
    ids=lambda s: f"{s.cache}-{s.down}-{s.uk}-{s.tokens}",
)
def test_it_lowers(spelling: Spelling, dynamic: bool) -> None:
    model = Prolog(spelling)
    args = inputs(model)
    eager = [a.clone() for a in args]
    model(*eager)
    got = lower_only("mla_prolog", model, args, dynamic=dynamic)
    assert got.fused == {OPERATOR: 1}, got.reasons("mla_prolog")
    assert got.graph.counts["MlaPrologV3"] == 1
    assert not {"RmsNorm", "MatMul", "BatchMatMul", "InterleaveRope", "KvRmsNormRopeCache", "Rsqrt"} & set(
        got.graph.counts
    )
    fused = got.graph.only("MlaPrologV3")
    assert set(fused.inputs) == TENSORS
    for name in ("rmsnorm_epsilon_cq", "rmsnorm_epsilon_ckv"):
        assert fused.attribute(name, 1e-5) == pytest.approx(1e-6)
    assert fused.attribute("cache_mode", "PA_BSND") == "PA_BSND"
    assert fused.attribute("weight_quant_mode", 0) == 0
    # what is written back are the third and fourth output, and the caches are the inputs 9 and 10
    assert fused.op.input[9] == fused.inputs["kv_cache"] and fused.op.input[10] == fused.inputs["kr_cache"]
    written = {got.graph.source(op.inputs["value"]).op.name for op in got.graph.all("Assign")}
    assert written == {fused.op.name} and got.graph.counts["Assign"] == 2
    assert_near(got, 5e-2)
    for have, want in zip(args[-2:], eager[-2:], strict=True):
        torch.testing.assert_close(have, want, rtol=5e-2, atol=5e-2)
    if dynamic:
        assert_dynamic(got, "MlaPrologV3")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("cache", ["scatter_nd", "paged_copy"])
def test_paged_caches_are_written_in_place(cache: str, dynamic: bool) -> None:
    """torchair removes the copies that make the operator functional, if nothing else reads the caches."""
    model = Prolog(PLAIN.but(cache=cache))

    def fn(*args: Tensor) -> tuple[Tensor, Tensor]:
        query, rotated, *_ = model(*args)
        return query, rotated

    got = lower_only("mla_prolog", fn, inputs(model), dynamic=dynamic)
    assert got.fused == {OPERATOR: 1}
    assert (got.graph.counts["TensorMove"], got.graph.counts["Assign"]) == (2, 2)
    assert (got.optimized.counts["TensorMove"], got.optimized.counts["Assign"]) == (0, 0)
    fused = got.optimized.only("MlaPrologV3")
    for name in ("kv_cache", "kr_cache"):
        assert got.optimized.maker(fused.inputs[name]).op.type == "Data"


QUANTIZED: list[tuple[str, int, Callable[[set[str]], set[str]]]] = [
    ("npu", 2, lambda names: names | {"dequant_scale_x", "dequant_scale_w_dq", "dequant_scale_w_dkv_kr"}),
    ("npu partial smooth", 1, lambda names: names | {"smooth_scales_cq"}),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("how", "mode", "more"), QUANTIZED, ids=lambda v: v if isinstance(v, str) else None)
def test_int8_projections_lower(how: str, mode: int, more: Any, dynamic: bool) -> None:
    model = QuantizedProlog(how)
    got = lower(model, inputs(model), dynamic=dynamic)
    assert got.fused[OPERATOR] == 1, got.reasons("mla_prolog")
    fused = got.graph.only("MlaPrologV3")
    assert fused.attribute("weight_quant_mode", 0) == mode
    assert set(fused.inputs) == more(TENSORS | {"dequant_scale_w_uq_qr"})
    assert got.graph.counts["QuantBatchMatmulV3"] == 0
    assert_near(got, 5e-2)
    if dynamic:
        assert_dynamic(got, "MlaPrologV3")
