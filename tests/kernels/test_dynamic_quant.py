from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion import formats
from tests.formats._numbers import rounded

dynamic_quant = torch.ops.npu.npu_dynamic_quant
asymmetric = torch.ops.npu.npu_dynamic_quant_asymmetric
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
QUINT4X2, HIFLOAT8 = 16, 290
FLOATS = {23: "float8_e5m2", 24: "float8_e4m3fn", HIFLOAT8: "hifloat8"}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def nibbles(packed: Tensor) -> Tensor:
    """int32 [..., n] to the eight signed 4-bit integers of each element, by plain arithmetic."""
    values = []
    for word in packed.flatten().tolist():
        for shift in range(0, 32, 4):
            nibble = (word & 0xFFFFFFFF) >> shift & 0xF
            values.append(nibble - 16 if nibble > 7 else nibble)
    return torch.tensor(values).reshape(*packed.shape[:-1], -1)


def assert_quantized(x: Tensor, y: Tensor, scale: Tensor, largest: int) -> None:
    """``y`` and ``scale`` [..., 1] are the symmetric quantization of the float64 rows ``x``."""
    exact = x.abs().amax(-1, keepdim=True) / largest
    torch.testing.assert_close(scale.double(), exact, rtol=1e-6, atol=0)
    # fp32 arithmetic may take another integer only where x / scale is a tie to within its own error.
    quotient = x / exact
    assert ((y - quotient).abs() <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 3, 40), (2, 1, 3, 8)])
def test_matches_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    y, scale = dynamic_quant(x)
    assert (y.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (y.shape, scale.shape) == (shape, shape[:-1])
    assert_quantized(x.double(), y, scale.unsqueeze(-1), 127)
    assert (y.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_smooth_scales_multiply_in_fp32(dtype: torch.dtype) -> None:
    x, smooth = torch.randn(5, 64).to(dtype), (torch.rand(64) + 0.1).to(dtype)
    y, scale = dynamic_quant(x, smooth_scales=smooth)
    y_product, scale_product = dynamic_quant(x.float() * smooth.float())
    assert torch.equal(y, y_product)
    assert torch.equal(scale, scale_product)


def test_scale_dequantizes_and_is_not_its_inverse() -> None:
    # npu_swiglu_quant returns 127/amax where this operator returns amax/127.
    _, scale = dynamic_quant(torch.tensor([[254.0, 1.0]]))
    assert scale.tolist() == [2.0]


def test_zero_row_has_scale_0_and_y_0() -> None:
    x = torch.randn(3, 16)
    x[1] = 0
    y, scale = dynamic_quant(x)
    assert scale[1] == 0
    assert (y[1] == 0).all()
    assert (scale[[0, 2]] > 0).all()


def test_ties_round_to_even_and_the_minimum_is_minus_127() -> None:
    y, _ = dynamic_quant(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]]))
    assert y.tolist() == [[127, 0, 2, 2, 0, -2, -127]]


def test_group_index_is_a_running_sum_not_counts() -> None:
    x = torch.ones(5, 2)
    smooth = torch.tensor([[1.0, 1.0], [7.0, 7.0], [2.0, 2.0]])
    _, scale = dynamic_quant(x, smooth_scales=smooth, group_index=torch.tensor([2, 2, 5], dtype=torch.int32))
    assert (scale * 127).tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]


def test_rows_beyond_the_last_group_are_not_smoothed() -> None:
    _, scale = dynamic_quant(
        torch.ones(2, 2, 2),
        smooth_scales=torch.full((1, 2), 3.0),
        group_index=torch.tensor([3], dtype=torch.int32),
    )
    assert (scale * 127).tolist() == [[3.0, 3.0], [3.0, 1.0]]


@pytest.mark.parametrize("dst_type", [None, 1, torch.int8])
def test_spellings_of_int8(dst_type: int | torch.dtype | None) -> None:
    x = torch.randn(4, 8)
    assert torch.equal(dynamic_quant(x, dst_type=dst_type)[0], dynamic_quant(x)[0])


@pytest.mark.parametrize("dst_type", [QUINT4X2, torch.quint4x2])
@pytest.mark.parametrize("quant_mode", ["pertoken", "pertensor"])
def test_int4_is_packed_eight_to_an_int32(dst_type: int | torch.dtype, quant_mode: str) -> None:
    x = torch.randn(3, 2, 24).half()
    y, scale = dynamic_quant(x, dst_type=dst_type, quant_mode=quant_mode)
    assert (y.shape, y.dtype) == ((3, 2, 3), torch.int32)
    rows = x.double() if quant_mode == "pertoken" else x.double().reshape(1, -1)
    assert_quantized(rows, nibbles(y).reshape(rows.shape), scale.unsqueeze(-1), 7)


def test_pertensor_has_one_scale() -> None:
    x, smooth = torch.randn(3, 4, 8), torch.rand(8)
    y, scale = dynamic_quant(x, smooth_scales=smooth, quant_mode="pertensor")
    assert scale.shape == (1,)
    smoothed = (x * smooth).double().reshape(1, -1)
    assert_quantized(smoothed, y.reshape(1, -1), scale.unsqueeze(-1), 127)


def test_perchannel_reduces_the_last_dimension_but_one() -> None:
    x, smooth = torch.randn(3, 4, 8), torch.rand(4)
    y, scale = dynamic_quant(x, smooth_scales=smooth, quant_mode="perchannel")
    assert scale.shape == (3, 8)
    smoothed = (x * smooth[:, None]).double().mT
    assert_quantized(smoothed, y.mT, scale.unsqueeze(-1), 127)


@pytest.mark.parametrize("quant_mode", ["pertoken", "pertensor", "perchannel"])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)])
def test_empty_input(quant_mode: str, shape: tuple[int, ...]) -> None:
    y, scale = dynamic_quant(torch.empty(shape), quant_mode=quant_mode)
    assert y.shape == shape
    assert (scale == 0).all()
    y, scale, offset = asymmetric(torch.empty(shape), quant_mode=quant_mode)
    assert y.shape == shape
    assert offset.shape == scale.shape


@pytest.mark.parametrize("operator", [dynamic_quant, asymmetric])
@pytest.mark.parametrize("quant_mode", ["pertoken", "pertensor", "perchannel"])
def test_strided_input_gives_fresh_contiguous_outputs(
    operator: torch._ops.OpOverloadPacket, quant_mode: str
) -> None:
    x = torch.randn(8, 3, 4).permute(2, 1, 0)
    before = x.clone()
    results = operator(x, quant_mode=quant_mode)
    for result, expected in zip(results, operator(x.contiguous(), quant_mode=quant_mode), strict=True):
        assert torch.equal(result, expected)
        assert result.is_contiguous()
        result.zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize(("dst_type", "low", "high"), [(1, -128, 127), (QUINT4X2, -8, 7)])
def test_asymmetric_matches_float64(dst_type: int, low: int, high: int) -> None:
    x, smooth = torch.rand(6, 32).half(), (torch.rand(32) + 0.5).half()
    y, scale, offset = asymmetric(x, smooth_scales=smooth, dst_type=dst_type)
    values = y if dst_type == 1 else nibbles(y)
    rows = (x.float() * smooth.float()).double()
    exact_scale = (rows.amax(-1) - rows.amin(-1)) / (high - low)
    exact_offset = high - rows.amax(-1) / exact_scale
    torch.testing.assert_close(scale.double(), exact_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(offset.double(), exact_offset, rtol=1e-5, atol=1e-4)
    assert ((values - rows / exact_scale[:, None] - exact_offset[:, None]).abs() <= 0.5 + 1e-3).all()
    assert values.amin() >= low
    assert (values.amax(-1) == high).all()


def test_asymmetric_offset_is_not_rounded() -> None:
    y, scale, offset = asymmetric(torch.tensor([[0.0, 1.0, 2.55]]))
    assert scale.item() == pytest.approx(0.01)
    assert offset.item() == pytest.approx(-128.0, abs=1e-3)
    _, _, offset = asymmetric(torch.tensor([[0.3, 1.0]]))
    assert offset.item() == pytest.approx(127 - 255 / 0.7, abs=1e-3)
    assert y.tolist() == [[-128, -28, 127]]


def test_asymmetric_constant_rows_divide_by_the_smallest_scale() -> None:
    _, scale, offset = asymmetric(torch.zeros(1, 4))
    assert scale.item() == pytest.approx(1e-12)
    assert offset.item() == 127.0
    y, scale, offset = asymmetric(torch.full((1, 4), 3.0))
    assert scale.item() == pytest.approx(1e-12)
    assert torch.isfinite(offset).all()
    assert y.unique().numel() == 1


def test_asymmetric_groups() -> None:
    x, smooth = torch.rand(5, 8), torch.rand(2, 8)
    y, scale, offset = asymmetric(
        x, smooth_scales=smooth, group_index=torch.tensor([3, 5], dtype=torch.int32)
    )
    for rows, factor in ((slice(0, 3), smooth[0]), (slice(3, 5), smooth[1])):
        for got, expected in zip((y, scale, offset), asymmetric(x[rows], smooth_scales=factor), strict=True):
            assert torch.equal(got[rows], expected)


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 33),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.integers(-4, 4),
    zero_row=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_properties(
    rows: int, columns: int, dtype: torch.dtype, magnitude: int, zero_row: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, columns, generator=generator) * 10.0**magnitude).to(dtype)
    if zero_row:
        x[0] = 0
    y, scale = dynamic_quant(x)
    # Dequantizing gives x back to half a step.
    error = (y.double() * scale.double()[:, None] - x.double()).abs()
    assert (error <= scale.double()[:, None] * 0.5001).all()
    # Odd, and invariant under powers of two (in fp32, where they are exact).
    y_negative, scale_negative = dynamic_quant(-x)
    assert torch.equal(y_negative, -y)
    assert torch.equal(scale_negative, scale)
    y_scaled, scale_scaled = dynamic_quant(x.float() * 4.0)
    assert torch.equal(y_scaled, y)
    assert torch.equal(scale_scaled, scale * 4.0)
    # Rows do not see each other.
    for row in range(rows):
        y_row, scale_row = dynamic_quant(x[row : row + 1])
        assert torch.equal(y_row[0], y[row])
        assert torch.equal(scale_row[0], scale[row])


def assert_float_quantized(x: Tensor, y: Tensor, scale: Tensor, name: str, largest: float) -> None:
    """``y`` and ``scale`` [..., 1] are the symmetric quantization of the float32 rows ``x``."""
    exact = x.double().abs().amax(-1, keepdim=True) / largest
    torch.testing.assert_close(scale.double(), exact, rtol=1e-6, atol=0)
    values = formats.decode(y, name).double()
    # The quotient of float32, which is correctly rounded.
    assert torch.equal(values, rounded(x / scale, name))
    assert ((values.abs() - largest).abs().amin(-1) <= largest * 2.0**-3).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dst_type", FLOATS)
def test_floats_match_the_nearest_numbers(dst_type: int, dtype: torch.dtype) -> None:
    x, smooth = torch.randn(3, 2, 40).to(dtype), (torch.rand(40) + 0.1).to(dtype)
    y, scale = dynamic_quant(x, smooth_scales=smooth, dst_type=dst_type)
    name = FLOATS[dst_type]
    rows = x.float() * smooth.float()
    assert_float_quantized(rows, y, scale.unsqueeze(-1), name, formats.MAXIMUM[name])


@pytest.mark.parametrize("largest", [15.0, 1.0, 240.0])
def test_hifloat8_reaches_as_far_as_asked(largest: float) -> None:
    x = torch.randn(5, 64)
    y, scale = dynamic_quant(x, dst_type=HIFLOAT8, dst_type_max=largest)
    assert_float_quantized(x, y, scale.unsqueeze(-1), "hifloat8", largest)


def test_hifloat8_is_most_exact_where_it_has_most_digits() -> None:
    x = torch.randn(64, 256)
    errors = []
    for largest in (15.0, 0.0):
        y, scale = dynamic_quant(x, dst_type=HIFLOAT8, dst_type_max=largest)
        error = formats.decode(y, "hifloat8") * scale.unsqueeze(-1) - x
        errors.append(error.square().mean())
    assert errors[0] < errors[1] / 4


@pytest.mark.parametrize("dst_type", FLOATS)
@pytest.mark.parametrize("quant_mode", ["perchannel", "pertensor"])
def test_modes_of_floats(quant_mode: str, dst_type: int) -> None:
    x, name = torch.randn(3, 4, 8), FLOATS[dst_type]
    y, scale = dynamic_quant(x, dst_type=dst_type, quant_mode=quant_mode)
    if quant_mode == "perchannel":
        assert_float_quantized(x.mT, y.mT, scale.unsqueeze(-1), name, formats.MAXIMUM[name])
    else:
        assert_float_quantized(x.reshape(1, -1), y.reshape(1, -1), scale[None], name, formats.MAXIMUM[name])


@pytest.mark.parametrize("dst_type", FLOATS)
def test_zero_rows_and_empty_inputs_of_floats(dst_type: int) -> None:
    x = torch.randn(3, 16)
    x[1] = 0
    y, scale = dynamic_quant(x, dst_type=dst_type)
    assert scale[1] == 0 and (y.view(torch.uint8)[1] == 0).all()
    for shape in ((0, 8), (3, 0)):
        y, scale = dynamic_quant(torch.empty(shape), dst_type=dst_type)
        assert y.shape == shape and (scale == 0).all()
        assert asymmetric(torch.empty(shape), dst_type=dst_type)[0].shape == shape


@pytest.mark.parametrize(("dst_type", "largest"), [(23, 0.0), (24, 0.0), (HIFLOAT8, 0.0), (HIFLOAT8, 15.0)])
def test_asymmetric_floats_match_float64(dst_type: int, largest: float) -> None:
    x, name = torch.rand(6, 32).half(), FLOATS[dst_type]
    y, scale, offset = asymmetric(x, dst_type=dst_type, dst_type_max=largest)
    largest = largest or formats.MAXIMUM[name]
    rows = x.double()
    exact_scale = (rows.amax(-1) - rows.amin(-1)) / (2 * largest)
    torch.testing.assert_close(scale.double(), exact_scale, rtol=1e-6, atol=0)
    exact_offset = largest - rows.amax(-1) / exact_scale
    torch.testing.assert_close(offset.double(), exact_offset, rtol=1e-5, atol=1e-5 * largest)
    values = formats.decode(y, name)
    assert torch.equal(values.double(), rounded(x.float() / scale[:, None] + offset[:, None], name))
    assert (values.amax(-1) == largest).all() and (values.amin(-1) == -largest).all()


@pytest.mark.parametrize("dst_type", FLOATS)
def test_groups_of_floats(dst_type: int) -> None:
    x, smooth = torch.randn(5, 8), torch.rand(2, 8) + 0.1
    ends = torch.tensor([3, 5], dtype=torch.int32)
    y, scale = dynamic_quant(x, smooth_scales=smooth, group_index=ends, dst_type=dst_type)
    for rows, factor in ((slice(0, 3), smooth[0]), (slice(3, 5), smooth[1])):
        y_alone, scale_alone = dynamic_quant(x[rows], smooth_scales=factor, dst_type=dst_type)
        assert torch.equal(y[rows].view(torch.uint8), y_alone.view(torch.uint8))
        assert torch.equal(scale[rows], scale_alone)
