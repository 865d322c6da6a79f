from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from npu_fusion.quantization.modules.smoothquant import W8A8BFP32OFP32Linear, W8A8Linear, quantize_static
from tests.quantization.modules.smoothquant._layers import (
    DTYPES,
    EMPTY,
    SHAPES,
    buffers,
    int8,
    integer_layer,
    layer,
    sums,
)
from tests.quantization.modules.smoothquant._trace import traced

S_X = 0.02
WEIGHT_QUANT = ("per_channel", "per_tensor")
Kind = W8A8BFP32OFP32Linear


def exact(quantized: Kind, x: Tensor) -> Tensor:
    """The layer's formula: its own integers in Python, its scale and bias in float64."""
    y = sums(x, quantized.weight, None).double() * quantized.dequant_scale.double()
    return y if quantized.bias is None else y + quantized.bias.double()


@pytest.mark.parametrize("weight_quant", WEIGHT_QUANT)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_integers_are_exact(dtype: torch.dtype, bias: bool, weight_quant: str) -> None:
    quantized = Kind.from_float(layer(bias=bias), S_X, weight_quant=weight_quant, dtype=dtype)
    x = int8(9, 40)
    y, expected = quantized(x), exact(quantized, x)
    assert y.dtype == dtype
    steps = 3 * 2.0**-24 * expected.abs().max().item()
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps / 2 + 1e-7, atol=steps)


@pytest.mark.parametrize("weight_quant", WEIGHT_QUANT)
@pytest.mark.parametrize("input_offset", [None, -7, 127])
@pytest.mark.parametrize("bias", [True, False])
def test_it_stands_for_the_float_layer(bias: bool, input_offset: int | None, weight_quant: str) -> None:
    linear = layer(bias=bias)
    quantized = Kind.from_float(linear, S_X, weight_quant=weight_quant, input_offset=input_offset)
    q = int8(33, 40)
    x = (q.double() - (input_offset or 0)) * S_X
    w = linear.weight.detach().double()
    y = x @ w.t() + (0 if linear.bias is None else linear.bias.detach().double())
    step = w.abs().amax(1) / 127 if weight_quant == "per_channel" else w.abs().amax() / 127
    bound = x.abs().sum(1, keepdim=True) * step / 2 + 1e-5
    error = (quantized(q).double() - y).abs()
    assert (error <= bound).all()
    assert error.max() > 0
    assert (quantized.bias is None) is (not bias and input_offset is None)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 20), inputs=st.integers(2, 33), outputs=st.integers(1, 33))
def test_every_size_is_exact_at_full_scale(rows: int, inputs: int, outputs: int) -> None:
    quantized = Kind(inputs, outputs, bias=False)
    quantized.weight.fill_(-127)
    quantized.dequant_scale.fill_(1)
    x = torch.full((rows, inputs), -128, dtype=torch.int8)
    assert torch.equal(quantized(x), torch.full((rows, outputs), 16256.0 * inputs))


def test_it_equals_fake_quantization() -> None:
    """All scales being powers of two, both ways are exact; sums stay below 2^24."""
    linear = integer_layer()
    quantized = Kind.from_float(linear, 0.25)
    q = int8(50, 64).clamp(-127, 127)
    q[:, 1] = 127
    fake = W8A8Linear.from_float(linear)(q.float() * 0.25)
    assert torch.equal(quantized(q), fake)


@pytest.mark.parametrize("shape", SHAPES)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    quantized = Kind.from_float(layer(8, 5), S_X)
    x = int8(*shape)
    y = quantized(x)
    assert y.shape == (*shape[:-1], 5)
    assert torch.equal(y.reshape(-1, 5), quantized(x.reshape(-1, 8)))


@pytest.mark.parametrize("shape", EMPTY)
def test_no_rows(shape: tuple[int, ...]) -> None:
    y = Kind.from_float(layer(8, 5), S_X, dtype=torch.bfloat16)(torch.empty(shape, dtype=torch.int8))
    assert (y.shape, y.dtype) == ((*shape[:-1], 5), torch.bfloat16)


def test_zero_rows_and_channels_give_the_bias() -> None:
    linear = layer(16, 4)
    with torch.no_grad():
        linear.weight[2] = 0
    quantized = Kind.from_float(linear, S_X)
    x = int8(3, 16)
    x[1] = 0
    y = quantized(x)
    assert torch.equal(y[1], linear.bias.detach())
    assert torch.equal(y[:, 2], linear.bias.detach()[2].expand(3))


@pytest.mark.parametrize("weight_quant", WEIGHT_QUANT)
def test_state_dict_moves_and_the_float_layer(weight_quant: str) -> None:
    linear = layer(12, 7).bfloat16().eval()
    before = copy.deepcopy(linear.state_dict())
    quantized = Kind.from_float(linear, S_X, weight_quant=weight_quant, dtype=torch.float16)
    assert all(torch.equal(before[name], value) for name, value in linear.state_dict().items())
    assert not quantized.training
    kept = {
        "weight": (torch.int8, (7, 12)),
        "bias": (torch.float32, (7,)),
        "dequant_scale": (torch.float32, (7 if weight_quant == "per_channel" else 1,)),
    }
    assert buffers(quantized) == kept
    loaded = Kind(12, 7, weight_quant=weight_quant, dtype=torch.float16)
    loaded.load_state_dict(quantized.state_dict())
    x = int8(5, 12)
    assert torch.equal(loaded(x), quantized(x))
    assert buffers(nn.Sequential(loaded).to(torch.bfloat16)) == {f"0.{n}": form for n, form in kept.items()}
    assert torch.equal(loaded(x), quantized(x))
    assert repr(quantized) == (
        "W8A8BFP32OFP32Linear(in_features=12, out_features=7, bias=True, "
        f"weight_quant={weight_quant}, dtype=torch.float16)"
    )


def test_traces_as_one_graph() -> None:
    quantized = Kind.from_float(layer(), S_X, dtype=torch.bfloat16)
    graphs = traced(quantized, [[int8(1, tokens, 40)] for tokens in (2, 40)], dynamic=True)
    assert len(graphs) == 1


def test_one_token_is_right_under_inductor() -> None:
    """pytorch issue 195066, see quantize_static."""
    torch._dynamo.reset()
    quantized = Kind.from_float(layer(64, 32), S_X)

    def both(x: Tensor) -> Tensor:
        return quantized(quantize_static(x, S_X))

    x = torch.randn(1, 1, 64)
    with torch.no_grad():
        y = torch.compile(both, dynamic=False, fullgraph=True)(x)
    torch.testing.assert_close(y, both(x), rtol=1e-6, atol=1e-6)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="W8A8BFP32OFP32Linear.from_float: module must be a torch.nn.Linear"):
        Kind.from_float(nn.ReLU(), 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="input_scale is 0.0; accepted: a positive finite number"):
        Kind.from_float(layer(), 0.0)
    with pytest.raises(
        ValueError, match="dtype is torch.float64; accepted: torch.float16, torch.bfloat16, torch.flo"
    ):
        Kind.from_float(layer(), 1.0, dtype=torch.float64)
    with pytest.raises(ValueError, match="W8A8BFP32OFP32Linear: dtype is torch.int8"):
        Kind(2, 2, dtype=torch.int8)
    with pytest.raises(ValueError, match="weight_quant is 'x'; accepted: 'per_channel', 'per_tensor'"):
        Kind(2, 2, weight_quant="x")
    with pytest.raises(
        ValueError, match="W8A8BFP32OFP32Linear: x has dtype torch.bfloat16; accepted: torch.int8"
    ):
        Kind(2, 2)(torch.ones(2, 2).bfloat16())
