from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npu_fusion import formats
from npu_fusion.quantization.inner_scale import LARGEST, nearest_inner_scale

NUMBERS = formats.decode(torch.arange(16, dtype=torch.uint8), "float4_e2m1")
EXACT = sorted(
    {mantissa * 2.0**exponent for mantissa in (1, 1.25, 1.5) for exponent in range(-6, 6)} | {64.0}
)


def test_products_are_float8_numbers() -> None:
    for scale in EXACT:
        products = scale * NUMBERS
        assert torch.equal(products.to(torch.float8_e4m3fn).float(), products)
        assert nearest_inner_scale(torch.tensor(scale)).item() == scale
    assert max(EXACT) * 6 == LARGEST


def test_there_are_no_others_between() -> None:
    for low, high in itertools.pairwise(EXACT):
        for step in range(1, 16):
            scale = low + (high - low) * step / 16
            products = scale * NUMBERS
            assert not torch.equal(products.to(torch.float8_e4m3fn).float(), products)


@settings(max_examples=200, deadline=None)
@given(st.floats(2.0**-20, 2.0**10, width=32))
def test_it_is_the_nearest(scale: float) -> None:
    found = nearest_inner_scale(torch.tensor([scale])).item()
    assert found in EXACT
    assert abs(found - scale) == min(abs(other - scale) for other in EXACT)
