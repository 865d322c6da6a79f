"""The prolog of multi-head latent attention with int8 projections, whose layers flatten what they read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes._mla import Dims, QuantizedProlog, inputs
from tests.passes._mla_judge import V3, judged, oracle, refused

FORMS = [("aot", False), ("aot", True), ("inductor", False), ("inductor", True)]
CACHES = ("paged_copy", "static_copy", "static_put", "static_slice")


def judge(model: QuantizedProlog, dialect: str, dynamic: bool, most: float = 1.05) -> str:
    """It is fused, alone, with eager's numbers up to roundings; the code of the graph."""
    args = inputs(model)
    first = [a.clone() for a in args]
    outcome = judged(model, args, dialect=dialect, dynamic=dynamic)
    assert outcome.fused == {V3: 1}, outcome.report.refused
    left = outcome.report.operators_after
    assert left[f"npu.{V3}"] == 1
    products = {"aten.mm", "aten.bmm", "aten._int_mm", "npu.npu_quant_matmul"}
    assert not products & set(left)
    exact = oracle(model, *first)  # with weights that are not quantized
    for have, want, right in zip(outcome.result, outcome.expected, exact, strict=True):
        assert (have.dtype, have.shape) == (want.dtype, want.shape)
        assert (have.double() - want.double()).norm() <= 0.02 * want.double().norm()
        error, theirs = ((y.double() - right).abs().mean() for y in (have, want))
        assert error <= most * theirs, (float(error), float(theirs))
    for old, new, result, want in zip(
        first[4:], args[4:], outcome.result[2:], outcome.expected[2:], strict=True
    ):
        assert torch.equal(new, result)
        untouched = (want == old).all(-1)
        assert untouched.any() and not untouched.all()
        assert torch.equal(new[untouched], old[untouched])
    return outcome.code


@pytest.mark.by_turns("dialect", "dynamic")
@pytest.mark.parametrize(("dialect", "dynamic"), FORMS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    ("how", "mode"),
    [
        ("npu", 2),
        ("npu smooth", 2),
        ("npu partial", 1),
        ("npu partial smooth", 1),
        ("plain", 2),
        ("plain smooth", 2),
        ("plain partial smooth", 1),
    ],
)
def test_it_is_fused(how: str, mode: int, cache: str, dialect: str, dynamic: bool) -> None:
    code = judge(QuantizedProlog(how, Dims(S=11), cache=cache), dialect, dynamic)
    assert f"weight_quant_mode = {mode}" in code
    assert ("smooth_scales_cq" in code) == ("smooth" in how)


@pytest.mark.parametrize("sizes", [{"B": 1}, {"S": 1}, {"B": 1, "S": 1}], ids=str)
@pytest.mark.parametrize("cache", ["paged_copy", "static_copy"])
def test_sizes_of_one(cache: str, sizes: dict[str, int]) -> None:
    model = QuantizedProlog("npu", Dims(**sizes), cache=cache)
    judge(model, "aot", False, most=1.25)  # of a few rows, whose roundings do not cancel out


class _OtherBatches(QuantizedProlog):
    """Keys of the tokens in another order than the queries."""

    def batches(self, kv: Tensor, B: int, S: int) -> Tensor:
        return kv.view(S, B, -1).transpose(0, 1)


@pytest.mark.parametrize("how", ["npu", "plain partial"])
@pytest.mark.parametrize("cache", CACHES)
def test_batches_of_other_tokens(cache: str, how: str) -> None:
    model = _OtherBatches(how, cache=cache)
    refused(model, inputs(model), "the new rows are not one per token")
