from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from npu_fusion.kernels.reference._quant import unpack_quant_param
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules import Float8Float4Linear, deploy
from npu_fusion.quantization.qparams import round_to_nearest
from npu_fusion.quantization.scheme import InputScheme, Scheme, WeightScheme

WEIGHTS = WeightScheme("float4_e2m1", True, "group", 32)
SCHEME = Scheme(WEIGHTS, InputScheme("float8_e4m3fn", True, "tensor"))
LAYER = nn.Linear(64, 16, bias=False).bfloat16()
GIVEN = round_to_nearest(LAYER.weight.detach().float(), WEIGHTS, SCHEME.inputs)
INPUTS = InputParameters(torch.tensor([0.013]))


def test_the_outer_scale_is_the_nearest_that_the_operator_reads() -> None:
    made = deploy(LAYER, SCHEME, GIVEN, INPUTS)
    assert isinstance(made, Float8Float4Linear)
    assert GIVEN.channel_scale is not None
    wanted = INPUTS.scale * GIVEN.channel_scale
    packed = unpack_quant_param(made.y_scale)[0]
    error = (packed / wanted - 1).abs()
    assert error.max() <= 2.0**-11
    assert (packed > wanted).any(), "rounded, not cut off"
    torch.testing.assert_close(made.quantized_weight().channel_scale, packed / 0.013, rtol=1e-6, atol=0)


def refuse(message: str, layer: nn.Linear = LAYER, **changes: Any) -> None:
    arguments: dict[str, Any] = {"scheme": SCHEME, "weight": GIVEN, "inputs": INPUTS}
    with pytest.raises(ValueError, match=message):
        deploy(layer, **(arguments | changes))


def test_refusals() -> None:
    refuse("layer has a bias; accepted: none with float4_e2m1 weights", nn.Linear(64, 16).bfloat16())
    refuse("weight.channel_scale is None", weight=replace(GIVEN, channel_scale=None))
    message = "weight.scale has numbers with which the operator rounds weights to float8_e4m3fn"
    refuse(message, weight=replace(GIVEN, scale=torch.full_like(GIVEN.scale, 1.75)))
    refuse(message, weight=replace(GIVEN, scale=torch.full_like(GIVEN.scale, 128.0)))
    refuse("dtype is float32; accepted: float16, bfloat16", nn.Linear(64, 16, bias=False))
    narrow = nn.Linear(48, 16, bias=False).bfloat16()
    given = round_to_nearest(narrow.weight.detach().float(), WEIGHTS, SCHEME.inputs)
    refuse("in_features is 48; accepted: a multiple of 32", narrow, weight=given)


@pytest.mark.parametrize(("columns", "size"), [(128, 64), (96, 64), (256, 96)])
def test_larger_groups_repeat_their_scale(columns: int, size: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(columns, 16, bias=False).bfloat16()
    scheme = replace(SCHEME, weights=replace(WEIGHTS, group_size=size))
    given = round_to_nearest(layer.weight.detach().float(), scheme.weights, scheme.inputs)
    assert given.scale.shape == (16, -(-columns // size)), "the last group may be smaller"
    made = deploy(layer, scheme, given, INPUTS)
    assert made.weight_scale.shape == (16, columns // 32)
    back = made.quantized_weight()
    assert torch.equal(back.scale, given.scale) and torch.equal(back.codes, given.codes)
    x = torch.randn(5, columns).bfloat16()
    q = (x.float() / INPUTS.scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * INPUTS.scale.double()
    expected = q @ back.dequantize().double().t()
    assert (made(x).double() - expected).abs().max() <= 2**-8 * expected.abs().max()
