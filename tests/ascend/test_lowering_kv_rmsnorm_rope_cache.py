from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ascend._lowering import assert_dynamic, assert_near, lower_only
from tests.passes._mla import Spelling, inputs
from tests.passes.test_kv_rmsnorm_rope_cache import NAME, OPERATOR, Keys, Read

PLAIN = Spelling()


def writing(model: Keys) -> Callable[..., None]:
    """A layer as it is in a model: nothing but the caches comes out of it here."""

    def fn(*args: Tensor) -> None:
        model(*args)

    return fn


def compiled(spelling: Spelling, dynamic: bool) -> tuple[Any, list[Tensor], list[Tensor]]:
    model = Keys(spelling)
    args = inputs(model)
    eager = [a.clone() for a in args]
    writing(model)(*eager)
    got = lower_only(NAME, writing(model), args, dynamic=dynamic)
    assert got.fused == {OPERATOR: 1}, got.reasons(NAME)
    assert got.graph.counts["KvRmsNormRopeCache"] == 1
    assert not {"RmsNorm", "Rsqrt", "Neg", "IndexPutV2", "ScatterNdUpdate"} & set(got.graph.counts)
    return got, args[-2:], eager[-2:]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("cache", "mode"),
    [("paged_put", "PA"), ("scatter_nd", "PA"), ("static_copy", "Norm"), ("static_slice", "PA")],
)
def test_it_lowers(cache: str, mode: str, dynamic: bool) -> None:
    got, caches, expected = compiled(PLAIN.but(cache=cache), dynamic)
    fused = got.graph.only("KvRmsNormRopeCache")
    assert fused.attribute("cache_mode", "Norm") == mode
    assert fused.attribute("epsilon", 1e-5) == pytest.approx(1e-6)
    assert fused.attribute("is_output_kv", False) is False
    assert set(fused.inputs) == {"kv", "gamma", "cos", "sin", "index", "k_cache", "ckv_cache"}
    for name, width in (("k_cache", 16), ("ckv_cache", 32)):
        cache_in = got.graph.source(fused.inputs[name])
        assert cache_in.op.type == "Data"
        assert cache_in.sizes()[-1] in (width, -1)
    assigned = {got.graph.source(op.inputs["value"]).op.name for op in got.graph.all("Assign")}
    assert assigned == {fused.op.name} and got.graph.counts["Assign"] == 2
    for have, want in zip(caches, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=2e-2, atol=2e-2)
    if dynamic:
        assert_dynamic(got, "KvRmsNormRopeCache")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("cache", ["scatter_nd", "static_copy"])
def test_caches_are_written_in_place(cache: str, dynamic: bool) -> None:
    """torchair removes the copies that make the operator functional."""
    got, *_ = compiled(PLAIN.but(cache=cache), dynamic)
    assert (got.graph.counts["TensorMove"], got.graph.counts["Assign"]) == (2, 2)
    assert (got.optimized.counts["TensorMove"], got.optimized.counts["Assign"]) == (0, 0)
    fused = got.optimized.only("KvRmsNormRopeCache")
    for name in ("k_cache", "ckv_cache"):
        assert got.optimized.maker(fused.inputs[name]).op.type == "Data"


def test_rows_that_are_read_are_returned() -> None:
    model = Read(PLAIN)
    got = lower_only(NAME, model, inputs(model))
    assert got.fused == {OPERATOR: 1}
    fused = got.graph.only("KvRmsNormRopeCache")
    assert fused.attribute("is_output_kv", False) is True
    read = {value for op in got.graph.proto.op for value in op.input if value.startswith(f"{fused.op.name}:")}
    assert read == {f"{fused.op.name}:{i}" for i in range(4)}
    assert_near(got, 4e-2)
