from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion import formats
from tests.formats._numbers import rounded

quantize = torch.ops.npu.npu_quantize
INT8, INT32, QINT8, QUINT8, QINT32, QUINT4X2 = 1, 3, 12, 13, 14, 16
FLOATS = {23: "float8_e5m2", 24: "float8_e4m3fn", 290: "hifloat8"}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("dtype", "result", "low", "high"),
    [
        (INT8, torch.int8, -128, 127),
        (QINT8, torch.int8, -128, 127),
        (torch.qint8, torch.int8, -128, 127),
        (QUINT8, torch.uint8, 0, 255),
        (0, torch.uint8, 0, 255),
        (QINT32, torch.int32, -(2**31), 2**31 - 1),
        (INT32, torch.int32, -(2**31), 2**31 - 1),
    ],
)
def test_dtype_enums_saturate(dtype: int | torch.dtype, result: torch.dtype, low: int, high: int) -> None:
    y = quantize(torch.tensor([-1e30, -3.0, 4.0, 1e30]), torch.tensor([1.0]), None, dtype)
    assert y.dtype == result
    assert y.tolist() == [low, max(low, -3), 4, high]


def test_div_mode_divides_and_the_other_multiplies() -> None:
    x, scales = torch.tensor([[10.0, 20.0]]), torch.tensor([2.0, 4.0])
    assert quantize(x, scales, None, QINT8).tolist() == [[5, 5]]
    assert quantize(x, scales, None, QINT8, div_mode=False).tolist() == [[20, 80]]


@pytest.mark.parametrize("div_mode", [True, False])
def test_zero_point_is_added_before_rounding(div_mode: bool) -> None:
    x, one = torch.tensor([[0.5, 1.5, 2.5]]), torch.tensor([1.0])
    odd = torch.tensor([1], dtype=torch.int32) if div_mode else torch.tensor([1.0])
    assert quantize(x, one, odd, QINT8, div_mode=div_mode).tolist() == [[2, 2, 4]]
    rounded_first = x.round() + 1
    assert rounded_first.tolist() == [[1.0, 3.0, 3.0]]


def test_fractional_zero_point() -> None:
    y = quantize(torch.tensor([[0.3, 0.4]]), torch.ones(1), torch.tensor([0.15]), QINT8, div_mode=False)
    assert y.tolist() == [[0, 1]]


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_axis_with_div_mode(axis: int) -> None:
    x = torch.randn(3, 4, 5)
    scales = torch.rand(x.size(axis)) + 0.1
    zero_points = torch.randint(-5, 5, scales.shape, dtype=torch.int32)
    y = quantize(x, scales, zero_points, QINT8, axis)
    for index in range(x.size(axis)):
        alone = quantize(
            x.select(axis, index), scales[index : index + 1], zero_points[index : index + 1], QINT8
        )
        assert torch.equal(y.select(axis, index), alone)


@pytest.mark.parametrize(("axis", "dim"), [(-2, 1), (-1, 2), (0, 2), (1, 2), (2, 2)])
def test_without_div_mode_every_axis_but_minus_2_means_the_last(axis: int, dim: int) -> None:
    x = torch.randn(3, 4, 5)
    scales = torch.rand(x.size(dim)) * 50
    y = quantize(x, scales, None, QINT8, axis, False)
    shape = [1, 1, 1]
    shape[dim] = -1
    assert torch.equal(y, quantize(x * scales.reshape(shape), torch.ones(1), None, QINT8))


def test_scales_of_the_rank_of_the_input() -> None:
    x, scales, zero_points = torch.randn(3, 4, 5), torch.rand(1, 4, 1), torch.randn(1, 4, 1)
    y = quantize(x, scales, zero_points, QINT8, -2, False)
    assert torch.equal(y, quantize(x, scales.flatten(), zero_points.flatten(), QINT8, -2, False))
    y = quantize(x, scales[:, :1], None, QINT8, -2, False)
    assert torch.equal(y, quantize(x, scales[0, :1, 0], None, QINT8, -2, False))


def test_one_scale_ignores_axis() -> None:
    x = torch.randn(7) * 5
    assert torch.equal(quantize(x, torch.ones(1), None, QINT8, 6), quantize(x, torch.ones(1), None, QINT8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computes_in_fp32(dtype: torch.dtype) -> None:
    x = torch.full((1, 1), 1000.0, dtype=dtype)
    scales = torch.full((1,), 1000.0, dtype=dtype)
    # 1e6 overflows fp16; the offset brings it back into range.
    y = quantize(x, scales, -(scales * 0 + 1000.0), QINT8, div_mode=False)
    assert y.item() == 127
    mixed = quantize(x, torch.tensor([8.0]), torch.tensor([-1.0]), QINT8)
    assert mixed.item() == 124


@pytest.mark.parametrize("zero_dtype", [torch.int8, torch.uint8, torch.int32, torch.bfloat16, torch.float32])
def test_zero_point_dtypes(zero_dtype: torch.dtype) -> None:
    y = quantize(torch.tensor([4.0, -4.0]), torch.tensor([2.0]), torch.tensor([3], dtype=zero_dtype), QUINT8)
    assert y.tolist() == [5, 1]


def test_int4_is_clamped_and_packed() -> None:
    x = torch.tensor([[-100.0, -8, -1, 0, 1, 7, 8, 100]])
    y = quantize(x, torch.ones(1), None, QUINT4X2, -1, False)
    assert (y.dtype, y.shape) == (torch.int32, (1, 1))
    assert [(y.item() >> shift & 0xF) for shift in range(0, 32, 4)] == [8, 8, 15, 0, 1, 7, 7, 7]


def test_nan_becomes_zero() -> None:
    y = quantize(torch.tensor([math.nan, math.inf, -math.inf]), torch.ones(1), None, QINT8)
    assert y.tolist() == [0, 127, -128]


def test_strided_and_empty_inputs() -> None:
    x = torch.randn(5, 4, 3).permute(2, 1, 0)
    before = x.clone()
    scales = torch.rand(8)[::2] + 0.1
    y = quantize(x, scales, None, QINT32)
    assert torch.equal(y, quantize(x.contiguous(), scales.contiguous(), None, QINT32))
    assert y.is_contiguous()
    assert torch.equal(x, before)
    assert quantize(torch.empty(0, 4), torch.ones(4), None, QINT8).shape == (0, 4)


def rint(value: Fraction) -> int:
    return round(value)  # Fraction rounds half to even


@settings(deadline=None, max_examples=100)
@given(
    # Eighths and powers of two: every quotient, product and sum is exact in fp32.
    eighths=st.lists(st.integers(-4000, 4000), min_size=1, max_size=20),
    exponent=st.integers(-3, 3),
    zero_point=st.integers(-128, 127),
    div_mode=st.booleans(),
)
def test_equals_exact_rational_arithmetic(
    eighths: list[int], exponent: int, zero_point: int, div_mode: bool
) -> None:
    scale = Fraction(2) ** exponent
    x = torch.tensor(eighths, dtype=torch.float32) / 8
    scales = torch.tensor([float(scale)])
    zero_points = torch.tensor([zero_point], dtype=torch.int32 if div_mode else torch.float32)
    y = quantize(x, scales, zero_points, QINT8, -1, div_mode)
    for value, got in zip(eighths, y.tolist(), strict=True):
        exact = Fraction(value, 8) / scale if div_mode else Fraction(value, 8) * scale
        assert got == min(127, max(-128, rint(exact + zero_point)))


@settings(deadline=None, max_examples=60)
@given(
    # As above: what is rounded is exact.
    eighths=st.lists(st.integers(-4000, 4000), min_size=1, max_size=20),
    exponent=st.integers(-12, 6),
    zero_point=st.integers(-128, 127),
    div_mode=st.booleans(),
    dtype=st.sampled_from(list(FLOATS)),
)
def test_floats_are_the_nearest_to_exact_arithmetic(
    eighths: list[int], exponent: int, zero_point: int, div_mode: bool, dtype: int
) -> None:
    x = torch.tensor(eighths, dtype=torch.float32) / 8
    zero_points = torch.tensor([zero_point], dtype=torch.int32 if div_mode else torch.float32)
    y = quantize(x, torch.tensor([2.0**exponent]), zero_points, dtype, -1, div_mode)
    exact = x.double() * 2.0 ** (-exponent if div_mode else exponent) + zero_point
    given_ = formats.decode(y, FLOATS[dtype]).double()
    assert given_.tolist() == rounded(exact, FLOATS[dtype]).tolist()


@pytest.mark.parametrize(("dtype", "name"), FLOATS.items())
def test_floats_are_rounded_once_and_saturate(dtype: int, name: str) -> None:
    """Not to an integer, and not by way of the dtype of the input."""
    x = torch.tensor([[0.3, 1e30, -1e30, -0.0]]).bfloat16()
    y = formats.decode(quantize(x, torch.tensor([7.0]), None, dtype, -1), name)
    quotient = x.float() / 7
    assert y.double().tolist() == rounded(quotient, name).tolist()
    assert y[0, 1] == formats.MAXIMUM[name] == -y[0, 2]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(23, [57344.0, -57344.0]), (24, [448.0, -448.0]), (290, [math.inf, -math.inf])],
)
def test_floats_keep_nan_and_hifloat8_infinity(dtype: int, expected: list[float]) -> None:
    y = quantize(torch.tensor([math.nan, math.inf, -math.inf]), torch.ones(1), None, dtype)
    values = formats.decode(y, FLOATS[dtype])
    assert values[0].isnan() and values[1:].tolist() == expected


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_of_strided_and_empty_inputs(dtype: int) -> None:
    x, scales = torch.randn(5, 4, 3).permute(2, 1, 0), torch.rand(4) + 0.1
    y = quantize(x, scales, None, dtype)
    assert torch.equal(y.view(torch.uint8), quantize(x.contiguous(), scales, None, dtype).view(torch.uint8))
    assert y.is_contiguous()
    assert quantize(torch.empty(0, 4), torch.ones(4), None, dtype).shape == (0, 4)
