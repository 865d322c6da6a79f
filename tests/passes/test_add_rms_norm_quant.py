"""npu_add_rms_norm_quant: the norm of a residual sum, quantized with a given scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes._harness import DIALECTS, Outcome, fuse
from tests.passes.test_rms_norm import EPS, H, hugging_face, oracle

npu = torch.ops.npu
FUSED = {"npu_add_rms_norm_quant": 1}

Quantizer = Callable[[Tensor, Tensor], Tensor]


def data(dtype: torch.dtype, *lead: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*(lead or (2, 5)), H, generator=generator) * 2 for _ in range(2))
    scale = torch.rand(H, generator=generator) * 0.02 + 0.02
    return a.to(dtype), b.to(dtype), (torch.randn(H, generator=generator) + 1).to(dtype), scale


def int8(x: Tensor) -> Tensor:
    return x.round().clamp(-128, 127).to(torch.int8)


def divided(y: Tensor, s: Tensor) -> Tensor:
    return int8(y.float() / s)


def multiplied(y: Tensor, s: Tensor) -> Tensor:
    return int8(y.float() * s)


def with_zero_point(y: Tensor, s: Tensor) -> Tensor:
    return int8(y.float() / s + 3)


def with_zero_points(y: Tensor, s: Tensor) -> Tensor:
    return int8(y.float() * s + (s / 5).floor())


def one_number(y: Tensor, s: Tensor) -> Tensor:
    return int8(y.float() / 0.05)


def one_element(y: Tensor, s: Tensor) -> Tensor:
    return int8(y.float() / s[:1])


def operator_dividing(y: Tensor, s: Tensor) -> Tensor:
    return npu.npu_quantize(y, s, None, torch.int8, -1, True)


def operator_multiplying(y: Tensor, s: Tensor) -> Tensor:
    return npu.npu_quantize(y, s, torch.zeros_like(s) + 5, torch.int8, -1, False)


QUANTIZERS = [divided, multiplied, with_zero_point, with_zero_points, one_number, one_element]
QUANTIZERS += [operator_dividing, operator_multiplying]
MULTIPLYING = (multiplied, with_zero_points, operator_multiplying)


def block(quantize: Quantizer, norm: Callable[[Tensor, Tensor], Tensor] = hugging_face) -> Callable[..., Any]:
    def fn(a: Tensor, b: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        total = a + b
        return quantize(norm(total, g), s), total

    return fn


def functional(x: Tensor, g: Tensor) -> Tensor:
    return F.rms_norm(x, (H,), g, EPS)


def scaled_up(quantize: Quantizer, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Scales that use the range: multiplied instead of divided by, they have to be large."""
    return (*args[:3], 1 / args[3]) if quantize in MULTIPLYING else args


def check(got: Outcome, exact: Tensor | None = None) -> None:
    assert got.fused == FUSED
    after = got.report.operators_after
    assert after["npu.npu_add_rms_norm_quant"] == 1
    gone = {"aten.rsqrt", "aten.mean", "aten.round", "aten.clamp", "npu.npu_add_rms_norm", "npu.npu_quantize"}
    assert not gone & set(after)
    (q, total), (expected, expected_total) = got.result, got.expected
    assert q.dtype == torch.int8
    assert torch.equal(total, expected_total)
    if exact is not None:
        fused, eager = ((t.double() - exact).abs().mean() for t in (q, expected))
        assert fused <= eager * 1.02
        assert (q.int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("quantize", QUANTIZERS, ids=lambda f: f.__name__)
def test_float32_is_strict(quantize: Quantizer, dialect: str) -> None:
    args = scaled_up(quantize, data(torch.float32))
    got = fuse(block(quantize, functional), args, dialect=dialect, numerics="strict", verify=True)
    check(got)
    assert torch.equal(got.result[0], got.expected[0])
    assert got.result[0].float().std() > 10
    assert ("div_mode = False" in got.code) == (quantize in MULTIPLYING)  # True is the default
    assert "scales2" not in got.code


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype, dialect: str, dynamic: bool) -> None:
    args = data(dtype, 4, 16)
    got = fuse(block(divided), args, dialect=dialect, dynamic=dynamic)
    a, b, g, s = args
    exact = (oracle(a.double() + b.double(), g) / s.double()).clamp(-128, 127)
    check(got, exact)
    assert got.report.fusions[0].level == "accurate"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_scale_rounded_to_16_bits_is_used_as_rounded(dialect: str) -> None:
    """A float32 scale that the source rounds to bfloat16 first is another scale."""

    def quantize(y: Tensor, s: Tensor) -> Tensor:
        return int8(y / s.to(y.dtype))

    args = data(torch.bfloat16, 4, 16)
    got = fuse(block(quantize), args, dialect=dialect)
    a, b, g, s = args
    exact = (oracle(a.double() + b.double(), g) / s.bfloat16().double()).clamp(-128, 127)
    check(got, exact)
    q = got.result[0]
    assert (q.double() - exact).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("dialect", DIALECTS)
def test_operators_called_by_the_model(dialect: str) -> None:
    def fn(a: Tensor, b: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        y, _, total = npu.npu_add_rms_norm(a, b, g, EPS)
        return npu.npu_quantize(y, s, None, torch.int8, -1, True), total

    args = data(torch.bfloat16, 4, 16)
    got = fuse(fn, args, dialect=dialect, dynamic=True)
    a, b, g, s = args
    check(got, (oracle(a.double() + b.double(), g) / s.double()).clamp(-128, 127))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_projection_quantizes_its_own_input(dialect: str) -> None:
    def fn(a: Tensor, b: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        total = a + b
        y = hugging_face(total, g)
        return *(divided(y.view(-1, H), s).view(y.shape) for _ in range(3)), total

    got = fuse(fn, data(torch.bfloat16), dialect=dialect)
    assert got.fused == FUSED
    q, k, v, total = got.result
    assert torch.equal(q, k)
    assert torch.equal(q, v)
    assert torch.equal(total, got.expected[-1])
    assert (q.int() - got.expected[0].int()).abs().max() <= 1
    assert "aten.round" not in got.report.operators_after


@pytest.mark.parametrize("dialect,dynamic", [("aot", False), ("aot", True), ("inductor", True)])
def test_parameters_in_the_dtype_of_the_addends_are_passed_as_they_are_stored(
    dialect: str, dynamic: bool
) -> None:
    """With a target and without one: a cast in the graph would be made at every step."""
    a, b, g, s = data(torch.bfloat16)
    zero_point = (s * 300).round()

    def fn(a: Tensor, b: Tensor, g: Tensor, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        total = a + b
        return int8(functional(total, g).float() / s + z), total

    for target in (None, "ascend910b"):
        args = (a, b, g, s.bfloat16(), zero_point.bfloat16())
        got = fuse(fn, args, dialect=dialect, dynamic=dynamic, target=target)
        check(got)
        assert not {"aten._to_copy", "prims.convert_element_type"} & set(got.report.operators_after)
        assert (got.result[0].int() - got.expected[0].int()).abs().max() <= 2


def test_unused_sum() -> None:
    got = fuse(lambda a, b, g, s: divided(functional(a + b, g), s), data(torch.float32))
    assert got.fused == FUSED
    assert torch.equal(got.result, got.expected)


def test_the_normalized_value_is_read_elsewhere() -> None:
    def fn(a: Tensor, b: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        y = functional(a + b, g)
        return divided(y, s), y

    got = fuse(fn, data(torch.float32))
    assert got.fused == {"npu_add_rms_norm": 1, "npu_quantize": 1}
    (reason,) = got.reasons("add_rms_norm_quant")
    assert reason.startswith(
        "an intermediate value that the fused operator does not return has a second user"
    )
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_two_scales_for_one_value() -> None:
    def fn(a: Tensor, b: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        y = functional(a + b, g)
        return divided(y, s), divided(y, s * 2)

    got = fuse(fn, data(torch.float32))
    assert got.fused == {"npu_add_rms_norm": 1, "npu_quantize": 2}
    assert len(got.reasons("add_rms_norm_quant")) == 2
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_scale_per_row() -> None:
    a, b, g, _ = data(torch.float32)
    rows = torch.rand(2, 5, 1, generator=torch.Generator().manual_seed(1)) + 0.01
    got = fuse(block(divided, functional), (a, b, g, rows))
    assert got.fused == {"npu_add_rms_norm": 1}
    assert got.reasons("add_rms_norm_quant") == ["the scale is not along the last dimension: [2, 5, 1]"]
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_without_addition() -> None:
    got = fuse(lambda a, b, g, s: divided(functional(a, g), s), data(torch.float32))
    assert got.fused == {"npu_rms_norm": 1, "npu_quantize": 1}
    assert got.reasons("add_rms_norm_quant") == []
    assert torch.equal(got.result, got.expected)


@pytest.mark.parametrize(
    ("dtype", "scale", "zero_point", "fuses"),
    [
        (torch.float16, torch.float32, torch.int32, True),
        (torch.float16, torch.float16, None, True),  # widened exactly
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, None, False),
        (torch.float16, torch.float32, torch.float32, False),
        (torch.float32, torch.float32, None, False),
    ],
)
def test_dtypes_on_a_target(
    dtype: torch.dtype, scale: torch.dtype, zero_point: torch.dtype | None, fuses: bool
) -> None:
    def fn(a: Tensor, b: Tensor, g: Tensor, s: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        total = a + b
        y = functional(total, g).float() / s.float()
        return int8(y if z is None else y + z.float()), total

    a, b, g, s = data(dtype)
    zero_points = None if zero_point is None else torch.arange(H).to(zero_point)
    got = fuse(fn, (a, b, g, s.to(scale), zero_points), target="ascend910b")
    assert got.fused.get("npu_add_rms_norm_quant", 0) == fuses
    assert bool(got.reasons("add_rms_norm_quant")) != fuses
    assert torch.equal(got.result[1], got.expected[1])
    assert (got.result[0].int() - got.expected[0].int()).abs().max() <= 1


@pytest.mark.parametrize(("number", "fuses"), [(0.0625, True), (0.05, False)])
def test_a_number_on_a_target_has_to_fit_bfloat16(number: float, fuses: bool) -> None:
    got = fuse(block(lambda y, s: int8(y.float() / number)), data(torch.bfloat16), target="ascend910b")
    assert got.fused.get("npu_add_rms_norm_quant", 0) == fuses
    expected = [] if fuses else [f"the scale and zero point do not have the dtypes that go with the addends: "
                                 f"{number} instead of bfloat16"]  # fmt: skip
    assert got.reasons("add_rms_norm_quant") == expected
    assert (got.result[0].int() - got.expected[0].int()).abs().max() <= 1


def test_switched_off() -> None:
    got = fuse(block(divided, functional), data(torch.float32), add_rms_norm_quant=False)
    assert got.fused == {"npu_add_rms_norm": 1, "npu_quantize": 1}
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)
