from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from npu_fusion import formats
from npu_fusion.quantization.modules import MXLinear, deploy
from npu_fusion.quantization.qparams import round_to_nearest
from npu_fusion.quantization.scheme import InputScheme, Scheme, WeightScheme

INPUTS = InputScheme("mxfp8_e4m3fn", True, "group")


def made(type: str, inputs: int = 96, dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> MXLinear:
    weights = WeightScheme(type, True, "group", 32)
    layer = nn.Linear(inputs, 16, bias=bias).to(dtype)
    weight = round_to_nearest(layer.weight.detach().float(), weights)
    deployed = deploy(layer, Scheme(weights, INPUTS), weight)
    assert isinstance(deployed, MXLinear)
    return deployed


@pytest.mark.parametrize(
    ("type", "weight", "bias"),
    [
        ("mxfp8_e4m3fn", (torch.float8_e4m3fn, [16, 96]), torch.float32),
        ("mxfp4_e2m1", (torch.uint8, [16, 48]), torch.bfloat16),
    ],
)
def test_layouts(type: str, weight: Any, bias: torch.dtype) -> None:
    layer = made(type)
    assert (layer.weight.dtype, [*layer.weight.shape]) == weight
    assert layer.bias is not None
    assert layer.bias.dtype == bias
    # Three blocks in two pairs, the last one empty.
    assert [*layer.weight_scale.shape] == [16, 2, 2]
    assert not layer.weight_scale[:, 1, 1].any()
    blocks = layer.weight_scale.flatten(1)[:, :3]
    assert torch.equal(torch.exp2(blocks.float() - 127), layer.quantized_weight().scale)


def test_two_numbers_in_a_byte() -> None:
    layer = made("mxfp4_e2m1")
    assert torch.equal(layer.quantized_weight().codes, formats.unpack_nibbles(layer.weight))
    assert torch.equal(layer.weight & 15, layer.quantized_weight().codes[:, 0::2])


@pytest.mark.parametrize("type", ["mxfp8_e4m3fn", "mxfp4_e2m1"])
@pytest.mark.parametrize("inputs", [8, 40, 64, 72])
def test_a_last_block_that_is_not_full(type: str, inputs: int) -> None:
    layer = made(type, inputs, bias=False)
    x = torch.randint(-4, 5, (5, inputs)).bfloat16()  # exact in mxfp8
    exact = x.double() @ layer.quantized_weight().dequantize().double().T
    torch.testing.assert_close(layer(x).double(), exact, rtol=2.0**-8, atol=1e-5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="MXLinear: dtype is float32; accepted: float16, bfloat16"):
        made("mxfp8_e4m3fn", dtype=torch.float32)
    with pytest.raises(ValueError, match="in_features is 36 with mxfp4 weights; accepted: a multiple of 8"):
        made("mxfp4_e2m1", 36)
