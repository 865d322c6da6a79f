"""npu_quant_matmul of floats against sums in float64 over the numbers that the operands stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion import formats
from npu_fusion.kernels.reference._quant import pack_quant_param
from tests.kernels._numerics import assert_correctly_rounded

quant_matmul = torch.ops.npu.npu_quant_matmul
FP16, FP32, BF16 = 5, 6, 15
HIFLOAT8, E8M0, FLOAT4 = 290, 293, 296
OUTPUT = {FP16: torch.float16, FP32: torch.float32, BF16: torch.bfloat16}
HIF = {"x1_dtype": HIFLOAT8, "x2_dtype": HIFLOAT8}
MX = {"pertoken_scale_dtype": E8M0, "scale_dtype": E8M0, "group_sizes": [1, 1, 32]}
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def e4m3(*shape: int) -> Tensor:
    return (torch.randn(shape) * 2).to(torch.float8_e4m3fn)


def powers(*shape: int) -> Tensor:
    """e8m0 of 2^-5 to 2^4."""
    return torch.randint(122, 132, shape, dtype=torch.uint8)


def nibbles(packed: Tensor) -> Tensor:
    """float64 [n, k] of uint8 [n, k/2], the even one in the low nibble."""
    return torch.stack([E2M1[(packed & 15).long()], E2M1[(packed >> 4).long()]], dim=-1).flatten(-2)


def blockwise(values: Tensor, scales: Tensor) -> Tensor:
    """float64 [.., k] times the scales [.., ceil(k/64), 2] of its blocks of 32, one after the other."""
    result = values.clone()
    for start in range(0, values.size(-1), 32):
        block = start // 32
        exponent = scales[..., block // 2, block % 2].double() - 127
        result[..., start : start + 32] *= 2.0 ** exponent.unsqueeze(-1)
    return result


def assert_close(y: Tensor, exact: Tensor) -> None:
    """Rounded once, but where the sum is so small that the rounding of its terms shows."""
    far = exact.abs() > 1e-3 * exact.abs().max()
    assert far.any()
    if y.dtype == torch.float32:
        torch.testing.assert_close(y[far].double(), exact[far], rtol=2e-5, atol=0)
    else:
        assert_correctly_rounded(y[far], exact[far])


@pytest.mark.parametrize("output", [FP16, FP32, BF16])
@pytest.mark.parametrize("hifloat8", [False, True])
@pytest.mark.parametrize("rows", ["none", "packed", "one", "each"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_8_bit_floats(output: int, hifloat8: bool, rows: str, with_bias: bool) -> None:
    element = "hifloat8" if hifloat8 else "float8_e4m3fn"
    x1, x2 = formats.encode(torch.randn(2, 6, 40), element), formats.encode(torch.randn(9, 40), element).t()
    scale = torch.rand(9) * 1e-2 + 1e-3
    given_scale = pack_quant_param(scale) if rows == "packed" else scale
    token = {"one": torch.rand(1), "each": torch.rand(6)}.get(rows)
    bias = torch.randn(9) * 100 if with_bias else None
    call = HIF if hifloat8 else {}
    y = quant_matmul(x1, x2, given_scale, pertoken_scale=token, bias=bias, output_dtype=output, **call)
    assert y.dtype == OUTPUT[output]

    exact = formats.decode(x1, element).double() @ formats.decode(x2, element).double()
    kept = (scale.view(torch.int32) & ~0x1FFF).view(torch.float32) if rows == "packed" else scale
    shift = 0 if bias is None else bias.double()
    if token is None:
        exact = (exact + shift) * kept.double()
    else:
        exact = exact * kept.double() * token.double()[:, None] + shift
    assert_close(y, exact)


def test_the_bias_is_scaled_unless_rows_have_a_scale() -> None:
    one, scale, bias = torch.ones(1, 1).to(torch.float8_e4m3fn), torch.tensor([2.0]), torch.tensor([3.0])
    assert quant_matmul(one, one, scale, bias=bias, output_dtype=FP16).item() == 8.0
    packed = pack_quant_param(scale)
    assert quant_matmul(one, one, packed, bias=bias, output_dtype=FP16).item() == 8.0
    rows = torch.tensor([5.0])
    assert quant_matmul(one, one, scale, pertoken_scale=rows, bias=bias, output_dtype=FP16).item() == 13.0


def test_codes_of_hifloat8_are_not_integers() -> None:
    # 0x08 is 1, 0x18 is 2 (D = 1), 0x88 is -1.
    x1 = torch.tensor([[0x08, 0x18]], dtype=torch.uint8)
    x2 = torch.tensor([[0x18], [0x88]], dtype=torch.uint8)
    numbers = formats.decode(x1, "hifloat8").double() @ formats.decode(x2, "hifloat8").double()
    y = quant_matmul(x1, x2, torch.ones(1), output_dtype=FP32, **HIF)
    assert y.item() == numbers.item()
    assert formats.decode(x1, "hifloat8")[0, 0].item() == 1.0


def test_batched_bias() -> None:
    x1, x2, bias = e4m3(2, 3, 8), e4m3(8, 4), torch.randn(2, 1, 4)
    y = quant_matmul(x1, x2, torch.ones(1), bias=bias, output_dtype=FP32)
    torch.testing.assert_close(y.double(), x1.double() @ x2.double() + bias.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("output", [FP16, FP32, BF16])
@pytest.mark.parametrize("inner", [32, 64, 96, 200])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_microscaled(output: int, inner: int, transposed: bool, with_bias: bool) -> None:
    pairs = (inner + 63) // 64
    x1, x2 = e4m3(5, inner), e4m3(7, inner)
    rows, columns = powers(5, pairs, 2), powers(7, pairs, 2)
    exact = blockwise(x1.double(), rows) @ blockwise(x2.double(), columns).t()
    bias = torch.randn(7) * 10 if with_bias else None
    given_x2, scale = x2.t(), columns.transpose(0, 1)
    if not transposed:
        # Clones: one pair of blocks counts as contiguous whatever its strides are.
        given_x2, scale = (t.clone(memory_format=torch.contiguous_format) for t in (given_x2, scale))
    y = quant_matmul(x1, given_x2, scale, pertoken_scale=rows, bias=bias, output_dtype=output, **MX)
    exact = exact if bias is None else exact + bias.double()
    assert_close(y, exact)


def test_each_block_has_the_scale_at_its_place() -> None:
    """One number of a block is 1, all others 0: the result is the two scales of that block."""
    inner = 160
    for k in (0, 31, 32, 64, 95, 96, 159):
        x1, x2 = torch.zeros(1, inner), torch.zeros(1, inner)
        x1[0, k] = x2[0, k] = 1
        block = k // 32
        rows, columns = torch.zeros(1, 3, 2, dtype=torch.uint8), torch.zeros(1, 3, 2, dtype=torch.uint8)
        rows[0, block // 2, block % 2], columns[0, block // 2, block % 2] = 127 + 3, 127 - 5
        a, b = (t.to(torch.float8_e4m3fn) for t in (x1, x2))
        y = quant_matmul(a, b.t(), columns.transpose(0, 1), pertoken_scale=rows, output_dtype=FP32, **MX)
        assert y.item() == 2.0**-2


def test_microscaled_batches_and_scales_of_their_own_dtype() -> None:
    x1, x2 = e4m3(3, 1, 4, 96), e4m3(2, 5, 96)
    rows, columns = powers(3, 1, 4, 2, 2), powers(2, 5, 2, 2)
    call = {**MX, "pertoken_scale": rows, "output_dtype": FP32}
    y = quant_matmul(x1, x2.mT, columns.transpose(1, 2), **call)
    exact = blockwise(x1.double(), rows) @ blockwise(x2.double(), columns).mT
    assert_close(y, exact)
    if hasattr(torch, "float8_e8m0fnu"):
        call["pertoken_scale"] = rows.view(torch.float8_e8m0fnu)
        same = quant_matmul(x1, x2.mT, columns.view(torch.float8_e8m0fnu).transpose(1, 2), **call)
        assert torch.equal(same, y)


def test_extreme_scales() -> None:
    """2^-127 (a denormal of fp32) and 2^127 are powers like the others; 255 is NaN."""
    one = torch.zeros(1, 32)
    one[0, 0] = 1
    x = one.to(torch.float8_e4m3fn)

    def scaled(first: int, second: int) -> float:
        rows, columns = (torch.tensor([[[e, 0]]], dtype=torch.uint8) for e in (first, second))
        call = {**MX, "pertoken_scale": rows, "output_dtype": FP32}
        return float(quant_matmul(x, x.t(), columns, **call).item())

    assert scaled(0, 254) == 1.0
    assert scaled(0, 127) == 2.0**-127
    assert scaled(254, 127) == 2.0**127
    assert torch.tensor(scaled(255, 127)).isnan()


@pytest.mark.parametrize("output", [FP16, BF16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("inner", [32, 72, 96])
def test_microscaled_float4(output: int, with_bias: bool, inner: int) -> None:
    pairs = (inner + 63) // 64
    x1, packed = e4m3(5, inner), torch.randint(0, 256, (7, inner // 2), dtype=torch.uint8)
    rows, columns = powers(5, pairs, 2), powers(7, pairs, 2)
    bias = torch.randn(1, 7).to(OUTPUT[output]) if with_bias else None
    call = {**MX, "pertoken_scale": rows, "bias": bias, "output_dtype": output, "x2_dtype": FLOAT4}
    y = quant_matmul(x1, packed.t(), columns.transpose(0, 1), **call)
    exact = blockwise(x1.double(), rows) @ blockwise(nibbles(packed), columns).t()
    exact = exact if bias is None else exact + bias.double()
    assert_close(y, exact)


def two_levels(x1: Tensor, packed: Tensor, scale: Tensor, outer: Tensor) -> Tensor:
    call: dict[str, Any] = {"x2_dtype": FLOAT4, "group_sizes": [0, 0, 32], "y_scale": pack_quant_param(outer)}
    output = FP16 if scale.dtype == torch.float16 else BF16
    result: Tensor = quant_matmul(x1, packed.t(), scale, output_dtype=output, **call)
    return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_levels_with_exact_scales(dtype: torch.dtype) -> None:
    """1, 1.25 and 1.5 times a power of two leave every float4 a float8."""
    x1, packed = e4m3(5, 96), torch.randint(0, 256, (7, 48), dtype=torch.uint8)
    scale = torch.tensor([1.0, 1.25, 1.5])[torch.randint(0, 3, (7, 3))] * 2.0 ** torch.randint(-4, 5, (7, 3))
    outer = 2.0 ** torch.randint(-8, 1, (1, 7)).float()
    y = two_levels(x1, packed, scale.to(dtype), outer)
    weight = nibbles(packed) * scale.double().repeat_interleave(32, dim=1)
    exact = x1.double() @ weight.t() * outer.double()
    assert_close(y, exact)


@example(code=3, exponent=0, mantissa=54)  # 2.1328125: 2.125 in bfloat16, hence 2, where 2.25 is nearer
@settings(max_examples=50, deadline=None)
@given(code=st.integers(0, 7), exponent=st.integers(-9, 6), mantissa=st.integers(0, 127))
def test_two_levels_round_the_weight_to_float8(code: int, exponent: int, mantissa: int) -> None:
    scale = 2.0**exponent * (1 + mantissa / 128)  # a bfloat16
    product = float(E2M1[code]) * scale
    # Two roundings: to the eight digits of bfloat16, then to float8_e4m3fn; python's is half to even.
    wide = torch.tensor(product, dtype=torch.float64).to(torch.bfloat16).double().item()
    step = 2.0 ** max(torch.frexp(torch.tensor(wide)).exponent.item() - 4, -9)
    expected = min(round(wide / step) * step, 448.0)
    x1, packed = torch.zeros(1, 32), torch.zeros(1, 16, dtype=torch.uint8)
    x1[0, 5], packed[0, 2] = 1, code << 4
    y = two_levels(x1.to(torch.float8_e4m3fn), packed, torch.tensor([[scale]]).bfloat16(), torch.ones(1, 1))
    assert y.item() == expected


def test_the_outer_scale_keeps_10_mantissa_bits() -> None:
    x1, packed = torch.ones(1, 32).to(torch.float8_e4m3fn), torch.full((1, 16), 0x02, dtype=torch.uint8)
    outer = torch.tensor([[1 + 2.0**-10 - 2.0**-20]])
    assert two_levels(x1, packed, torch.ones(1, 1).half(), outer).item() == 16.0


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_any_number_of_rows(rows: int) -> None:
    x1, x2 = e4m3(rows, 64), e4m3(9, 64).t()
    y = quant_matmul(x1, x2, torch.ones(9), pertoken_scale=torch.ones(rows), output_dtype=FP32)
    torch.testing.assert_close(y.double(), x1.double() @ x2.double(), rtol=1e-5, atol=1e-3)


def test_strided_operands() -> None:
    x1, x2 = e4m3(64, 6).t(), e4m3(64, 9)[:, ::2]
    y = quant_matmul(x1, x2, torch.ones(5), output_dtype=FP32)
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), x1.double() @ x2.double(), rtol=1e-5, atol=1e-3)
