"""Calls with 8-bit and 4-bit floats are left as they are: no pass takes their bytes for int8.

Their neighbours are those that int8 products and quantizations are fused with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_fusion import formats
from npu_fusion.kernels.reference._quant import pack_quant_param
from tests.passes._harness import DIALECTS, Outcome, fuse

npu = torch.ops.npu
ROWS, K, N = 6, 64, 64
BF16, E4M3, HIFLOAT8, E8M0, E2M1 = 15, 24, 290, 293, 296
MX = {"pertoken_scale_dtype": E8M0, "scale_dtype": E8M0, "group_sizes": [1, 1, 32], "output_dtype": BF16}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def codes(*shape: int) -> Tensor:
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape))
    )


X = randn(ROWS, K).bfloat16()
E4M3_X, E4M3_W = (formats.encode(t, "float8_e4m3fn") for t in (randn(ROWS, K), randn(N, K)))
HIF_X, HIF_W = (formats.encode(t, "hifloat8") for t in (randn(ROWS, K), randn(N, K)))
FLOAT4, CARRIED = codes(N, K // 2), codes(K, N // 2).view(torch.float32)
SCALE, TOKEN = torch.rand(N) + 0.5, torch.rand(ROWS) + 0.5
POWERS = torch.full((N, 1, 2), 125, dtype=torch.uint8), torch.full((ROWS, 1, 2), 127, dtype=torch.uint8)


def float8(x: Tensor) -> Tensor:
    return npu.npu_quant_matmul(x, E4M3_W.t(), SCALE, pertoken_scale=TOKEN, output_dtype=BF16)


def float8_static(x: Tensor) -> Tensor:
    return npu.npu_quant_matmul(x, E4M3_W.t(), pack_quant_param(SCALE), bias=SCALE, output_dtype=BF16)


def hifloat8(x: Tensor) -> Tensor:
    numbers = {"x1_dtype": HIFLOAT8, "x2_dtype": HIFLOAT8}
    return npu.npu_quant_matmul(x, HIF_W.t(), SCALE, pertoken_scale=TOKEN, output_dtype=BF16, **numbers)


def microscaled(x: Tensor) -> Tensor:
    return npu.npu_quant_matmul(x, E4M3_W.t(), POWERS[0].transpose(0, 1), pertoken_scale=POWERS[1], **MX)


def microscaled_float4(x: Tensor) -> Tensor:
    scale = POWERS[0].transpose(0, 1)
    return npu.npu_quant_matmul(x, FLOAT4.t(), scale, pertoken_scale=POWERS[1], x2_dtype=E2M1, **MX)


def two_levels(x: Tensor) -> Tensor:
    scale, outer = torch.ones(N, K // 32).bfloat16(), pack_quant_param(SCALE[None])
    call: dict[str, Any] = {"x2_dtype": E2M1, "group_sizes": [0, 0, 32], "output_dtype": BF16}
    return npu.npu_quant_matmul(x, FLOAT4.t(), scale, y_scale=outer, **call)


PRODUCTS: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
    (float8, E4M3_X),
    (float8_static, E4M3_X),
    (hifloat8, HIF_X),
    (microscaled, E4M3_X),
    (microscaled_float4, E4M3_X),
    (two_levels, E4M3_X),
]


def swiglu(y: Tensor) -> tuple[Tensor, Tensor]:
    """What makes an npu_dequant_swiglu_quant of an int8 product."""
    left, right = y.chunk(2, dim=-1)
    return npu.npu_dynamic_quant(F.silu(left) * right)


def requantized(y: Tensor) -> Tensor:
    """What makes the result of an int8 product int8."""
    return npu.npu_quantize(y, torch.full((1,), 8.0).bfloat16(), None, 1, -1, False)


def assert_untouched(outcome: Outcome, *operators: str) -> None:
    before, after = outcome.report.operators_before, outcome.report.operators_after
    for operator in operators:
        assert before[f"npu.{operator}"] == after[f"npu.{operator}"] == 1, operator
        assert operator not in outcome.fused
    assert not {"npu_dequant_swiglu_quant", "npu_add_rms_norm_quant"} & outcome.fused.keys()
    assert not {"npu_add_rms_norm_dynamic_quant"} & outcome.fused.keys()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("product", "x"), PRODUCTS)
@pytest.mark.parametrize("then", [swiglu, requantized])
def test_products(
    product: Callable[[Tensor], Tensor], x: Tensor, then: Callable[[Tensor], Any], dialect: str
) -> None:
    outcome = fuse(lambda x: then(product(x)), [x], dialect=dialect)
    assert_untouched(outcome, "npu_quant_matmul")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("product", "x"), PRODUCTS)
def test_a_product_alone_has_eagers_bits(
    product: Callable[[Tensor], Tensor], x: Tensor, dialect: str
) -> None:
    outcome = fuse(product, [x], dialect=dialect)
    assert outcome.fused == {}
    assert torch.equal(outcome.result, outcome.expected)


def weight_float8(x: Tensor) -> Tensor:
    return npu.npu_weight_quant_batchmatmul(x, E4M3_W.t(), SCALE.bfloat16())


def weight_hifloat8(x: Tensor) -> Tensor:
    return npu.npu_weight_quant_batchmatmul(x, HIF_W.t(), SCALE.bfloat16(), weight_dtype=HIFLOAT8)


def weight_float4(x: Tensor) -> Tensor:
    scale = torch.full((K // 32, N), 120, dtype=torch.uint8)
    return npu.npu_weight_quant_batchmatmul(x, CARRIED, scale, antiquant_group_size=32)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("product", [weight_float8, weight_hifloat8, weight_float4])
@pytest.mark.parametrize("then", [swiglu, requantized])
def test_weight_only_products(
    product: Callable[[Tensor], Tensor], then: Callable[[Tensor], Any], dialect: str
) -> None:
    outcome = fuse(lambda x: then(product(x)), [X], dialect=dialect)
    assert_untouched(outcome, "npu_weight_quant_batchmatmul")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_convolution(dialect: str) -> None:
    x, w = E4M3_X.view(1, ROWS, 8, 8), formats.encode(randn(4, ROWS, 3, 3), "float8_e4m3fn")
    scale = pack_quant_param(torch.ones(4))
    outcome = fuse(lambda x: npu.npu_quant_conv2d(x, w, scale, output_dtype=BF16) * 2, [x], dialect=dialect)
    assert_untouched(outcome, "npu_quant_conv2d")
    assert torch.equal(outcome.result, outcome.expected)


def normalized(a: Tensor, b: Tensor, gamma: Tensor) -> Tensor:
    """What int8 quantization after it makes an npu_add_rms_norm_quant or _dynamic_quant of."""
    x = (a + b).float()
    return gamma * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("number", [E4M3, HIFLOAT8])
def test_a_norm_is_not_quantized_to_int8_for_a_float_product(number: int, dialect: str) -> None:
    def static(a: Tensor, b: Tensor, gamma: Tensor) -> Tensor:
        scale = torch.full((1,), 8.0).bfloat16()
        q = npu.npu_quantize(normalized(a, b, gamma), scale, None, number, -1, False)
        return hifloat8(q) if number == HIFLOAT8 else float8(q)

    def dynamic(a: Tensor, b: Tensor, gamma: Tensor) -> Tensor:
        q, token = npu.npu_dynamic_quant(normalized(a, b, gamma), dst_type=number)
        return (hifloat8(q) if number == HIFLOAT8 else float8(q)) * token[:, None]

    arguments = [X, randn(ROWS, K).bfloat16(), torch.ones(K).bfloat16()]
    outcome = fuse(static, arguments, dialect=dialect)
    assert_untouched(outcome, "npu_quant_matmul", "npu_quantize")
    outcome = fuse(dynamic, arguments, dialect=dialect)
    assert_untouched(outcome, "npu_quant_matmul", "npu_dynamic_quant")
