from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from npu_fusion.quantization import W8A8DynamicLinear, quantize_linears
from npu_fusion.quantization.modules import quantize_rows

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def layer(in_features: int, out_features: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias)


def exact(quantized: W8A8DynamicLinear, x: Tensor) -> Tensor:
    """The layer's formula: its own integers multiplied as Python integers, its scales applied in float64."""
    q, scale = quantize_rows(x)
    rows, columns = q.reshape(-1, x.size(-1)).tolist(), quantized.weight.tolist()
    sums = [[sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in rows]
    product = torch.tensor(sums, dtype=torch.float64).reshape(*x.shape[:-1], quantized.out_features)
    y = product * quantized.weight_scale.double() * scale.double()
    return y if quantized.bias is None else y + quantized.bias.double()


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100),
        min_size=1,
        max_size=12,
    )
)
def test_a_row_is_quantized_to_the_nearest_integers(values: list[float]) -> None:
    x = torch.tensor(values)
    q, scale = quantize_rows(x)
    amax = max(map(abs, values))
    assert (q.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (1,))
    assert scale.item() == (torch.tensor(amax) / 127).item()
    if scale.item() == 0:
        assert not q.any()
    elif scale.item() > torch.finfo(torch.float32).smallest_normal:
        assert q.abs().max() == 127
        # Half a step, and what fp32 loses in the quotient (at most 127 * 2**-24).
        assert ((x.double() / scale.double() - q).abs() <= 0.5 + 1e-4).all()


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0])
    q, scale = quantize_rows(x)
    assert scale.item() == 1
    assert q.tolist() == [127, 0, 2, 2, 0, -2, -2, -127]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_matches_float64(dtype: torch.dtype, bias: bool) -> None:
    quantized = W8A8DynamicLinear.from_float(layer(40, 24, bias))
    x = torch.randn(9, 40).mul(3).to(dtype)
    y = quantized(x)
    expected = exact(quantized, x)
    assert y.dtype == dtype
    # At most four fp32 roundings of terms no larger than the largest output, then one to the dtype.
    steps = 4 * 2.0**-24 * expected.abs().max().item()
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps / 2 + 1e-7, atol=steps)


def test_is_as_close_to_the_float_layer_as_its_steps_allow() -> None:
    linear = layer(96, 64)
    quantized = W8A8DynamicLinear.from_float(linear)
    x = torch.randn(33, 96) * torch.logspace(-3, 3, 33).unsqueeze(1)
    w = linear.weight.detach()
    step_x, step_w = quantize_rows(x)[1], quantize_rows(w)[1]
    # |x̂ŵ - xw| <= |x||ŵ - w| + |x̂ - x||w| + |x̂ - x||ŵ - w|, with errors of half a step each.
    bound = (
        x.abs().sum(1, keepdim=True) * step_w.T / 2 + step_x / 2 * w.abs().sum(1) + 96 * step_x * step_w.T / 4
    )
    error = (quantized(x) - linear(x)).abs().detach()
    assert (error <= bound * 1.001 + 1e-5).all()
    assert error.max() > 0


@pytest.mark.parametrize(
    "shape", [(8,), (1, 8), (3, 8), (2, 3, 8), (2, 1, 3, 8), (1, 2, 1, 2, 8), (2, 1, 2, 1, 2, 8)]
)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    quantized = W8A8DynamicLinear.from_float(layer(8, 5))
    x = torch.randn(shape)
    y = quantized(x)
    assert y.shape == (*shape[:-1], 5)
    assert torch.equal(y.reshape(-1, 5), quantized(x.reshape(-1, 8)))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 3, 8)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    y = W8A8DynamicLinear.from_float(layer(8, 5))(torch.empty(shape))
    assert y.shape == (*shape[:-1], 5)


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 20), inputs=st.integers(2, 33), outputs=st.integers(1, 33))
def test_every_size_is_exact(tokens: int, inputs: int, outputs: int) -> None:
    """On the CPU there is no smallest or aligned size; at full scale the sums are the largest possible."""
    quantized = W8A8DynamicLinear(inputs, outputs, bias=False)
    quantized.weight.fill_(-127)
    quantized.weight_scale.fill_(1)
    assert torch.equal(
        quantized(torch.full((tokens, inputs), 127.0)), torch.full((tokens, outputs), -16129.0 * inputs)
    )


def test_non_contiguous_input() -> None:
    quantized = W8A8DynamicLinear.from_float(layer(6, 5))
    x = torch.randn(6, 4, 3).permute(2, 1, 0)
    assert not x.is_contiguous()
    assert torch.equal(quantized(x), quantized(x.contiguous()))


def test_zero_rows_give_the_bias() -> None:
    linear = layer(16, 4)
    with torch.no_grad():
        linear.weight[2] = 0
    quantized = W8A8DynamicLinear.from_float(linear)
    x = torch.randn(3, 16)
    x[1] = 0
    y = quantized(x)
    assert quantized.weight_scale[2] == 0
    assert torch.equal(y[1], linear.bias.detach())
    assert torch.equal(y[:, 2], linear.bias.detach()[2].expand(3))
    assert y.isfinite().all()


def test_nan_is_not_hidden() -> None:
    x = torch.randn(2, 16)
    x[0, 3] = torch.nan
    y = W8A8DynamicLinear.from_float(layer(16, 4))(x)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_round_trip(bias: bool) -> None:
    quantized = W8A8DynamicLinear.from_float(layer(12, 7, bias))
    state = quantized.state_dict()
    assert set(state) == {"weight", "weight_scale"} | ({"bias"} if bias else set())
    assert (state["weight"].dtype, state["weight"].shape) == (torch.int8, (7, 12))
    assert (state["weight_scale"].dtype, state["weight_scale"].shape) == (torch.float32, (7,))
    loaded = W8A8DynamicLinear(12, 7, bias=bias)
    loaded.load_state_dict(state)
    x = torch.randn(5, 12)
    assert torch.equal(loaded(x), quantized(x))


def test_from_float_leaves_the_layer_as_it_is() -> None:
    linear = layer(12, 7).to(torch.bfloat16).eval()
    before = copy.deepcopy(linear.state_dict())
    quantized = W8A8DynamicLinear.from_float(linear)
    assert not quantized.training
    assert all(torch.equal(before[name], value) for name, value in linear.state_dict().items())
    assert repr(quantized) == "W8A8DynamicLinear(in_features=12, out_features=7, bias=True)"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_traces_as_one_graph(dtype: torch.dtype, dynamic: bool) -> None:
    torch._dynamo.reset()
    quantized = W8A8DynamicLinear.from_float(layer(16, 8))
    targets: list[list[str]] = []

    def record(gm: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        targets.append([str(node.target) for node in gm.graph.nodes if node.op == "call_function"])
        return gm

    backend = aot_autograd(fw_compiler=record)
    compiled = torch.compile(quantized, backend=backend, dynamic=dynamic, fullgraph=True)
    sizes = (2, 5, 40)
    with torch.no_grad():
        for tokens in sizes:
            x = torch.randn(1, tokens, 16).to(dtype)
            assert torch.equal(compiled(x), quantized(x))
    if dynamic:
        assert len(targets) == 1
    for names in targets:
        assert names.count("aten._int_mm.default") == 1
        assert names.count("aten.amax.default") == 1
        assert names.count("aten.mul.Tensor") == 2


@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 64), (64,)])
def test_one_token_is_right_under_inductor(shape: tuple[int, ...]) -> None:
    """pytorch issue 195066: Inductor gives a reshaped single row a stride of 0; torch._int_mm misreads it."""
    torch._dynamo.reset()
    quantized = W8A8DynamicLinear.from_float(layer(64, 32))
    x = torch.randn(shape)
    with torch.no_grad():
        y = torch.compile(quantized, dynamic=False, fullgraph=True)(x)
    torch.testing.assert_close(y.double(), exact(quantized, x), rtol=1e-6, atol=1e-6)


def test_refusals() -> None:
    quantized = W8A8DynamicLinear.from_float(layer(8, 5))
    with pytest.raises(ValueError, match=r"x has dtype torch.float64; accepted: torch.float16"):
        quantized(torch.randn(2, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x has shape \[2, 7\]; accepted: \[\.\.\., 8\]"):
        quantized(torch.randn(2, 7))
    with pytest.raises(ValueError, match=r"x has shape \[\]"):
        quantized(torch.tensor(1.0))
    with pytest.raises(
        ValueError, match="in_features is 1 and out_features 3; accepted: in_features at least 2"
    ):
        W8A8DynamicLinear(1, 3)
    with pytest.raises(ValueError, match="out_features 0; accepted"):
        W8A8DynamicLinear(3, 0)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Linear, got Bilinear"):
        W8A8DynamicLinear.from_float(nn.Bilinear(2, 2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight has dtype torch.complex64"):
        W8A8DynamicLinear.from_float(nn.Linear(4, 4, dtype=torch.complex64))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_from_float_refuses_values_that_are_not_finite(name: str, value: float) -> None:
    linear = layer(8, 5)
    with torch.no_grad():
        linear.get_parameter(name).view(-1)[1] = value
    with pytest.raises(ValueError, match=f"from_float: {name} has infinities or NaN"):
        W8A8DynamicLinear.from_float(linear)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.again = self.down
        self.attention = nn.MultiheadAttention(8, 2)
        self.lm_head = nn.Linear(8, 3)


def test_quantize_linears_replaces_by_name() -> None:
    model = nn.Sequential(Block(), Block())
    model[1].lm_head_2 = nn.Linear(8, 3)
    names = quantize_linears(model)
    assert names == ["0.up", "0.down", "0.again", "1.up", "1.down", "1.again", "1.lm_head_2"]
    assert all(type(model.get_submodule(name)) is W8A8DynamicLinear for name in names)
    assert model[0].again is model[0].down
    assert model[0].down is not model[1].down
    assert type(model[0].lm_head) is nn.Linear
    assert isinstance(model[0].attention.out_proj, nn.Linear)


def test_quantize_linears_skips_full_names_and_last_parts() -> None:
    model = nn.Sequential(Block(), Block())
    assert quantize_linears(model, skip=("0.up", "again")) == ["0.lm_head", "1.up", "1.lm_head"]
    assert type(model[0].down) is nn.Linear  # the same layer as "again"


def test_quantize_linears_refuses() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(TypeError, match="skip must be a sequence of names, got the string 'lm_head'"):
        quantize_linears(model, skip="lm_head")
    with pytest.raises(ValueError, match="model is itself a Linear"):
        quantize_linears(nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer 1: .* weight has infinities or NaN"):
        quantize_linears(model)
    assert type(model[0]) is nn.Linear
