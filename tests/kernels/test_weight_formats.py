"""npu_weight_quant_batchmatmul of weights in 8-bit and 4-bit floats, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion import formats
from npu_fusion.kernels.reference._quant import pack_int4
from tests.kernels._numerics import assert_correctly_rounded

matmul = torch.ops.npu.npu_weight_quant_batchmatmul
DTYPES = [torch.float16, torch.bfloat16]
HIFLOAT8, E2M1, E1M2 = 290, 296, 297
M, K, N = 5, 96, 16
POSITIVE = {E2M1: [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], E1M2: [i / 4 for i in range(8)]}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def numbers_of(codes: Tensor, number: int) -> Tensor:
    table = torch.tensor([*POSITIVE[number], *(-x for x in POSITIVE[number])], dtype=torch.float64)
    return table[codes.long()]


def exact(x: Tensor, numbers: Tensor, scale: Tensor, group_size: int = 0) -> Tensor:
    """float64, the dequantized weight rounded to the dtype of x; groups by a plain loop."""
    dequantized = torch.empty(numbers.shape, dtype=torch.float64)
    for k in range(numbers.size(0)):
        factor = scale[k // group_size] if group_size else scale.reshape(-1)
        dequantized[k] = numbers[k] * factor.double()
    return x.double() @ dequantized.to(x.dtype).double()


def assert_close(y: Tensor, expected: Tensor) -> None:
    far = expected.abs() > 1e-2 * expected.abs().max()
    assert_correctly_rounded(y[far], expected[far])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("element", ["float8_e4m3fn", "hifloat8"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_8_bit_floats(dtype: torch.dtype, element: str, transposed: bool, with_bias: bool) -> None:
    x, weight = torch.randn(M, K).to(dtype), formats.encode(torch.randn(K, N), element)
    scale = (torch.rand(N) * 0.1 + 0.01).to(dtype)
    bias = torch.randn(N).to(dtype) if with_bias else None
    number = HIFLOAT8 if element == "hifloat8" else None
    expected = exact(x, formats.decode(weight, element).double(), scale)
    if transposed:
        weight = weight.t().contiguous().t()
    y = matmul(x, weight, scale, bias=bias, weight_dtype=number)
    assert y.dtype == dtype
    assert_close(y, expected if bias is None else expected + bias.double())
    assert torch.equal(y, matmul(x, weight, scale[None], bias=bias, weight_dtype=number))


def carried(codes: Tensor, number: int, carrier: torch.dtype, transposed: bool) -> tuple[Tensor, int | None]:
    """``codes`` [K, N] as the weight, and its weight_dtype: nibbles lowest first, written out one by one."""
    lines = codes.t().contiguous() if transposed else codes
    if carrier == torch.float32:
        signed = (lines.to(torch.int16) ^ 8) - 8  # the same nibbles as int4
        packed, given = pack_int4(signed.to(torch.int8)).view(torch.float32), None
    else:
        packed, given = lines[:, 0::2] | lines[:, 1::2] << 4, number
    return (packed.t() if transposed else packed), given


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("number", "carrier"), [(E2M1, torch.uint8), (E2M1, torch.float32), (E1M2, torch.uint8)]
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("inner", "group_size"), [(96, 32), (96, 64), (72, 32)])
def test_4_bit_floats(
    dtype: torch.dtype, number: int, carrier: torch.dtype, transposed: bool, inner: int, group_size: int
) -> None:
    x, codes = torch.randn(M, inner).to(dtype), torch.randint(0, 16, (inner, N), dtype=torch.uint8)
    groups = (inner + group_size - 1) // group_size
    scale, bias = (torch.rand(groups, N) * 0.1 + 0.01).to(dtype), torch.randn(1, N).to(dtype)
    weight, given = carried(codes, number, carrier, transposed)
    given_scale = scale.t().contiguous().t() if transposed else scale
    y = matmul(x, weight, given_scale, bias=bias, antiquant_group_size=group_size, weight_dtype=given)
    expected = exact(x, numbers_of(codes, number), scale, group_size) + bias.double()
    assert_close(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("carrier", [torch.uint8, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_powers_of_two(dtype: torch.dtype, carrier: torch.dtype, transposed: bool) -> None:
    x, codes = torch.randn(M, K).to(dtype), torch.randint(0, 16, (K, N), dtype=torch.uint8)
    exponents = torch.randint(-8, 4, (3, N))
    scale = (exponents + 127).to(torch.uint8)
    weight, given = carried(codes, E2M1, carrier, transposed)
    if transposed:
        scale = scale.t().contiguous().t()
    call: dict[str, Any] = {"antiquant_group_size": 32, "weight_dtype": given}
    y = matmul(x, weight, scale, **call)
    assert_close(y, exact(x, numbers_of(codes, E2M1), 2.0 ** exponents.double(), 32))
    if hasattr(torch, "float8_e8m0fnu"):
        assert torch.equal(matmul(x, weight, scale.view(torch.float8_e8m0fnu), **call), y)


def test_powers_of_two_are_converted_to_the_dtype_of_x() -> None:
    """2^-25 is zero in float16, although 6 times it is not; bfloat16 has all of them, as NaN."""
    codes = torch.full((64, 2), 7, dtype=torch.uint8)
    weight = (codes | codes << 4)[:, :1].contiguous()
    x = torch.zeros(1, 64)
    x[0, 0] = 1024

    def with_power(biased: int, dtype: torch.dtype) -> Tensor:
        scale = torch.full((2, 2), biased, dtype=torch.uint8)
        y: Tensor = matmul(x.to(dtype), weight, scale, antiquant_group_size=32, weight_dtype=E2M1)
        return y.double()[0, 0]

    assert with_power(102, torch.float16) == 0
    assert with_power(102, torch.bfloat16) == 6 * 2.0**-15
    assert with_power(103, torch.float16) == 6 * 2.0**-14
    assert with_power(255, torch.bfloat16).isnan()


def test_the_dequantized_weight_is_rounded_to_the_dtype_of_x() -> None:
    weight, scale = torch.tensor([[1.125]]).to(torch.float8_e4m3fn), torch.tensor([1 + 2.0**-7]).bfloat16()
    x = torch.tensor([[2.0**8]]).bfloat16()
    # 1.125 * 1.0078125 = 1.1337890625 has eleven digits; eight are left.
    assert matmul(x, weight, scale).item() == 1.1328125 * 2.0**8


def test_no_rows() -> None:
    assert matmul(
        torch.empty(0, K).half(), torch.ones(K, N).to(torch.float8_e4m3fn), torch.ones(N).half()
    ).shape == (0, N)
