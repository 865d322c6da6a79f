from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_fusion import formats
from npu_fusion.quantization.modules import WeightOnlyLinear, deploy
from npu_fusion.quantization.qparams import round_to_nearest
from npu_fusion.quantization.scheme import Scheme, WeightScheme

K, N = 96, 16


def made(type: str, dtype: torch.dtype = torch.bfloat16, **scheme: Any) -> WeightOnlyLinear:
    weights = WeightScheme(type, **scheme)
    torch.manual_seed(0)
    layer = nn.Linear(K, N).to(dtype)
    weight = round_to_nearest(layer.weight.detach(), weights)
    deployed = deploy(layer, Scheme(weights), weight)
    assert isinstance(deployed, WeightOnlyLinear)
    return deployed


GROUPS: dict[str, Any] = {"strategy": "group", "group_size": 64}


@pytest.mark.parametrize(
    ("layer", "weight", "scale", "bias"),
    [
        (made("int8"), (torch.int8, [K, N]), (torch.bfloat16, [N]), torch.float32),
        (made("int8", torch.float16), (torch.int8, [K, N]), (torch.float16, [N]), torch.float16),
        (made("int8", strategy="tensor"), (torch.int8, [K, N]), (torch.bfloat16, [N]), torch.float32),
        (made("int8", **GROUPS), (torch.int8, [K, N]), (torch.bfloat16, [2, N]), torch.float32),
        (made("int4", **GROUPS), (torch.int32, [K, N // 8]), (torch.bfloat16, [2, N]), torch.float32),
        (made("int4", torch.float32), (torch.int32, [K, N // 8]), (torch.float32, [N]), torch.float32),
        (made("float8_e4m3fn"), (torch.float8_e4m3fn, [K, N]), (torch.bfloat16, [N]), torch.bfloat16),
        (made("hifloat8"), (torch.uint8, [K, N]), (torch.bfloat16, [N]), torch.bfloat16),
        (made("float4_e2m1", **GROUPS), (torch.int32, [K, N // 8]), (torch.bfloat16, [2, N]), torch.bfloat16),
        (made("float4_e1m2", **GROUPS), (torch.uint8, [K, N // 2]), (torch.bfloat16, [2, N]), torch.bfloat16),
        (
            made("mxfp4_e2m1", strategy="group", group_size=32),
            (torch.int32, [K, N // 8]),
            (torch.uint8, [3, N]),
            torch.bfloat16,
        ),
    ],
    ids=lambda value: str(value.scheme.weights.type) if isinstance(value, WeightOnlyLinear) else "",
)
def test_layouts(layer: WeightOnlyLinear, weight: Any, scale: Any, bias: torch.dtype) -> None:
    assert (layer.weight.dtype, [*layer.weight.shape]) == weight
    assert (layer.antiquant_scale.dtype, [*layer.antiquant_scale.shape]) == scale
    assert layer.bias is not None
    assert layer.bias.dtype == bias
    assert all(t.is_contiguous() for t in layer.buffers())


def nibbles(packed: Tensor, per_element: int) -> list[list[int]]:
    """Codes of each row, by Python's own integers."""
    rows = packed.view(torch.uint8).reshape(packed.size(0), -1).tolist()
    return [[half for byte in row for half in (byte & 15, byte >> 4)] for row in rows]


@pytest.mark.parametrize("type", ["int4", "float4_e2m1", "float4_e1m2"])
def test_codes_lie_along_the_outputs_lowest_first(type: str) -> None:
    layer = made(type, **GROUPS)
    codes = layer.quantized_weight().codes
    assert nibbles(layer.weight, 0) == [[c & 15 for c in row] for row in codes.t().tolist()]


def test_zero_points_are_added_negated() -> None:
    layer = made("int8", symmetric=False)
    offset = layer.quantized_weight().offset
    assert layer.antiquant_offset is not None
    assert offset is not None
    assert offset.any()
    assert torch.equal(layer.antiquant_offset.float(), -offset.float())


def test_mxfp4_scales_are_exponents() -> None:
    layer = made("mxfp4_e2m1", strategy="group", group_size=32)
    exponents = layer.antiquant_scale.t().to(torch.int32) - 127
    assert torch.equal(torch.exp2(exponents.float()), layer.quantized_weight().scale)
    weight = nn.Linear(K, N).weight
    blocks = round_to_nearest(weight.detach(), layer.scheme.weights).numbers().unflatten(1, (-1, 32))
    assert blocks.abs().amax() <= formats.MAXIMUM["float4_e2m1"]


def test_float32_is_plain_operators() -> None:
    layer = made("int4", torch.float32, symmetric=False, **GROUPS)
    x = torch.randn(5, K)
    graph = torch.export.export(layer, (x,)).graph
    names = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert "aten.linear.default" in names
    assert not any(name.startswith("npu") for name in names)
    exact = x.double() @ layer.quantized_weight().dequantize().double().T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_scale_is_rounded_to_the_dtype_of_x() -> None:
    layer = made("int8")
    given = round_to_nearest(torch.randn(N, K), layer.scheme.weights)
    assert torch.equal(layer.quantized_weight().scale, layer.quantized_weight().scale.bfloat16().float())
    assert not torch.equal(given.scale, given.scale.bfloat16().float())


def refused(message: str, inputs: int, outputs: int, dtype: torch.dtype, **scheme: Any) -> None:
    weights = WeightScheme(**scheme)
    layer = nn.Linear(inputs, outputs).to(dtype)
    with pytest.raises(ValueError, match=message):
        deploy(layer, Scheme(weights), round_to_nearest(layer.weight.detach().float(), weights))


def test_refusals() -> None:
    half = torch.bfloat16
    refused("out_features is 12 with int4 weights; accepted: a multiple of 8", 32, 12, half, type="int4")
    message = "dtype is float32 with int8 weights; accepted: float16, bfloat16"
    refused(message, 32, 16, torch.float32, type="int8")
    message = "group_size is 64 with float4_e2m1 weights and 64 inputs; accepted: a multiple of 32 below"
    refused(message, 64, 16, half, type="float4_e2m1", **GROUPS)
    refused("group_size is 48", 96, 16, half, type="float4_e1m2", strategy="group", group_size=48)
    refused(
        "group_size is 32 with mxfp4_e2m1", 32, 16, half, type="mxfp4_e2m1", strategy="group", group_size=32
    )
    refused("for a Linear; no layer has it", 64, 16, half, type="hifloat8", **GROUPS)
    refused("for a Linear; no layer has it", 64, 16, half, type="float4_e2m1")
