from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.reference import quant_matmul as kernel
from tests.kernels._numerics import assert_correctly_rounded

quant_matmul = torch.ops.npu.npu_quant_matmul
INT8, INT32, FP16, BF16 = 1, 3, 5, 15
OUTPUT = {FP16: torch.float16, BF16: torch.bfloat16}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["fast", "exact fallback"])
def _both_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test on ``torch._int_mm`` (if this processor computes it exactly) and on the fallback."""
    if request.param == "fast":
        if not kernel._fast_product_is_exact():
            pytest.skip("torch._int_mm is not exact on this processor")
    else:
        monkeypatch.setattr(kernel, "_fast_product_is_exact", lambda: False)


def int8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def pack(scale: float, offset: int = 0) -> int:
    """What npu_trans_quant_param stores: 19 bits of the scale, bit 46, nine bits of offset."""
    bits = struct.unpack("<I", struct.pack("<f", scale))[0]
    return (bits & 0xFFFFE000) | (1 << 46) | ((offset & 0x1FF) << 37)


@pytest.mark.usefixtures("_both_products")
@pytest.mark.parametrize(
    ("x1_shape", "x2_shape"),
    [
        ((1, 64), (64, 8)),
        ((5, 7), (7, 3)),
        ((17, 300), (300, 33)),
        ((2, 3, 9), (9, 4)),
        ((2, 3, 9), (2, 9, 4)),
        ((2, 1, 3, 9), (5, 9, 4)),
        ((3, 9), (2, 9, 4)),
        ((0, 9), (9, 4)),
        ((3, 0), (0, 4)),
        ((0, 2, 3), (3, 4)),
        ((0, 2, 3), (0, 3, 4)),
    ],
)
def test_int32_output_is_the_exact_accumulator(x1_shape: tuple[int, ...], x2_shape: tuple[int, ...]) -> None:
    x1, x2 = int8(*x1_shape), int8(*x2_shape)
    y = quant_matmul(x1, x2, torch.full((1,), 123.0), output_dtype=INT32)
    assert y.dtype == torch.int32
    assert torch.equal(y.double(), torch.matmul(x1.double(), x2.double()))


@pytest.mark.usefixtures("_both_products")
@pytest.mark.parametrize("inner", [1, 2, 64, 1031])
def test_extreme_operands_do_not_saturate_on_the_way(inner: int) -> None:
    extremes = torch.tensor([-128, 127], dtype=torch.int8)
    x1, x2 = extremes[:, None].repeat(1, inner), extremes[None, :].repeat(inner, 1)
    y = quant_matmul(x1, x2, torch.ones(1), output_dtype=INT32)
    assert y.tolist() == [[inner * a * b for b in (-128, 127)] for a in (-128, 127)]


@pytest.mark.usefixtures("_both_products")
def test_strided_operands_and_fresh_contiguous_results() -> None:
    x1, x2 = int8(2, 9, 3).transpose(1, 2), int8(4, 9).t()
    before = x1.clone(), x2.clone()
    y = quant_matmul(x1, x2, torch.ones(4), output_dtype=INT32)
    assert torch.equal(y, quant_matmul(x1.contiguous(), x2.contiguous(), torch.ones(4), output_dtype=INT32))
    assert y.is_contiguous()
    assert torch.equal(x1, before[0])
    assert torch.equal(x2, before[1])


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_what_torch_multiplies_wrongly(rows: int) -> None:
    """``torch._int_mm`` misreads repeated rows, and a single column with the strides of its transpose."""
    one = torch.ones(1)
    x1, x2 = int8(1, 70).expand(rows, 70), int8(40, 70).t()
    column, row = int8(rows, 1), int8(24, 1).t()
    repeated = int8(64, 1).expand(64, 33)
    for left, right in ((x1, x2), (column, row), (int8(rows, 64), repeated)):
        result = quant_matmul(left, right, one, output_dtype=INT32)
        assert torch.equal(result, left.int() @ right.int())


def test_int32_output_ignores_the_scale_and_adds_an_int32_bias() -> None:
    x1, x2, bias = int8(3, 8), int8(8, 4), torch.randint(-1000, 1000, (4,), dtype=torch.int32)
    y = quant_matmul(x1, x2, torch.rand(4), bias=bias, output_dtype=INT32)
    assert torch.equal(y, x1.int() @ x2.int() + bias)


@pytest.mark.parametrize("output", [FP16, BF16])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("bias_dtype", [None, torch.int32, torch.float32])
def test_dequantized_output_matches_float64(
    output: int, per_channel: bool, with_rows: bool, bias_dtype: torch.dtype | None
) -> None:
    x1, x2 = int8(2, 6, 40), int8(40, 9)
    scale = torch.rand(9 if per_channel else 1) * 1e-3
    rows = torch.rand(6) if with_rows else None
    bias = None if bias_dtype is None else (torch.randn(9) * 100).to(bias_dtype)
    y = quant_matmul(x1, x2, scale, pertoken_scale=rows, bias=bias, output_dtype=output)
    assert y.dtype == OUTPUT[output]

    exact = x1.double() @ x2.double() + (bias.double() if bias_dtype == torch.int32 else 0)
    exact = exact * scale.double() * (rows.double()[:, None] if with_rows else 1)
    exact = exact + (bias.double() if bias_dtype == torch.float32 else 0)
    far = exact.abs() > 1e-2
    assert_correctly_rounded(y[far], exact[far])


def test_integer_bias_is_scaled_and_float_bias_is_not() -> None:
    one, scale, rows = torch.ones(1, 1, dtype=torch.int8), torch.tensor([2.0]), torch.tensor([5.0])
    before = torch.tensor([3], dtype=torch.int32)
    assert quant_matmul(one, one, scale, pertoken_scale=rows, bias=before, output_dtype=FP16).item() == 40.0
    after = torch.tensor([3.0])
    assert quant_matmul(one, one, scale, pertoken_scale=rows, bias=after, output_dtype=FP16).item() == 13.0


@pytest.mark.parametrize(("bias_dtype", "output"), [(torch.float16, FP16), (torch.bfloat16, BF16)])
def test_bias_in_the_dtype_of_the_output(bias_dtype: torch.dtype, output: int) -> None:
    x1, x2, bias = int8(3, 8), int8(8, 4), torch.randn(4).to(bias_dtype)
    rows, scale = torch.rand(3), torch.rand(4)
    y = quant_matmul(x1, x2, scale, pertoken_scale=rows, bias=bias, output_dtype=output)
    wide = quant_matmul(x1, x2, scale, pertoken_scale=rows, bias=bias.float(), output_dtype=output)
    assert torch.equal(y, wide)


def test_bf16_scale() -> None:
    x1, x2, scale = int8(3, 8), int8(8, 4), torch.rand(4).bfloat16()
    y = quant_matmul(x1, x2, scale, output_dtype=BF16)
    assert torch.equal(y, quant_matmul(x1, x2, scale.float(), output_dtype=BF16))


def test_batched_bias() -> None:
    x1, x2 = int8(2, 3, 8), int8(8, 4)
    bias = torch.randint(-1000, 1000, (2, 1, 4), dtype=torch.int32)
    y = quant_matmul(x1, x2, torch.ones(1), bias=bias, output_dtype=INT32)
    assert torch.equal(y, x1.int() @ x2.int() + bias)


@pytest.mark.parametrize("output_dtype", [None, INT8, torch.int8])
def test_no_output_dtype_means_int8(output_dtype: int | torch.dtype | None) -> None:
    x1, x2, scale, offset = int8(4, 16), int8(16, 6), torch.rand(6) * 1e-2, torch.randn(6) * 20
    y = quant_matmul(x1, x2, scale, offset=offset, output_dtype=output_dtype)
    exact = x1.double() @ x2.double() * scale.double() + offset.double()
    assert y.dtype == torch.int8
    assert (y - exact.clamp(-128, 127)).abs().max() <= 0.5 + 1e-4


def test_int8_output_rounds_half_to_even_and_saturates() -> None:
    x1 = torch.tensor([[1], [3], [5], [127], [-128]], dtype=torch.int8)
    two = torch.tensor([[1, 4]], dtype=torch.int8)
    y = quant_matmul(x1, two, torch.tensor([0.5]))
    assert y.tolist() == [[0, 2], [2, 6], [2, 10], [64, 127], [-64, -128]]
    shifted = quant_matmul(x1, two, torch.tensor([0.5]), offset=torch.tensor([1.0]))
    assert shifted[:, 0].tolist() == [2, 2, 4, 64, -63]  # the offset comes before the rounding: 0.5 + 1 -> 2


@pytest.mark.parametrize("offset", [0, 5, -7, -256, 255])
def test_packed_scale_carries_its_offset_for_int8(offset: int) -> None:
    x1, x2 = int8(4, 16), int8(16, 2)
    packed = torch.tensor([pack(0.0078125, offset), pack(0.5, offset)])
    plain = torch.tensor([0.0078125, 0.5])
    y = quant_matmul(x1, x2, packed)
    assert torch.equal(y, quant_matmul(x1, x2, plain, offset=torch.full((2,), float(offset))))


def test_packed_scale_keeps_10_mantissa_bits_and_is_not_the_float_scale() -> None:
    x1, x2 = torch.full((1, 64), 127, dtype=torch.int8), torch.full((64, 1), 127, dtype=torch.int8)
    scale = 1 + 2.0**-10 - 2.0**-20  # cut off to 1
    scale = scale * 2.0**-10
    y = quant_matmul(x1, x2, torch.tensor([pack(scale)]), output_dtype=FP16)
    assert torch.equal(y, quant_matmul(x1, x2, torch.tensor([2.0**-10]), output_dtype=FP16))
    assert not torch.equal(y, quant_matmul(x1, x2, torch.tensor([scale]), output_dtype=FP16))


def test_packed_offset_does_not_act_on_fp16() -> None:
    x1, x2 = int8(4, 16), int8(16, 1)
    with_offset = quant_matmul(x1, x2, torch.tensor([pack(0.5, 9)]), output_dtype=FP16)
    assert torch.equal(with_offset, quant_matmul(x1, x2, torch.tensor([pack(0.5)]), output_dtype=FP16))


def test_accumulators_beyond_24_bits_are_rounded_once() -> None:
    # 127 * 127 * 1041 > 2**24: the fp32 conversion rounds, and nothing else does.
    inner = 1041
    x1 = torch.full((1, inner), 127, dtype=torch.int8)
    x2 = torch.full((inner, 1), 127, dtype=torch.int8)
    x1[0, 0] = 1
    acc = 127 * 127 * (inner - 1) + 127
    bias = torch.tensor([2**24 + 1 - acc], dtype=torch.int32)
    y = quant_matmul(x1, x2, torch.tensor([2.0**-24]), bias=bias, output_dtype=BF16)
    assert y.item() == 1.0
    exact = quant_matmul(x1, x2, torch.ones(1), bias=bias, output_dtype=INT32)
    assert exact.item() == 2**24 + 1


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 5),
    inner=st.integers(0, 40),
    columns=st.integers(1, 6),
    batch1=st.sampled_from([(), (1,), (3,), (2, 1)]),
    batch2=st.sampled_from([(), (1,), (3,)]),
    seed=st.integers(0, 2**16),
)
def test_properties(
    rows: int, inner: int, columns: int, batch1: tuple[int, ...], batch2: tuple[int, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    x1, x2 = int8(*batch1, rows, inner), int8(*batch2, inner, columns)
    scale, token = torch.rand(columns), torch.rand(rows)
    acc = quant_matmul(x1, x2, scale, output_dtype=INT32)
    assert torch.equal(acc.double(), torch.matmul(x1.double(), x2.double()))
    # The dequantizing form is the raw accumulator times the channel scale, then the token scale, in fp32.
    y = quant_matmul(x1, x2, scale, pertoken_scale=token, output_dtype=BF16)
    assert torch.equal(y, (acc.float() * scale * token[:, None]).bfloat16())
    # Requantizing is the same number, rounded and saturated.
    y = quant_matmul(x1, x2, scale)
    assert torch.equal(y, (acc.float() * scale).round().clamp(-128, 127).to(torch.int8))
