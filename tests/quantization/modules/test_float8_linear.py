from __future__ import annotations

import pytest
import torch
from torch import nn

from npu_fusion import formats
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules import Float8DynamicLinear, Float8StaticLinear, deploy
from npu_fusion.quantization.qparams import round_to_nearest
from npu_fusion.quantization.scheme import InputScheme, Scheme, WeightScheme

TYPES = ["hifloat8", "float8_e4m3fn"]


def dynamic(type: str, dtype: torch.dtype) -> Float8DynamicLinear:
    weights = WeightScheme(type)
    layer = nn.Linear(32, 16).to(dtype)
    weight = round_to_nearest(layer.weight.detach(), weights)
    made = deploy(layer, Scheme(weights, InputScheme(type, True, "token")), weight)
    assert isinstance(made, Float8DynamicLinear)
    return made


@pytest.mark.parametrize("type", TYPES)
def test_float32_tokens_are_rounded_to_bfloat16_first(type: str) -> None:
    made = dynamic(type, torch.float32)
    x = torch.randn(9, 32)
    assert not torch.equal(x, x.bfloat16().float())
    assert torch.equal(made(x), made(x.bfloat16().float()))
    assert made(x).dtype == torch.float32


def test_tokens_are_brought_to_the_range_in_which_hifloat8_has_most_digits() -> None:
    """15 has four significant bits; at 32768 there are two, so the error would be four times as large."""
    made = dynamic("hifloat8", torch.bfloat16)
    made.weight.copy_(formats.encode(torch.eye(16, 32), "hifloat8"))
    made.weight_scale.fill_(1)
    made.bias.zero_()
    x = torch.linspace(0.51, 1, 32).repeat(4, 1).bfloat16()
    error = (made(x).double() - x[:, :16].double()).abs() / x[:, :16].double()
    assert error.max() <= 2.0**-4
    assert error.max() > 2.0**-6


@pytest.mark.parametrize("type", TYPES)
def test_a_static_scale_and_bias_are_not_cut_off(type: str) -> None:
    """As they would be in the packed form of the scale: a gain of up to 2^-10."""
    weights = WeightScheme(type)
    layer = nn.Linear(32, 16)
    scale = torch.tensor([1 + 2.0**-11 + 2.0**-20])
    codes = round_to_nearest(layer.weight.detach(), weights)
    made = deploy(layer, Scheme(weights, InputScheme(type, True, "tensor")), codes, InputParameters(scale))
    assert isinstance(made, Float8StaticLinear)
    x = scale * torch.arange(32.0).remainder(8).expand(3, 32)
    exact = x.double() @ codes.dequantize().double().T + layer.bias.double()
    torch.testing.assert_close(made(x).double(), exact.detach(), rtol=1e-6, atol=1e-6)
    assert made.input_scale is scale
    assert made.pertoken_scale is scale
