from __future__ import annotations

import pytest
import torch

import npu_fusion  # noqa: F401  (registers the operators)
from tests.kernels._numerics import assert_correctly_rounded

dequant_bias = torch.ops.npu.npu_dequant_bias


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias_dtype", [None, torch.int32, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_rows", [False, True])
def test_matches_float64(scale_dtype: torch.dtype, bias_dtype: torch.dtype | None, with_rows: bool) -> None:
    x = torch.randint(-10000, 10000, (9, 17), dtype=torch.int32)
    weight_scale = (torch.rand(17) * 1e-3).to(scale_dtype)
    activation_scale = torch.rand(9) if with_rows else None
    bias = None if bias_dtype is None else (torch.randn(17) * 5).to(bias_dtype)
    output = torch.float16 if scale_dtype == torch.float32 else torch.bfloat16
    y = dequant_bias(x, weight_scale, activation_scale, bias, output_dtype=output)

    exact = x.double() + (bias.double() if bias_dtype == torch.int32 else 0)
    exact = exact * weight_scale.double()
    if with_rows:
        exact = exact * activation_scale.double()[:, None]
    if bias_dtype not in (None, torch.int32):
        exact = exact + bias.double()
    assert y.dtype == output
    # A sum that cancels keeps the absolute error of its terms.
    far = exact.abs() > 1e-2
    assert_correctly_rounded(y[far], exact[far])


def test_integer_bias_is_scaled_and_float_bias_is_not() -> None:
    x, scale, rows = torch.tensor([[3]], dtype=torch.int32), torch.tensor([2.0]), torch.tensor([5.0])
    assert dequant_bias(x, scale, rows, torch.tensor([1], dtype=torch.int32)).item() == 40.0
    assert dequant_bias(x, scale, rows, torch.tensor([1.0])).item() == 31.0


def test_integer_bias_is_added_in_int32() -> None:
    # In fp32, 2**24 + 1 would be lost.
    x, bias = torch.tensor([[2**24]], dtype=torch.int32), torch.tensor([1 - 2**24], dtype=torch.int32)
    assert dequant_bias(x, torch.tensor([1.0]), None, bias).item() == 1.0


def test_default_output_is_float16_and_large_values_overflow_to_inf() -> None:
    x = torch.tensor([[1000, 10**6]], dtype=torch.int32)
    y = dequant_bias(x, torch.ones(2), None, None)
    assert y.dtype == torch.float16
    assert y.tolist() == [[1000.0, float("inf")]]


def test_one_rounding() -> None:
    x = torch.randint(-(2**20), 2**20, (64, 64), dtype=torch.int32)
    scale = (torch.rand(64) * 1e-4).bfloat16()
    bias = torch.randn(64).bfloat16()
    y = dequant_bias(x, scale, None, bias, output_dtype=torch.bfloat16)
    exact = x.double() * scale.double() + bias.double()
    twice = (x.float() * scale.float()).bfloat16() + bias
    assert (y.double() - exact).abs().mean() < (twice.double() - exact).abs().mean()


def test_strided_and_empty_inputs() -> None:
    x = torch.randint(-100, 100, (6, 4), dtype=torch.int32).t()
    before = x.clone()
    y = dequant_bias(x, torch.ones(6), torch.ones(8)[::2], None)
    assert torch.equal(y, x.half())
    assert y.is_contiguous()
    assert torch.equal(x, before)
    assert dequant_bias(x[:0], torch.ones(6), None, None).shape == (0, 6)
