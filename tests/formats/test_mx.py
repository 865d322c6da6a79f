from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from npu_fusion import _compat, formats
from npu_fusion.formats import mx

ELEMENTS = ["float8_e4m3fn", "float8_e5m2", "float4_e2m1", "float4_e1m2"]
EXPONENTS = {"float8_e4m3fn": 8, "float8_e5m2": 15, "float4_e2m1": 2, "float4_e1m2": 0}
# Half a step of the significand below 2.
BELOW_TWO = {"float8_e4m3fn": 1.9375, "float8_e5m2": 1.875, "float4_e2m1": 1.75, "float4_e1m2": 1.875}
POSITIVE = st.floats(0, allow_infinity=False, width=32, exclude_min=True)


def by_search(amax: float, fits: object) -> int:
    """The smallest exponent from -127 to 127 for which ``fits(amax / 2^exponent)``."""
    for exponent in range(-127, 128):
        if fits(Fraction(amax) / Fraction(2) ** exponent):  # type: ignore[operator]
            return exponent
    return 127


def expected(amax: float, element: str, mode: str) -> int:
    binade = Fraction(2) ** EXPONENTS[element]
    limits = {
        "floor": lambda x: x < 2 * binade,
        "even": lambda x: x <= binade * Fraction(BELOW_TWO[element]),
        "ceil": lambda x: x <= binade,
        "rceil": lambda x: x <= Fraction(formats.MAXIMUM[element]),
    }
    return by_search(amax, limits[mode])


@pytest.mark.parametrize("mode", mx.MODES)
@pytest.mark.parametrize("element", ELEMENTS)
@settings(deadline=None, max_examples=50)
@given(amax=POSITIVE)
@example(2.0**-149)
@example(2.0**-127)
@example(1.5 * 2.0**-127)
@example(2.0**-126)
@example(3.4028234663852886e38)
@example(1.0)
@example(1.0000001192092896)
@example(1.5)
@example(1.75)
@example(1.7500001192092896)
@example(1.875)
@example(1.9375)
@example(1.9999998807907104)
def test_each_mode_by_search(element: str, mode: str, amax: float) -> None:
    given_ = mx.shared_exponent(torch.tensor(amax), element, mode)
    assert given_.dtype == torch.int32
    assert given_.item() == expected(amax, element, mode)


@settings(deadline=None)
@given(amax=POSITIVE)
def test_rceil_never_saturates_and_floor_never_wastes_a_bit(amax: float) -> None:
    for element in ELEMENTS:
        largest = formats.MAXIMUM[element]
        high = mx.shared_exponent(torch.tensor(amax), element, "rceil").item()
        low = mx.shared_exponent(torch.tensor(amax), element, "floor").item()
        assert Fraction(amax) <= Fraction(largest) * Fraction(2) ** high or high == 127
        assert low in (high, high - 1)


def test_the_defaults() -> None:
    """8 bits: floor, which is that of the specification; 4 bits: even."""
    amax = torch.tensor([1.0, 1.5, 1.76, 1.95, 2.0])
    for element, mode in zip(ELEMENTS, ["floor", "floor", "even", "even"], strict=True):
        assert torch.equal(mx.shared_exponent(amax, element), mx.shared_exponent(amax, element, mode))
    for name, element in mx.ELEMENT.items():
        assert torch.equal(mx.shared_exponent(amax, name), mx.shared_exponent(amax, element))
    assert mx.shared_exponent(amax, "mxfp8_e4m3fn").tolist() == [-8, -8, -8, -8, -7]
    assert mx.shared_exponent(amax, "mxfp4_e2m1").tolist() == [-2, -2, -1, -1, -1]


def test_a_mantissa_of_exactly_the_threshold_is_not_raised() -> None:
    assert mx.shared_exponent(torch.tensor([7.0, 7.0000005]), "float4_e2m1", "even").tolist() == [0, 1]
    assert mx.shared_exponent(torch.tensor([6.0, 6.0000005]), "float4_e2m1", "rceil").tolist() == [0, 1]


@pytest.mark.parametrize("mode", mx.MODES)
def test_zeros_and_what_is_not_finite(mode: str) -> None:
    amax = torch.tensor([0.0, -0.0, math.inf, math.nan])
    exponent = mx.shared_exponent(amax, "float8_e4m3fn", mode)
    assert exponent.tolist() == [-127, -127, mx.NAN_EXPONENT, mx.NAN_EXPONENT]
    assert mx.e8m0(exponent).view(torch.uint8).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_amax(dtype: torch.dtype) -> None:
    """All of them, denormals included, have the exponents of the same numbers in float32."""
    amax = torch.arange(1 << 15).to(torch.int16).view(dtype)
    for mode in mx.MODES:
        given_ = mx.shared_exponent(amax, "float4_e2m1", mode)
        assert torch.equal(given_, mx.shared_exponent(amax.float(), "float4_e2m1", mode))


def test_every_scale() -> None:
    exponent = torch.arange(-127, 129, dtype=torch.int32)
    scale = mx.e8m0(exponent)
    assert scale.dtype == (_compat.E8M0 or torch.uint8)
    assert scale.view(torch.uint8).tolist() == list(range(256))
    assert torch.equal(mx.exponent_of(scale), exponent)
    assert torch.equal(mx.exponent_of(scale.view(torch.uint8)), exponent)


@pytest.mark.skipif(_compat.E8M0 is None, reason="torch has no e8m0 dtype")
def test_a_scale_is_its_power_of_two() -> None:
    exponent = torch.arange(-127, 128, dtype=torch.int32)
    assert torch.equal(mx.e8m0(exponent).float().double(), torch.exp2(exponent.double()))


def test_every_scale_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    numbers = np.arange(255, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    exponents = mx.exponent_of(torch.arange(255, dtype=torch.uint8))
    np.testing.assert_array_equal(np.exp2(exponents.double().numpy()), numbers)


def test_without_the_dtype_scales_are_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "E8M0", None)
    scale = mx.e8m0(torch.tensor([-127, 0, 128], dtype=torch.int32))
    assert (scale.dtype, scale.tolist()) == (torch.uint8, [0, 127, 255])
    assert mx.exponent_of(scale).tolist() == [-127, 0, 128]


def test_a_compiled_graph_computes_the_same() -> None:
    def exponents(amax: Tensor) -> Tensor:
        return mx.exponent_of(mx.e8m0(mx.shared_exponent(amax, "float4_e2m1")))

    amax = torch.arange(1 << 15).to(torch.int16).view(torch.bfloat16)
    compiled = torch.compile(exponents, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(amax), exponents(amax))


def test_refusals() -> None:
    amax = torch.ones(2)
    with pytest.raises(ValueError, match="shared_exponent: element is 'hifloat8'; accepted: float8_e4m3fn,"):
        mx.shared_exponent(amax, "hifloat8")
    with pytest.raises(
        ValueError, match="shared_exponent: mode is 'round'; accepted: floor, even, ceil, rceil"
    ):
        mx.shared_exponent(amax, "float8_e4m3fn", "round")
    with pytest.raises(TypeError, match="shared_exponent: x is torch.float64; accepted: torch.float16"):
        mx.shared_exponent(amax.double(), "float8_e4m3fn")
    with pytest.raises(
        TypeError, match="exponent_of: scale is torch.float32; accepted: torch.float8_e8m0fnu"
    ):
        mx.exponent_of(amax)
