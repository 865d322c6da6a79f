from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from npu_fusion.kernels.reference._quant import unpack_quant_param
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules import QuantizedConv2d, deploy, empty
from npu_fusion.quantization.qparams import round_to_nearest
from npu_fusion.quantization.scheme import InputScheme, Scheme, WeightScheme

WEIGHTS = WeightScheme("float8_e4m3fn")
SCHEME = Scheme(WEIGHTS, InputScheme("float8_e4m3fn", True, "tensor"))
INPUTS = InputParameters(torch.tensor([0.0101]))


def made(layer: nn.Conv2d) -> QuantizedConv2d:
    weight = round_to_nearest(layer.weight.detach().flatten(1), WEIGHTS)
    deployed = deploy(layer, SCHEME, weight, INPUTS)
    assert isinstance(deployed, QuantizedConv2d)
    return deployed


@pytest.mark.parametrize(
    ("options", "padding"),
    [
        ({"padding": "valid"}, (0, 0)),
        ({"padding": "same"}, (1, 2)),
        ({"padding": "same", "dilation": (3, 2)}, (3, 4)),
        ({"padding": (2, 1)}, (2, 1)),
    ],
)
def test_padding(options: dict[str, Any], padding: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, (3, 5), **options)
    deployed = made(layer)
    assert deployed.padding == padding
    x = torch.randn(2, 4, 11, 12)
    y, exact = deployed(x), layer(x)
    assert y.shape == exact.shape
    assert (y - exact).norm() <= 0.06 * exact.norm()


def test_scale_is_rounded_and_the_bias_derived_of_it() -> None:
    layer = nn.Conv2d(4, 64, 3)
    deployed = made(layer)
    assert deployed.bias is not None
    scale = unpack_quant_param(deployed.scale)[0]
    wanted = INPUTS.scale * round_to_nearest(layer.weight.detach().flatten(1), WEIGHTS).scale
    assert ((scale / wanted - 1).abs() <= 2.0**-11).all()
    assert (scale > wanted).any(), "rounded, not cut off"
    torch.testing.assert_close(deployed.bias * scale, layer.bias.detach(), rtol=1e-6, atol=0)


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"padding is 'same' with kernel_size \(2, 3\); accepted: as much on both"
    ):
        made(nn.Conv2d(4, 6, (2, 3), padding="same"))
    with pytest.raises(ValueError, match="padding_mode is 'reflect'; accepted: 'zeros'"):
        made(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"))
    description = made(nn.Conv2d(4, 6, 3)).describe()
    for changes, message in (
        ({"groups": 3}, "groups is 3 with 4 input and 6 output channels; accepted: a divisor of both"),
        ({"padding": [1]}, r"padding is \[1\]; accepted: two numbers of at least 0"),
        ({"stride": [0, 1]}, r"stride is \[0, 1\]; accepted: two numbers of at least 1"),
        ({"stride": [1, True]}, "accepted: two numbers of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            empty(description | changes)
