"""Quantization by a given scale becomes npu_quantize; other ranges, orders and axes stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes import _w8a8
from tests.passes._harness import DIALECTS, Outcome, fuse, fuse_only
from tests.passes.test_dequant_swiglu_quant_refusals import QUANTIZATIONS

NAME = "quantize"
OPERATOR = "npu_quantize"
CASTS = ("aten._to_copy", "prims.convert_element_type")


def alone(fn: Callable[..., Any], args: list[Tensor], **options: Any) -> Outcome:
    return fuse_only(NAME, fn, args, **options)


def inputs(dtype: torch.dtype = torch.float32, *lead: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*(lead or (6,)), 32, generator=g).to(dtype)
    return [x, (torch.rand(32, generator=g) + 0.5) / 32]


def spelled(static: str, rounded: str = "round, clamp") -> Callable[[Tensor, Tensor], Any]:
    def quantize(x: Tensor, scale: Tensor) -> Any:
        return _w8a8.ROUNDED[rounded](_w8a8.STATIC[static](x, scale)).to(torch.int8)

    return quantize


@pytest.mark.by_turns("dialect", "dynamic")
@pytest.mark.parametrize("dialect,dynamic", [("aot", False), ("aot", True), ("inductor", True)])
@pytest.mark.parametrize("lead", [(6,), (2, 3)])
@pytest.mark.parametrize("static", [s for s in _w8a8.STATIC if s != "x * vector"])
def test_float32_is_exact(static: str, lead: tuple[int, ...], dialect: str, dynamic: bool) -> None:
    outcome = alone(
        spelled(static), inputs(torch.float32, *lead), numerics="strict", dialect=dialect, dynamic=dynamic
    )
    assert outcome.fused == {OPERATOR: 1}, outcome.report.refused
    assert outcome.report.operators_after["npu.npu_quantize"] == 1
    assert not {"aten.clamp", "aten.clamp_min"} & set(outcome.report.operators_after)
    assert torch.equal(outcome.result, outcome.expected)
    assert outcome.expected.unique().numel() > 20


@pytest.mark.parametrize("dialect", DIALECTS)
def test_reciprocal_of_the_scale(dialect: str) -> None:
    args = inputs()
    outcome = alone(spelled("x * vector"), args, dialect=dialect)
    assert outcome.fused == {OPERATOR: 1}
    assert "aten.reciprocal" not in outcome.report.operators_after
    assert (outcome.result.int() - outcome.expected.int()).abs().max() <= 1
    assert (outcome.result != outcome.expected).float().mean() < 0.02
    (reason,) = alone(spelled("x * vector"), args, numerics="strict").reasons(NAME)
    assert reason.endswith("x * (1 / scale) is computed as x / scale (needs 'accurate')")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_factor_per_channel(dialect: str) -> None:
    args = inputs()
    args[1] = 1 / args[1]
    outcome = alone(
        lambda x, f: (x * f).round().clamp(-128, 127).to(torch.int8), args, numerics="strict", dialect=dialect
    )
    assert outcome.fused == {OPERATOR: 1}
    assert torch.equal(outcome.result, outcome.expected)


@pytest.mark.parametrize(
    "rounded", [r for r in _w8a8.ROUNDED if r not in ("round, symmetric clamp", "no clamp")]
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_rounding_and_clamp(rounded: str, dialect: str) -> None:
    args = inputs()
    args[0] = args[0] * 4  # some saturate
    outcome = alone(spelled("x / vector", rounded), args, numerics="strict", dialect=dialect)
    assert outcome.fused == {OPERATOR: 1}
    assert torch.equal(outcome.result, outcome.expected)
    assert outcome.expected.min() == -128 and outcome.expected.max() == 127


@pytest.mark.parametrize("static", _w8a8.STATIC)
def test_bfloat16(static: str) -> None:
    x, scale = inputs(torch.bfloat16)
    args = [x, scale.bfloat16()]
    outcome = alone(spelled(static), args)
    assert outcome.fused == {OPERATOR: 1}, outcome.report.refused
    exact = _w8a8.STATIC[static](x.double(), args[1].double()).clamp(-128, 127)
    fused, eager = ((r.double() - exact).abs().mean() for r in (outcome.result, outcome.expected))
    assert fused <= eager * 1.001 + 1e-6
    refused = alone(spelled(static), args, numerics="strict")
    assert refused.fused == {} and torch.equal(refused.result, refused.expected)
    (reason,) = refused.reasons(NAME)
    assert reason.startswith("numerics='strict' does not allow the difference: ")


@pytest.mark.parametrize("dialect,dynamic", [("aot", False), ("aot", True), ("inductor", True)])
@pytest.mark.parametrize("offset", [None, torch.bfloat16, torch.int32])
def test_16_bit_parameters_are_passed_as_they_are_stored(
    offset: torch.dtype | None, dialect: str, dynamic: bool
) -> None:
    """The operator widens them itself; a cast in the graph would be made at every step."""

    def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        v = x.float() / scale
        if offset is not None:
            v = v + zero_point
        return v.round().clamp(-128, 127).to(torch.int8)

    x, scale = inputs(torch.bfloat16)
    zero_point = (scale * 200).round().to(offset or torch.int32)
    args = [x, scale.bfloat16(), zero_point]
    outcome = alone(quantize, args, dialect=dialect, dynamic=dynamic)
    assert outcome.fused == {OPERATOR: 1}
    assert torch.equal(outcome.result, outcome.expected)
    # A zero point of another dtype than the scale: both in float32.
    casts = sum(outcome.report.operators_after.get(op, 0) for op in CASTS)
    assert casts == (2 if offset == torch.int32 else 0)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_parameters_of_another_dtype_than_the_values_are_widened(dtype: torch.dtype, dialect: str) -> None:
    x, scale = inputs(dtype)

    def quantize(x: Tensor, scale: Tensor) -> Tensor:
        return (x.float() / scale).round().clamp(-128, 127).to(torch.int8)

    outcome = alone(quantize, [x, scale.bfloat16()], dialect=dialect)
    assert outcome.fused == {OPERATOR: 1}
    assert sum(outcome.report.operators_after.get(op, 0) for op in CASTS) == 1
    assert torch.equal(outcome.result, outcome.expected)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", [c for c in QUANTIZATIONS if not c.startswith("fake")])
def test_other_quantizations(case: str, dialect: str) -> None:
    quantize, _ = QUANTIZATIONS[case]
    outcome = alone(quantize, inputs(torch.float32, 32)[:1], dialect=dialect)
    assert outcome.fused == {}
    assert all(map(torch.equal, outcome.result, outcome.expected))


@pytest.mark.parametrize("shape", [(32, 1), (32, 32)])
def test_scale_of_another_axis(shape: tuple[int, ...]) -> None:
    scale = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) + 0.5
    outcome = alone(spelled("x / vector"), [inputs(torch.float32, 32)[0], scale])
    assert outcome.fused == {}
    assert outcome.reasons(NAME) == [f"the scale is not along the last dimension: {list(shape)}"]
    assert torch.equal(outcome.result, outcome.expected)


def test_zero_point_of_another_axis() -> None:
    x, scale = inputs(torch.float32, 32)
    zero = torch.arange(32.0).view(32, 1)
    outcome = alone(lambda x, s, z: (x / s + z).round().clamp(-128, 127).to(torch.int8), [x, scale, zero])
    assert outcome.fused == {}
    assert outcome.reasons(NAME) == ["the zero point is not along the last dimension: [32, 1]"]
    assert torch.equal(outcome.result, outcome.expected)


def test_float64_stays() -> None:
    x, scale = inputs(torch.float64)
    outcome = alone(spelled("x / vector"), [x, scale.double()])
    assert outcome.fused == {}
    assert torch.equal(outcome.result, outcome.expected)


def test_flag() -> None:
    assert fuse(spelled("x / vector"), inputs(), quantize=False).fused == {}
