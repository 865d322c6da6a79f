from __future__ import annotations

import math

import pytest
import torch

from npu_fusion.kernels.reference._mx import dequantize_mx, quantize_mx


def block(*first: float) -> torch.Tensor:
    return torch.tensor([*first, *[0.0] * (32 - len(first))])


@pytest.mark.parametrize(
    ("largest", "scale"),
    [
        (448.0, 1.0),
        (256.0, 1.0),
        (255.0, 0.5),
        (1.0, 2.0**-8),
        (1.99, 2.0**-8),
        (2.0, 2.0**-7),
        (2.0**100, 2.0**92),
    ],
)
def test_the_scale_is_the_power_of_two_of_the_largest_element(largest: float, scale: float) -> None:
    data, given = quantize_mx(block(-largest, largest / 2))
    assert given.float().tolist() == [scale]
    values = dequantize_mx(data, given)
    limit = 448 * scale
    torch.testing.assert_close(values, block(-largest, largest / 2).clamp(min=-limit), rtol=2.0**-4, atol=0)


def test_elements_above_448_saturate() -> None:
    data, scale = quantize_mx(block(511.0, 464.5, 463.0, -500.0))
    assert scale.float().item() == 1.0
    assert data.float()[:4].tolist() == [448.0, 448.0, 448.0, -448.0]


def test_elements_are_rounded_half_to_even() -> None:
    """With scale 1 the neighbours of 17 and 19 are 16, 18, 20."""
    data, scale = quantize_mx(block(256.0, 17.0, 19.0, 17.5))
    assert scale.float().item() == 1.0
    assert data.float()[:4].tolist() == [256.0, 16.0, 20.0, 18.0]


def test_each_block_has_its_scale() -> None:
    data, scale = quantize_mx(torch.cat([block(256.0), block(), block(0.5)]).repeat(2, 1))
    assert scale.float().tolist() == [[1.0, 2.0**-127, 2.0**-9]] * 2
    assert dequantize_mx(data, scale)[:, [0, 32, 64]].tolist() == [[256.0, 0.0, 0.5]] * 2


def test_extremes() -> None:
    """Denormals have the smallest scale; infinity and NaN make the scale NaN and the elements 0."""
    data, scale = quantize_mx(torch.stack([block(2.0**-126), block(2.0**-149)]))
    assert scale.view(torch.uint8).tolist() == [[0], [0]]
    assert data.float()[:, 0].tolist() == [2.0, 0.0]
    for value in (math.inf, math.nan):
        data, scale = quantize_mx(torch.cat([block(3.0, value), block(256.0)]))
        assert scale.view(torch.uint8).tolist() == [255, 127]
        assert data.float().nonzero().tolist() == [[32]] and data[32] == 256.0


def test_no_rows() -> None:
    data, scale = quantize_mx(torch.empty(0, 64))
    assert (data.shape, scale.shape) == ((0, 64), (0, 2))
    assert dequantize_mx(data, scale).shape == (0, 64)
