from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npu_fusion import formats
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.qparams import (
    all_parameters,
    encode_weight,
    input_parameters,
    integer_parameters,
    quantize_dequantize,
    round_to_nearest,
    weight_parameters,
    weight_range,
)
from npu_fusion.quantization.scheme import WEIGHT_TYPES, InputScheme, WeightScheme
from npu_fusion.quantization.statistics import RANGE, Statistics

FLOAT_TYPES = [name for name in WEIGHT_TYPES if not name.startswith("int")]


def scheme_for(name: str, symmetric: bool = True) -> WeightScheme:
    if name.startswith("mx"):
        return WeightScheme(name, strategy="group", group_size=32)
    return WeightScheme(name, symmetric)


def numbers_of(name: str) -> Tensor:
    """All finite numbers of a type."""
    if name.startswith("int"):
        half = 128 if name == "int8" else 8
        return torch.arange(-half, half).float()
    codes = torch.arange(256, dtype=torch.uint8)
    if name.endswith("e4m3fn"):
        codes = codes.view(torch.float8_e4m3fn)
    elif "float4" in name or "fp4" in name:
        codes = codes[:16]
    decoded = formats.decode(codes, name)
    return decoded[decoded.isfinite()].unique()


# --- integers ---


@pytest.mark.parametrize(
    ("low", "high", "bits", "scale"),
    [
        (-1.0, 2.0, 8, 2 / 127),
        (-2.0, 2.0, 8, 2 / 127),
        (-2.0, 1.0, 8, 2 / 128),
        (-3.0, -1.0, 8, 3 / 128),
        (1.0, 3.0, 8, 3 / 127),
        (-1.0, 2.0, 4, 2 / 7),
        (-2.0, 1.0, 4, 2 / 8),
        (-2.0, 1.0, 3, 2 / 4),
        (0.0, 0.0, 8, 1.0),
        (-1e-6, 1e-6, 8, 1.0),
    ],
)
def test_symmetric_integers(low: float, high: float, bits: int, scale: float) -> None:
    got, offset = integer_parameters(torch.tensor([low]), torch.tensor([high]), bits, symmetric=True)
    assert offset is None
    assert got.dtype == torch.float32
    assert got.item() == torch.tensor(scale).item()


@pytest.mark.parametrize(
    ("low", "high", "bits", "scale", "offset"),
    [
        (-1.0, 2.0, 8, 3 / 255, -128 + 85),
        (-5.0, -1.0, 8, 5 / 255, 127),
        (1.0, 5.0, 8, 5 / 255, -128),
        (-1.0, 2.0, 4, 3 / 15, -8 + 5),
        (-1.0, 2.0, 2, 3 / 3, -2 + 1),
        (0.0, 0.0, 8, 1.0, -128),
        (0.0, 0.0, 4, 1.0, -8),
    ],
)
def test_asymmetric_integers(low: float, high: float, bits: int, scale: float, offset: int) -> None:
    got, zero = integer_parameters(torch.tensor([low]), torch.tensor([high]), bits, symmetric=False)
    assert zero is not None
    assert zero.dtype == torch.int32
    assert (got.item(), zero.item()) == (torch.tensor(scale).item(), offset)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("extreme", [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38])
def test_extreme_ranges_give_finite_parameters(extreme: float, symmetric: bool) -> None:
    x = torch.tensor([extreme])
    scale, offset = integer_parameters(x, x, 8, symmetric)
    assert scale.isfinite().all() and (scale > 0).all()
    assert (scale * (128 if symmetric else 255)).isfinite().all()
    assert offset is None or -128 <= offset.item() <= 127


ROWS = st.lists(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=5, max_size=5), min_size=1, max_size=4
).map(torch.tensor)


@settings(max_examples=100, deadline=None)
@given(
    ROWS, st.sampled_from(["int8", "int4"]), st.booleans(), st.sampled_from(["tensor", "channel", "group"])
)
def test_integers_are_off_by_half_a_step(weight: Tensor, name: str, symmetric: bool, strategy: str) -> None:
    weight = weight.float()
    scheme = WeightScheme(name, symmetric, strategy, 3 if strategy == "group" else None)
    quantized = round_to_nearest(weight, scheme)
    limit = 128 if name == "int8" else 8
    assert quantized.codes.dtype == torch.int8
    assert quantized.codes.min().item() >= -limit and quantized.codes.max().item() < limit
    value = quantized.dequantize()
    assert value.isfinite().all()
    step = quantized.spread(quantized.scale).double().expand_as(weight)
    error = (value.double() - weight.double()).abs()
    # 1e-5: the quotient of up to 255 steps is fp32. Where the scale comes from a negative value, a positive
    # one between 127 and 128 steps saturates.
    saturated = symmetric & (weight.double() > (limit - 0.5) * step * (1 - 1e-6))
    assert (error <= torch.where(saturated, 1.0, 0.5) * step * (1 + 1e-5)).all()
    zero_rows = weight.abs().amax(1) == 0
    assert (value[zero_rows] == 0).all()


def test_the_offset_is_added_before_rounding() -> None:
    weight = torch.tensor([[0.5, 1.5, -0.5, -2.5]])
    scale, offset = torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32)
    quantized = encode_weight(weight, WeightScheme("int8", False, "tensor"), scale, offset)
    # Half to even of 1.5, 2.5, 0.5 and -1.5. The weights rounded alone, and then the offset: 1, 3, 1, -1.
    assert quantized.codes.tolist() == [[2, 2, 0, -2]]


# --- floats ---


@pytest.mark.parametrize(
    ("name", "scope"), [("float8_e4m3fn", 448), ("hifloat8", 16), ("float4_e2m1", 6), ("float4_e1m2", 1.75)]
)
def test_float_scales_bring_the_largest_magnitude_to_the_scope(name: str, scope: float) -> None:
    weight = torch.tensor([[1.0, -3.0, 0.5], [0.25, 0.125, 0.0], [-2.0, -1.0, -4.0], [0.0, 0.0, 0.0]])
    scale, offset = weight_parameters(weight, WeightScheme(name))
    assert offset is None
    assert scale.tolist() == torch.tensor([3 / scope, 0.25 / scope, 4 / scope, 1.0]).tolist()
    # A row of negative values only is where a signed maximum would fail.
    assert (round_to_nearest(weight, WeightScheme(name)).dequantize()[2] < 0).all()


@pytest.mark.parametrize("name", FLOAT_TYPES)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 30), st.lists(st.integers(-60, 60), min_size=1, max_size=3), st.floats(0, 4))
def test_float_codes_are_the_nearest_numbers(
    name: str, seed: int, exponents: list[int], spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(exponents), 40, generator=generator)
    weight = weight * weight.abs() ** spread * torch.exp2(torch.tensor(exponents).unsqueeze(1))
    quantized = round_to_nearest(weight, scheme_for(name))
    assert quantized.dequantize().isfinite().all()
    quotient = weight.double() / quantized.spread(quantized.scale).double()
    distance = (quotient.unsqueeze(-1) - numbers_of(name).double()).abs().amin(-1)
    error = (quantized.numbers().double() - quotient).abs()
    # The quotient is fp32: at a midpoint it may be on either side.
    assert (error <= distance + quotient.abs() * 1e-6).all()


@pytest.mark.parametrize("name", WEIGHT_TYPES)
def test_rounding_again_changes_nothing(name: str) -> None:
    weight = torch.randn(9, 70, generator=torch.Generator().manual_seed(1))
    once = round_to_nearest(weight, scheme_for(name))
    again = encode_weight(once.dequantize(), once.scheme, once.scale, once.offset)
    assert torch.equal(again.dequantize(), once.dequantize())


def test_mx_scales_are_shared_powers_of_two() -> None:
    weight = torch.zeros(1, 96)
    weight[0, 3] = -7.0  # 1.75 * 4: not above 1.75
    weight[0, 40] = 7.01
    scale, _ = weight_parameters(weight, scheme_for("mxfp4_e2m1"))
    assert scale.tolist() == [[1.0, 2.0, 1.0]]
    scale, _ = weight_parameters(weight, scheme_for("mxfp8_e4m3fn"))
    assert scale.tolist() == [[2.0**-6, 2.0**-6, 1.0]]


def test_two_levels() -> None:
    weight = torch.randn(5, 80, generator=torch.Generator().manual_seed(2))
    weight[1] *= 1000
    weight[2] = 0
    scheme = WeightScheme("float4_e2m1", strategy="group", group_size=32)
    quantized = round_to_nearest(weight, scheme, InputScheme("float8_e4m3fn"))
    assert quantized.channel_scale is not None
    assert quantized.scale.shape == (5, 3)
    largest = weight.abs().amax(1)
    torch.testing.assert_close(quantized.channel_scale, torch.where(largest > 0, largest / 384, 1.0))
    # What is multiplied in float8_e4m3fn is there without rounding.
    inner = quantized.numbers() * quantized.spread(quantized.scale)
    assert torch.equal(inner.to(torch.float8_e4m3fn).float(), inner)
    one_level = round_to_nearest(weight, scheme, InputScheme("hifloat8"))
    assert one_level.channel_scale is None
    error, least = ((q.dequantize() - weight).norm(dim=1) for q in (quantized, one_level))
    assert (error <= 1.15 * least).all()
    assert (quantized.dequantize()[2] == 0).all()


# --- granularity ---


def test_granularity() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0, -5.0], [-6.0, 1.0, 1.0, 0.0, 0.5]])
    ranges = {
        ("tensor", None): ([-6.0], [4.0]),
        ("channel", None): ([-5.0, -6.0], [4.0, 1.0]),
        ("group", 2): ([[-2.0, 3.0, -5.0], [-6.0, 0.0, 0.0]], [[1.0, 4.0, 0.0], [1.0, 1.0, 0.5]]),
    }
    for (strategy, size), (low, high) in ranges.items():
        scheme = WeightScheme("int8", True, strategy, size)
        assert [extreme.tolist() for extreme in weight_range(weight, scheme)] == [low, high]
        assert weight_parameters(weight, scheme)[0].shape == torch.tensor(low).shape


def test_other_dtypes_are_computed_in_fp32() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale, _ = weight_parameters(weight, WeightScheme("int8"))
    assert torch.equal(scale, weight_parameters(weight.float(), WeightScheme("int8"))[0])


def test_fewer_bits() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    three = round_to_nearest(weight, WeightScheme("int4"), bits=3)
    assert (three.codes.min().item(), three.codes.max().item()) == (-4, 3)
    parameters = all_parameters(weight, WeightScheme("int4"), bits=3)
    assert torch.equal(parameters[0], three.scale)


# --- inputs ---


def seen(x: Tensor) -> Statistics:
    statistics = Statistics(x.size(1), {RANGE}, torch.device("cpu"))
    statistics.update(x)
    return statistics


def test_input_parameters() -> None:
    statistics = seen(torch.tensor([[1.0, -4.0], [2.0, 3.0]]))
    expected = [
        (InputScheme("int8"), 4 / 128, None),
        (InputScheme("int8", symmetric=False), 7 / 255, round(-128 + 4 * 255 / 7)),
        (InputScheme("float8_e4m3fn"), 4 / 448, None),
        (InputScheme("hifloat8"), 4 / 16, None),
    ]
    for scheme, scale, offset in expected:
        got = input_parameters(statistics, scheme)
        assert got.scale.tolist() == torch.tensor([scale]).tolist()
        assert (got.offset.tolist() if got.offset is not None else None) == ([offset] if offset else None)


def test_the_range_of_a_smoothed_input_is_per_channel() -> None:
    x = torch.tensor([[100.0, -1.0], [-60.0, 3.0]])
    smooth = torch.tensor([0.01, 0.5])
    for scheme in (InputScheme("int8", symmetric=False), InputScheme("float8_e4m3fn")):
        smoothed = input_parameters(seen(x), scheme, smooth)
        direct = input_parameters(seen(x * smooth), scheme)
        torch.testing.assert_close(smoothed.scale, direct.scale)
        if smoothed.offset is not None and direct.offset is not None:
            assert torch.equal(smoothed.offset, direct.offset)
        assert (smoothed.offset is None) == (direct.offset is None) == scheme.symmetric


@pytest.mark.parametrize("symmetric", [True, False])
def test_channels_without_a_finite_range_do_not_count(symmetric: bool) -> None:
    scheme = InputScheme("int8", symmetric)
    x = torch.tensor([[1.0, -4.0, 0.0, 9.0], [2.0, 3.0, math.inf, math.nan]])
    got, expected = input_parameters(seen(x), scheme), input_parameters(seen(x[:, :2]), scheme)
    assert torch.equal(got.scale, expected.scale)
    never = input_parameters(Statistics(4, {RANGE}, torch.device("cpu")), scheme)
    assert never.scale.tolist() == [1.0]


def test_dynamic_inputs_have_no_calibrated_parameters() -> None:
    with pytest.raises(ValueError, match="inputs.strategy is 'token'; accepted: 'tensor'"):
        input_parameters(seen(torch.ones(1, 2)), InputScheme("int8", strategy="token"))


@pytest.mark.parametrize(
    ("name", "offset"), [("int8", None), ("int8", 17), ("hifloat8", None), ("float8_e4m3fn", None)]
)
def test_quantize_dequantize_takes_the_nearest_level(name: str, offset: int | None) -> None:
    x = 3 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    parameters = InputParameters(
        torch.tensor([0.03]), None if offset is None else torch.tensor([offset], dtype=torch.int32)
    )
    levels = (numbers_of(name).double() - (offset or 0)) * parameters.scale.double()
    distance = (x.double().unsqueeze(-1) - levels).abs().amin(-1)
    error = (quantize_dequantize(x, name, parameters).double() - x.double()).abs()
    torch.testing.assert_close(error, distance, rtol=0, atol=1e-5)


# --- errors ---


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (WeightScheme("int3"), "weights.type is 'int3'; accepted: hifloat8"),
        (WeightScheme("int8", strategy="token"), "weights.strategy is 'token'; accepted: tensor"),
        (WeightScheme("int8", strategy="group"), "weights.group_size is None with strategy 'group'"),
        (WeightScheme("int8", strategy="group", group_size=0), "weights.group_size is 0"),
        (WeightScheme("int8", group_size=32), "weights.group_size is 32 with strategy 'channel'"),
        (WeightScheme("mxfp4_e2m1"), "weights.group_size is None for mxfp4_e2m1; accepted: 32"),
        (WeightScheme("mxfp4_e2m1", strategy="group", group_size=64), "weights.group_size is 64 for mxfp4"),
        (WeightScheme("hifloat8", symmetric=False), "weights.symmetric is False for hifloat8"),
    ],
)
def test_schemes_that_are_none(scheme: WeightScheme, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        round_to_nearest(torch.ones(2, 64), scheme)


def test_weights_that_are_none() -> None:
    for shape in ((4,), (0, 4), (4, 0), (2, 2, 2)):
        with pytest.raises(ValueError, match="weight has shape"):
            round_to_nearest(torch.ones(shape), WeightScheme("int8"))
    for bad in (math.nan, math.inf, -math.inf):
        weight = torch.ones(3, 4)
        weight[1, 2] = bad
        for strategy, size in (("tensor", None), ("channel", None), ("group", 2)):
            with pytest.raises(ValueError, match="weight has infinities or NaN"):
                round_to_nearest(weight, WeightScheme("int8", True, strategy, size))
