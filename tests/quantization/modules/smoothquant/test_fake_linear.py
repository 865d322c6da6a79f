from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from npu_fusion.quantization.modules.smoothquant import (
    W8A8Linear,
    quantize_activation_per_tensor_absmax,
    quantize_activation_per_token_absmax,
    quantize_weight_per_channel_absmax,
    quantize_weight_per_tensor_absmax,
)
from tests.quantization.modules.smoothquant._trace import traced

WEIGHTS = {"per_channel": quantize_weight_per_channel_absmax, "per_tensor": quantize_weight_per_tensor_absmax}
INPUTS = {
    "per_token": quantize_activation_per_token_absmax,
    "per_tensor": quantize_activation_per_tensor_absmax,
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def layer(in_features: int = 24, out_features: int = 10, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias)


@pytest.mark.parametrize("quantize_output", [False, True])
@pytest.mark.parametrize("act_quant", INPUTS)
@pytest.mark.parametrize("weight_quant", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_a_linear_layer_of_quantized_values(
    dtype: torch.dtype, weight_quant: str, act_quant: str, quantize_output: bool
) -> None:
    linear = layer().to(dtype)
    quantized = W8A8Linear.from_float(linear, weight_quant, act_quant, quantize_output)
    x = torch.randn(2, 5, 24).to(dtype)
    y = F.linear(INPUTS[act_quant](x), WEIGHTS[weight_quant](linear.weight), linear.bias)
    expected = INPUTS[act_quant](y) if quantize_output else y
    result = quantized(x)
    assert (result.dtype, result.requires_grad) == (dtype, False)
    assert torch.equal(result, expected)
    assert (result.unique().numel() < 2 * 5 * 10) or not quantize_output or act_quant == "per_token"


def test_finer_scales_are_closer_to_the_float_layer() -> None:
    linear = layer(256, 64)
    with torch.no_grad():
        linear.weight[3] *= 50
    x = torch.randn(64, 256) * torch.logspace(-2, 2, 64).unsqueeze(1)

    def error(weight_quant: str, act_quant: str) -> float:
        y = W8A8Linear.from_float(linear, weight_quant, act_quant)(x)
        exact = linear(x).detach()
        return float(((y - exact).norm(dim=1) / exact.norm(dim=1)).mean())

    errors = [error(w, a) for w, a in (("per_channel", "per_token"), ("per_tensor", "per_tensor"))]
    assert 0 < errors[0] < 0.02 < errors[1]


@pytest.mark.parametrize(
    "shape",
    [(24,), (1, 24), (3, 24), (2, 3, 24), (2, 1, 3, 24), (1, 2, 1, 2, 24), (2, 1, 2, 1, 2, 24), (0, 24)],
)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    quantized = W8A8Linear.from_float(layer())
    x = torch.randn(shape)
    before = x.clone()
    y = quantized(x)
    assert torch.equal(x, before)
    assert y.shape == (*shape[:-1], 10)
    torch.testing.assert_close(y.reshape(-1, 10), quantized(x.reshape(-1, 24)))


def test_from_float_leaves_the_layer_as_it_is() -> None:
    linear = layer().bfloat16().eval()
    before = copy.deepcopy(linear.state_dict())
    for weight_quant in WEIGHTS:
        quantized = W8A8Linear.from_float(linear, weight_quant)
        assert not quantized.training
        assert quantized.weight.data_ptr() != linear.weight.data_ptr()
        assert quantized.bias is not None and quantized.bias.data_ptr() != linear.bias.data_ptr()
        assert all(torch.equal(before[name], value) for name, value in linear.state_dict().items())
    assert repr(quantized) == (
        "W8A8Linear(in_features=24, out_features=10, bias=True, weight_quant=per_tensor, "
        "act_quant=per_token, quantize_output=False)"
    )


def test_state_dict_and_moves_are_those_of_any_module() -> None:
    quantized = W8A8Linear.from_float(layer())
    assert not list(quantized.parameters())
    state = quantized.state_dict()
    assert {n: tuple(t.shape) for n, t in state.items()} == {"weight": (10, 24), "bias": (10,)}
    loaded = W8A8Linear(24, 10)
    assert not loaded(torch.randn(2, 24)).any()
    loaded.load_state_dict(state)
    x = torch.randn(3, 24)
    assert torch.equal(loaded(x), quantized(x))
    assert loaded.half().weight.dtype == torch.float16
    assert loaded(x.half()).dtype == torch.float16
    meta = W8A8Linear(24, 10, bias=False, device="meta", dtype=torch.bfloat16)
    assert (meta.weight.device.type, meta.weight.dtype, meta.bias) == ("meta", torch.bfloat16, None)


@pytest.mark.parametrize("act_quant", INPUTS)
def test_traces_as_one_graph_without_a_write(act_quant: str) -> None:
    quantized = W8A8Linear.from_float(layer().bfloat16(), act_quant=act_quant, quantize_output=True)
    calls = [[torch.randn(1, tokens, 24).bfloat16()] for tokens in (2, 40)]
    graphs = traced(quantized, calls, dynamic=True)
    assert len(graphs) == 1


def test_refusals() -> None:
    linear = layer()
    with pytest.raises(
        TypeError, match="W8A8Linear.from_float: module must be a torch.nn.Linear, got Bilinear"
    ):
        W8A8Linear.from_float(nn.Bilinear(2, 2, 2))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="weight_quant is 'per_group'; accepted: 'per_channel', 'per_tensor'"
    ):
        W8A8Linear.from_float(linear, "per_group")
    with pytest.raises(ValueError, match="act_quant is 'static'; accepted: 'per_token', 'per_tensor'"):
        W8A8Linear.from_float(linear, act_quant="static")
    with pytest.raises(ValueError, match="W8A8Linear: act_quant is 'per_channel'; accepted"):
        W8A8Linear(2, 2, act_quant="per_channel")
    with pytest.raises(ValueError, match="W8A8Linear: weight_quant is 'per_token'; accepted"):
        W8A8Linear(2, 2, weight_quant="per_token")
    with pytest.raises(ValueError, match="weight has dtype torch.float64"):
        W8A8Linear.from_float(layer().double())
    quantized = W8A8Linear.from_float(linear)
    with pytest.raises(
        ValueError, match=r"x has dtype torch.float16; accepted: torch.float32 \(that of the weight"
    ):
        quantized(torch.randn(2, 24).half())
    with pytest.raises(ValueError, match=r"x has shape \[2, 23\]; accepted: \[\.\.\., 24\]"):
        quantized(torch.randn(2, 23))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_refuses_values_that_are_not_finite(name: str, value: float) -> None:
    linear = layer()
    with torch.no_grad():
        linear.get_parameter(name).view(-1)[1] = value
    with pytest.raises(ValueError, match=f"W8A8Linear.from_float: {name} has infinities or NaN"):
        W8A8Linear.from_float(linear)
