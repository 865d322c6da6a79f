"""npu_add_rms_norm_dynamic_quant: the norm of a residual sum, quantized per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes._harness import DIALECTS, Outcome, fuse
from tests.passes.test_rms_norm import EPS, H, hugging_face, oracle

npu = torch.ops.npu
FUSED = {"npu_add_rms_norm_dynamic_quant": 1}

Quantizer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def data(dtype: torch.dtype, *lead: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*(lead or (4, 16)), H, generator=generator) * 2 for _ in range(2))
    smooth = torch.rand(H, generator=generator) + 0.5
    return a.to(dtype), b.to(dtype), (torch.randn(H, generator=generator) + 1).to(dtype), smooth.to(dtype)


def per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-128, 127).to(torch.int8), scale


def plain(y: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    return per_token(y.float())


def guarded(y: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    wide = y.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return (wide / scale).round().clamp(-128, 127).to(torch.int8), scale


def smoothed(y: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    return per_token((y * smooth).float())


def smoothed_in_float32(y: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    return per_token(y.float() * smooth.float())


def operator(y: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    return npu.npu_dynamic_quant(y)


def operator_smoothed(y: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    return npu.npu_dynamic_quant(y, smooth_scales=smooth)


QUANTIZERS = [plain, guarded, smoothed, smoothed_in_float32, operator, operator_smoothed]
SMOOTHED = (smoothed, smoothed_in_float32, operator_smoothed)


def block(quantize: Quantizer, norm: Callable[[Tensor, Tensor], Tensor] = hugging_face) -> Callable[..., Any]:
    def fn(a: Tensor, b: Tensor, g: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = a + b
        return *quantize(norm(total, g), smooth), total

    return fn


def exact_rows(args: tuple[Tensor, ...], quantize: Quantizer) -> Tensor:
    a, b, g, smooth = args
    rows = oracle(a.double() + b.double(), g)
    return rows * smooth.double() if quantize in SMOOTHED else rows


def check(got: Outcome, rows: Tensor) -> None:
    """Nothing left of the parts, the sum exact, and the dequantized values no further from the exact ones."""
    assert got.fused == FUSED
    after = got.report.operators_after
    assert after["npu.npu_add_rms_norm_dynamic_quant"] == 1
    gone = {
        "aten.rsqrt",
        "aten.mean",
        "aten.round",
        "aten.amax",
        "npu.npu_add_rms_norm",
        "npu.npu_dynamic_quant",
    }
    assert not gone & set(after)
    (q, scale, total), (expected, expected_scale, expected_total) = got.result, got.expected
    assert q.dtype == torch.int8
    assert q.shape == expected.shape
    assert scale.dtype == torch.float32
    assert scale.shape == expected_scale.shape
    assert torch.equal(total, expected_total)
    assert (q.int() - expected.int()).abs().max() <= 2
    torch.testing.assert_close(scale, expected_scale, rtol=1e-2, atol=0)
    fused, eager = (
        (v.double() * s.double().reshape(*v.shape[:-1], 1) - rows.view(v.shape)).square().mean()
        for v, s in ((q, scale), (expected, expected_scale))
    )
    assert fused <= eager * 1.02


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("quantize", QUANTIZERS, ids=lambda f: f.__name__)
def test_quantizer(quantize: Quantizer, dialect: str) -> None:
    args = data(torch.bfloat16)
    got = fuse(block(quantize), args, dialect=dialect, verify=True)
    check(got, exact_rows(args, quantize))
    assert got.report.fusions[0].level == "accurate"
    assert "output_mask = [True, False]" in got.code
    assert ("smooth_scale1" in got.code) == (quantize in SMOOTHED)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("quantize", [plain, operator_smoothed], ids=lambda f: f.__name__)
def test_dynamic_sizes_in_float16(quantize: Quantizer, dialect: str) -> None:
    args = data(torch.float16)
    got = fuse(block(quantize), args, dialect=dialect, dynamic=True)
    check(got, exact_rows(args, quantize))


def called(x: Tensor, g: Tensor) -> Tensor:
    return npu.npu_rms_norm(x, g, EPS)[0]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_operators_called_by_the_model(dialect: str) -> None:
    def fn(a: Tensor, b: Tensor, g: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, _, total = npu.npu_add_rms_norm(a, b, g, EPS)
        return *npu.npu_dynamic_quant(y, smooth_scales=smooth), total

    args = data(torch.bfloat16)
    for model in (fn, block(operator_smoothed, called)):
        check(fuse(model, args, dialect=dialect), exact_rows(args, operator_smoothed))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_projection_quantizes_its_own_input(dialect: str) -> None:
    def fn(a: Tensor, b: Tensor, g: Tensor, smooth: Tensor) -> tuple[Tensor, ...]:
        total = a + b
        y = hugging_face(total, g)
        q, k, v = (plain(y.view(-1, H), smooth) for _ in range(3))
        return *q, *k, *v, total

    args = data(torch.bfloat16)
    got = fuse(fn, args, dialect=dialect, dynamic=True)
    assert got.fused == FUSED
    assert "aten.round" not in got.report.operators_after
    *pairs, total = got.result
    assert [t.shape for t in pairs] == [t.shape for t in got.expected[:-1]]
    assert torch.equal(pairs[0], pairs[2])
    assert torch.equal(pairs[1], pairs[5])
    assert torch.equal(total, got.expected[-1])
    assert (pairs[4].int() - got.expected[4].int()).abs().max() <= 2


def test_rows_of_zeros() -> None:
    a, b, g, smooth = data(torch.bfloat16)
    b[0, 0] = -a[0, 0]
    got = fuse(block(guarded), (a, b, g, smooth))
    assert got.fused == FUSED
    assert not got.result[0][0, 0].any()
    assert got.result[1][0, 0] == 0  # the source's lower bound of the scale is given up
    assert any("lower bound" in note for note in got.report.fusions[0].notes)


def test_the_normalized_value_is_read_elsewhere() -> None:
    def fn(a: Tensor, b: Tensor, g: Tensor, smooth: Tensor) -> tuple[Tensor, ...]:
        y = hugging_face(a + b, g)
        return *operator(y, smooth), y

    got = fuse(fn, data(torch.bfloat16))
    assert got.fused == {"npu_add_rms_norm": 1}
    (reason,) = got.reasons("add_rms_norm_dynamic_quant")
    assert reason.startswith(
        "an intermediate value that the fused operator does not return has a second user"
    )
    assert torch.allclose(got.result[2].float(), got.expected[2].float(), rtol=2**-6)


def test_two_smooth_scales_for_one_value() -> None:
    def fn(a: Tensor, b: Tensor, g: Tensor, smooth: Tensor) -> tuple[Tensor, ...]:
        y = hugging_face(a + b, g)
        return *operator_smoothed(y, smooth), *operator_smoothed(y, smooth * 2)

    got = fuse(fn, data(torch.bfloat16))
    assert got.fused == {"npu_add_rms_norm": 1}
    assert len(got.reasons("add_rms_norm_dynamic_quant")) == 2


def test_float32_is_quantized_separately() -> None:
    got = fuse(block(plain), data(torch.float32))
    assert got.fused == {"npu_add_rms_norm": 1, "npu_dynamic_quant": 1}
    assert got.reasons("add_rms_norm_dynamic_quant") == [
        "the operator takes float16 and bfloat16 of 2 to 8 dimensions: float32, 3 dimensions"
    ]
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_float32_smooth_scales_of_a_16_bit_model() -> None:
    a, b, g, _ = data(torch.bfloat16)
    got = fuse(block(smoothed_in_float32), (a, b, g, data(torch.float32)[3]))
    assert "npu_add_rms_norm_dynamic_quant" not in got.fused
    assert got.fused["npu_add_rms_norm"] == 1
    assert got.reasons("add_rms_norm_dynamic_quant") == [
        "the smooth scales do not have the dtype of the addends: float32, not bfloat16"
    ]
    assert torch.equal(got.result[2], got.expected[2])


def test_per_tensor_scale() -> None:
    def whole(y: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
        wide = y.float()
        scale = wide.abs().amax() / 127
        return (wide / scale).round().clamp(-128, 127).to(torch.int8), scale

    got = fuse(block(whole), data(torch.float32))
    assert got.fused == {"npu_add_rms_norm": 1}
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_without_addition() -> None:
    got = fuse(lambda a, b, g, s: operator(hugging_face(a, g), s), data(torch.bfloat16))
    assert got.fused == {"npu_rms_norm": 1}
    assert got.reasons("add_rms_norm_dynamic_quant") == []


def test_strict_refuses() -> None:
    got = fuse(block(operator), data(torch.bfloat16), numerics="strict")
    assert got.fused == {}
    assert len(got.reasons("add_rms_norm_dynamic_quant")) == 1
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_switched_off() -> None:
    got = fuse(block(plain), data(torch.bfloat16), add_rms_norm_dynamic_quant=False)
    assert got.fused == {"npu_add_rms_norm": 1, "npu_dynamic_quant": 1}
