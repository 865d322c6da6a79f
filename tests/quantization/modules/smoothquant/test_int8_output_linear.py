from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from npu_fusion.quantization.modules.smoothquant import (
    W8A8B8O8Linear,
    W8A8B8O8LinearReLU,
    W8A8Linear,
    quantize_static,
)
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

S_X, S_Y = 0.02, 0.015
WEIGHT_QUANT = ("per_channel", "per_tensor")


def exact(quantized: W8A8B8O8Linear, x: Tensor) -> Tensor:
    """The layer's formula: its own integers in Python, its scale in float64, clamped but not rounded."""
    acc = sums(x, quantized.weight, quantized.bias)
    offset = 0 if quantized.output_offset is None else quantized.output_offset.item()
    return (acc.double() * quantized.requant_scale.double() + offset).clamp(-128, 127)


@pytest.mark.parametrize("weight_quant", WEIGHT_QUANT)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("offsets", [(None, None), (-7, 11), (100, None), (None, -128)])
def test_its_integers_are_exact(
    offsets: tuple[int | None, int | None], bias: bool, weight_quant: str
) -> None:
    quantized = W8A8B8O8Linear.from_float(
        layer(bias=bias),
        S_X,
        S_Y,
        weight_quant=weight_quant,
        input_offset=offsets[0],
        output_offset=offsets[1],
    )
    x = int8(9, 40)
    y = quantized(x)
    assert y.dtype == torch.int8
    # fp32 rounds the sum, the product and the sum with the zero point.
    assert (y.double() - exact(quantized, x)).abs().max() <= 0.5 + 3 * 2.0**-16
    assert y.unique().numel() > 50


@pytest.mark.parametrize("weight_quant", WEIGHT_QUANT)
@pytest.mark.parametrize("offsets", [(None, None), (-7, 11)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_stands_for_the_float_layer(
    dtype: torch.dtype, bias: bool, offsets: tuple[int | None, int | None], weight_quant: str
) -> None:
    linear = layer(bias=bias).to(dtype)
    z_x, z_y = (o or 0 for o in offsets)
    quantized = W8A8B8O8Linear.from_float(
        linear, S_X, S_Y, weight_quant=weight_quant, input_offset=offsets[0], output_offset=offsets[1]
    )
    q = int8(33, 40)
    x = (q.double() - z_x) * S_X
    w = linear.weight.detach().double()
    y = x @ w.t() + (0 if linear.bias is None else linear.bias.detach().double())
    step = w.abs().amax(1) / 127 if weight_quant == "per_channel" else w.abs().amax() / 127
    # A step of the result, half of one of each weight, and half of one of the bias.
    bound = S_Y * 0.501 + x.abs().sum(1, keepdim=True) * step / 2 + S_X * step / 2
    clamped = y.clamp((-128 - z_y) * S_Y, (127 - z_y) * S_Y)
    assert (((quantized(q).double() - z_y) * S_Y - clamped).abs() <= bound).all()


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 20), inputs=st.integers(2, 33), outputs=st.integers(1, 33), low=st.booleans())
def test_every_size_is_exact_at_full_scale(rows: int, inputs: int, outputs: int, low: bool) -> None:
    quantized = W8A8B8O8Linear(inputs, outputs, bias=False)
    quantized.weight.fill_(-127)
    quantized.requant_scale.fill_(100 / (127 * 128 * inputs))
    x = torch.full((rows, inputs), -128 if low else 127, dtype=torch.int8)
    assert torch.equal(quantized(x), torch.full((rows, outputs), 100 if low else -99, dtype=torch.int8))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9), s_x=st.integers(-6, 2), s_y=st.integers(-6, 2))
def test_it_equals_fake_quantization(seed: int, s_x: int, s_y: int) -> None:
    """All scales being powers of two, both ways are exact; sums stay below 2^24."""
    linear = integer_layer(seed)
    step = 2.0 ** (s_x - 7)
    linear.bias.data.copy_((linear.bias / step).round() * step)
    quantized = W8A8B8O8Linear.from_float(linear, 2.0**s_x, 2.0**s_y)
    assert torch.equal(quantized.requant_scale, torch.full((16,), 2.0 ** (s_x - 7 - s_y)))
    q = int8(20, 64, seed=seed).clamp(-127, 127)
    q[:, 1] = 127  # so that the fake quantization of each token has this scale, too
    fake = W8A8Linear.from_float(linear)(q.float() * 2.0**s_x)
    assert (fake / step).abs().max() < 2**24
    assert torch.equal(quantized(q).float(), (fake / 2.0**s_y).round().clamp(-128, 127))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [W8A8B8O8Linear, W8A8B8O8LinearReLU])
def test_leading_dimensions(kind: type[W8A8B8O8Linear], shape: tuple[int, ...]) -> None:
    quantized = kind.from_float(layer(8, 5), S_X, S_Y, output_offset=3)
    x = int8(*shape)
    y = quantized(x)
    assert y.shape == (*shape[:-1], 5)
    assert torch.equal(y.reshape(-1, 5), quantized(x.reshape(-1, 8)))


@pytest.mark.parametrize("shape", EMPTY)
def test_no_rows(shape: tuple[int, ...]) -> None:
    y = W8A8B8O8Linear.from_float(layer(8, 5), S_X, S_Y)(torch.empty(shape, dtype=torch.int8))
    assert (y.shape, y.dtype) == ((*shape[:-1], 5), torch.int8)


def test_non_contiguous_input() -> None:
    quantized = W8A8B8O8Linear.from_float(layer(6, 5), S_X, S_Y)
    x = int8(6, 4, 3).permute(2, 1, 0)
    assert not x.is_contiguous()
    assert torch.equal(quantized(x), quantized(x.contiguous()))


@pytest.mark.parametrize("output_offset", [None, -20, 127])
def test_relu(output_offset: int | None) -> None:
    linear = layer()
    plain = W8A8B8O8Linear.from_float(linear, S_X, S_Y, output_offset=output_offset)
    quantized = W8A8B8O8LinearReLU.from_float(linear, S_X, S_Y, output_offset=output_offset)
    assert type(quantized) is W8A8B8O8LinearReLU
    x = int8(30, 40)
    zero = output_offset or 0
    acc = sums(x, plain.weight, plain.bias)
    value = acc.float() * plain.requant_scale
    assert torch.equal(quantized(x), (value.relu() + zero).round().clamp(-128, 127).to(torch.int8))
    assert (plain(x) < zero).any()
    assert (quantized(x) >= zero).all()


@pytest.mark.parametrize("weight_quant", WEIGHT_QUANT)
@pytest.mark.parametrize("input_offset", [None, 9])
def test_channels_of_zeros_keep_their_bias(weight_quant: str, input_offset: int | None) -> None:
    """Whose scale of the weight alone would not let the bias fit into int32."""
    linear = layer()
    with torch.no_grad():
        linear.weight[2] = 0
        linear.weight[3] *= 1e-12
        linear.weight[4] = 0
        linear.bias[2:5] = torch.tensor([0.5, -0.75, 0.0])
    quantized = W8A8B8O8Linear.from_float(
        linear, S_X, S_Y, weight_quant=weight_quant, input_offset=input_offset
    )
    y = quantized(int8(20, 40))[:, 2:5]
    assert torch.equal(y, torch.tensor([33, -50, 0], dtype=torch.int8).expand(20, 3))
    zeros = copy.deepcopy(linear)
    with torch.no_grad():
        zeros.weight.zero_()
        zeros.bias.zero_()
    still = W8A8B8O8Linear.from_float(zeros, S_X, S_Y, weight_quant=weight_quant, output_offset=-5)
    assert torch.equal(still(int8(3, 40)), torch.full((3, 24), -5, dtype=torch.int8))


def test_a_large_bias_does_not_wrap() -> None:
    linear = layer(16, 2)
    with torch.no_grad():
        linear.weight[:] = torch.tensor([[1e-9], [-1e-9]])
        linear.bias[:] = torch.tensor([1e3, -1e3])
    quantized = W8A8B8O8Linear.from_float(linear, S_X, 10.0)
    x = torch.full((4, 16), 127, dtype=torch.int8)
    x[1::2] = -128
    assert quantized(x).tolist() == [[100, -100]] * 4
    assert quantized.bias is not None
    extreme = (quantized.bias.long().abs() + 16 * 127 * 128).max()
    assert 2**30 < extreme < 2**31


def test_the_bias_is_rounded_half_to_even() -> None:
    linear = integer_layer(out_features=4)
    step = S = 2.0**-7 * 0.5
    with torch.no_grad():
        linear.bias[:] = torch.tensor([0.5, 1.5, -0.5, -2.5]) * step
    quantized = W8A8B8O8Linear.from_float(linear, 0.5, S)
    assert quantized.bias is not None
    assert quantized.bias.tolist() == [0, 2, 0, -2]


@pytest.mark.parametrize("weight_quant", WEIGHT_QUANT)
def test_state_dict_round_trip(weight_quant: str) -> None:
    quantized = W8A8B8O8Linear.from_float(layer(12, 7), S_X, S_Y, weight_quant=weight_quant, output_offset=4)
    scales = 7 if weight_quant == "per_channel" else 1
    assert buffers(quantized) == {
        "weight": (torch.int8, (7, 12)),
        "bias": (torch.int32, (7,)),
        "requant_scale": (torch.float32, (scales,)),
        "output_offset": (torch.int32, (1,)),
    }
    loaded = W8A8B8O8Linear(12, 7, weight_quant=weight_quant, output_offset=True)
    x = int8(5, 12)
    assert not loaded(x).any()
    loaded.load_state_dict(quantized.state_dict())
    assert torch.equal(loaded(x), quantized(x))
    plain = W8A8B8O8Linear.from_float(layer(12, 7, bias=False), S_X, S_Y)
    assert set(plain.state_dict()) == {"weight", "requant_scale"}


def test_conversions_of_the_model_leave_its_scales() -> None:
    quantized = W8A8B8O8Linear.from_float(layer(), S_X, S_Y)
    before = copy.deepcopy(quantized)
    x = int8(20, 40)
    for moved in (nn.Sequential(quantized).to(torch.bfloat16)[0], quantized.half(), quantized.double()):
        assert buffers(moved) == buffers(before)
        assert torch.equal(moved(x), before(x))
    meta = quantized.to("meta")
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}


def test_from_float_leaves_the_layer_as_it_is() -> None:
    linear = layer(12, 7).bfloat16().eval()
    before = copy.deepcopy(linear.state_dict())
    quantized = W8A8B8O8Linear.from_float(linear, torch.tensor([S_X]), torch.tensor(S_Y))
    assert not quantized.training
    assert not list(quantized.parameters())
    assert all(torch.equal(before[name], value) for name, value in linear.state_dict().items())
    assert repr(quantized) == (
        "W8A8B8O8Linear(in_features=12, out_features=7, bias=True, weight_quant=per_channel)"
    )


@pytest.mark.parametrize("kind", [W8A8B8O8Linear, W8A8B8O8LinearReLU])
def test_traces_as_one_graph(kind: type[W8A8B8O8Linear]) -> None:
    quantized = kind.from_float(layer(), S_X, S_Y, output_offset=3)
    graphs = traced(quantized, [[int8(1, tokens, 40)] for tokens in (2, 40)], dynamic=True)
    assert len(graphs) == 1
    for graph in graphs:
        assert len(graph.find_nodes(op="call_function", target=torch.ops.aten._int_mm.default)) == 1


def test_one_token_is_right_under_inductor() -> None:
    """pytorch issue 195066: a single row that is reshaped after it was computed gets a stride of 0."""
    torch._dynamo.reset()
    first = W8A8B8O8LinearReLU.from_float(layer(64, 32), S_X, S_Y)
    second = W8A8B8O8Linear.from_float(layer(32, 16, seed=1), S_Y, S_Y)

    def both(x: Tensor) -> Tensor:
        return second(first(quantize_static(x, S_X)))

    x = torch.randn(1, 1, 64)
    with torch.no_grad():
        assert torch.equal(torch.compile(both, dynamic=False, fullgraph=True)(x), both(x))


def test_refusals() -> None:
    who = "W8A8B8O8Linear.from_float"
    with pytest.raises(TypeError, match=f"{who}: module must be a torch.nn.Linear, got Bilinear"):
        W8A8B8O8Linear.from_float(nn.Bilinear(2, 2, 2), 1.0, 1.0)  # type: ignore[arg-type]
    linear = layer(8, 5)
    for name in ("input_scale", "output_scale"):
        for value in (0.0, -1.0, torch.inf, torch.nan):
            with pytest.raises(
                ValueError, match=f"{who}: {name} is {value}; accepted: a positive finite number"
            ):
                W8A8B8O8Linear.from_float(linear, **{"input_scale": 1.0, "output_scale": 1.0, name: value})
        with pytest.raises(ValueError, match=rf"{name} has shape \[2\]; accepted: one element"):
            W8A8B8O8Linear.from_float(
                linear, **{"input_scale": 1.0, "output_scale": 1.0, name: torch.ones(2)}
            )
        with pytest.raises(TypeError, match=f"{name} must be a number or a tensor, got str"):
            W8A8B8O8Linear.from_float(linear, **{"input_scale": 1.0, "output_scale": 1.0, name: "1"})
    for name in ("input_offset", "output_offset"):
        for value in (-129, 128, torch.tensor([300])):
            with pytest.raises(ValueError, match=rf"{who}: {name} is -?\d+; accepted: -128 to 127"):
                W8A8B8O8Linear.from_float(linear, 1.0, 1.0, **{name: value})
        with pytest.raises(ValueError, match=f"{name} has dtype torch.float32 and shape"):
            W8A8B8O8Linear.from_float(linear, 1.0, 1.0, **{name: torch.ones(1)})
        with pytest.raises(TypeError, match=f"{name} must be an integer, a tensor or None, got float"):
            W8A8B8O8Linear.from_float(linear, 1.0, 1.0, **{name: 1.0})
    with pytest.raises(
        ValueError, match=f"{who}: weight_quant is 'per_token'; accepted: 'per_channel', 'per_ten"
    ):
        W8A8B8O8Linear.from_float(linear, 1.0, 1.0, weight_quant="per_token")
    with pytest.raises(ValueError, match=f"{who}: output_scale is 1e-44; accepted: one by which"):
        W8A8B8O8Linear.from_float(linear, 1.0, 1e-44)
    with pytest.raises(ValueError, match="W8A8B8O8LinearReLU: in_features is 1 and out_features 3; accepted"):
        W8A8B8O8LinearReLU(1, 3)
    with pytest.raises(ValueError, match="in_features is 131072 and out_features 1"):
        W8A8B8O8Linear.from_float(nn.Linear(131_072, 1), 1.0, 1.0)
    with pytest.raises(
        ValueError, match=f"{who}: in_features is 70000 beside an input_offset; accepted: at most 66311"
    ):
        W8A8B8O8Linear.from_float(nn.Linear(70_000, 1), 1.0, 1.0, input_offset=1)
    with torch.no_grad():
        linear.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"{who}: weight has infinities or NaN"):
        W8A8B8O8Linear.from_float(linear, 1.0, 1.0)
    quantized = W8A8B8O8Linear(8, 5)
    with pytest.raises(ValueError, match="W8A8B8O8Linear: x has dtype torch.float32; accepted: torch.int8"):
        quantized(torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"W8A8B8O8Linear: x has shape \[2, 7\]; accepted: \[\.\.\., 8\]"):
        quantized(int8(2, 7))
