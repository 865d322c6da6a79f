"""Quantizations to float8, hifloat8 and mx types are something else to the int8 fusions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes._harness import DIALECTS, Outcome, fuse

npu = torch.ops.npu
TOKENS, HIDDEN = 8, 64
E5M2, E4M3, HIFLOAT8, FLOAT4 = 23, 24, 290, 296

QUANTIZERS: dict[str, tuple[str, Callable[[Tensor, Tensor], Any]]] = {
    "float8_e4m3fn, divided": (
        "npu_quantize",
        lambda x, s: (npu.npu_quantize(x, s, None, E4M3, -1, True),),
    ),
    "hifloat8, multiplied": (
        "npu_quantize",
        lambda x, s: (npu.npu_quantize(x, s, None, HIFLOAT8, -1, False),),
    ),
    "float8_e5m2, dynamic": ("npu_dynamic_quant", lambda x, s: npu.npu_dynamic_quant(x, dst_type=E5M2)),
    "float8_e4m3fn, smoothed": (
        "npu_dynamic_quant",
        lambda x, s: npu.npu_dynamic_quant(x, smooth_scales=s.to(x.dtype), dst_type=E4M3),
    ),
    "hifloat8, dynamic": (
        "npu_dynamic_quant",
        lambda x, s: npu.npu_dynamic_quant(x, dst_type=HIFLOAT8, dst_type_max=15.0),
    ),
    "mxfp8": ("npu_dynamic_mx_quant", lambda x, s: npu.npu_dynamic_mx_quant(x, dst_type=E4M3)),
    "mxfp4": ("npu_dynamic_mx_quant", lambda x, s: npu.npu_dynamic_mx_quant(x, dst_type=FLOAT4)),
}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def of_a_norm(x: Tensor, wide: Tensor, acc: Tensor, s: Tensor) -> Tensor:
    return npu.npu_rms_norm(x, s.bfloat16())[0]


def of_a_sum(x: Tensor, wide: Tensor, acc: Tensor, s: Tensor) -> Tensor:
    return npu.npu_add_rms_norm(x, x + 1, s.bfloat16())[0]


def of_swiglu(x: Tensor, wide: Tensor, acc: Tensor, s: Tensor) -> Tensor:
    return npu.npu_swiglu(wide)


def of_a_product(x: Tensor, wide: Tensor, acc: Tensor, s: Tensor) -> Tensor:
    scale = torch.cat([s, s]).bfloat16()
    return npu.npu_swiglu(npu.npu_dequant_bias(acc, scale, None, None, output_dtype=torch.bfloat16))


def of_an_input(x: Tensor, wide: Tensor, acc: Tensor, s: Tensor) -> Tensor:
    return x


SOURCES = [of_a_norm, of_a_sum, of_swiglu, of_a_product, of_an_input]


def inputs() -> tuple[Tensor, ...]:
    wide = random(TOKENS, 2 * HIDDEN)
    s = random(HIDDEN).abs() + 0.5
    return random(TOKENS, HIDDEN).bfloat16(), wide.bfloat16(), (wide * 100).to(torch.int32), s


def check(quantizer: str, source: Callable[..., Tensor], dialect: str, dynamic: bool) -> Outcome:
    operator, quantize = QUANTIZERS[quantizer]
    outcome = fuse(
        lambda *args: quantize(source(*args), args[-1]), inputs(), dialect=dialect, dynamic=dynamic
    )
    assert outcome.fused == {}
    assert outcome.report.operators_after == outcome.report.operators_before
    assert outcome.report.operators_after[f"npu.{operator}"] == 1
    for result, expected in zip(outcome.result, outcome.expected, strict=True):
        assert result.dtype == expected.dtype
        assert torch.equal(result.view(torch.uint8), expected.view(torch.uint8))
    return outcome


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_no_int8_fusion_takes_it(quantizer: str, source: Callable[..., Tensor]) -> None:
    check(quantizer, source, "aot", False)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("quantizer", "said"),
    [("hifloat8, multiplied", "dtype=290"), ("float8_e4m3fn, smoothed", "dst_type=24")],
)
def test_the_reason_names_the_type(quantizer: str, said: str, dialect: str, dynamic: bool) -> None:
    outcome = check(quantizer, of_a_product, dialect, dynamic)
    assert outcome.reasons("dequant_swiglu_quant") == [f"the quantized type is not int8: {said}"]


def test_the_same_graphs_fuse_with_int8() -> None:
    """Nothing but the type keeps them apart."""

    def both(*args: Tensor) -> tuple[Tensor, ...]:
        static = npu.npu_quantize(of_swiglu(*args), args[-1], None, 1, -1, False)
        return static, *npu.npu_dynamic_quant(of_a_product(*args))

    assert fuse(both, inputs()).fused == {"npu_swiglu_quant": 1, "npu_dequant_swiglu_quant": 1}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_chain_that_ends_in_float8_is_left_alone(dtype: torch.dtype, dialect: str) -> None:
    largest = torch.finfo(dtype).max

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.float().abs().amax(-1, keepdim=True) / largest
        y = (x.float() / scale).clamp(-largest, largest).to(dtype)
        return y, y.float() * scale

    outcome = fuse(fn, (random(TOKENS, HIDDEN).bfloat16(),), dialect=dialect)
    assert outcome.fused == {}
    for result, expected in zip(outcome.result, outcome.expected, strict=True):
        assert torch.equal(result.view(torch.uint8), expected.view(torch.uint8))
