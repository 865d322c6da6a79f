from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from npu_fusion.quantization.modules import empty
from npu_fusion.quantization.modules.smoothquant import W8A16Linear
from tests.quantization.modules.smoothquant._layers import EMPTY, SHAPES, layer
from tests.quantization.modules.smoothquant._trace import traced

DTYPES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_error_is_half_a_step_of_each_weight(dtype: torch.dtype, bias: bool) -> None:
    linear = layer(96, 64, bias=bias).to(dtype)
    quantized = W8A16Linear.from_float(linear)
    x = torch.randn(33, 96).to(dtype)
    w = linear.weight.detach().double()
    have = quantized.quantized_weight()
    step = have.scale.double()
    assert torch.equal(have.scale, have.scale.to(dtype).float())
    torch.testing.assert_close(step, w.abs().amax(1) / 127, rtol=torch.finfo(dtype).eps / 2, atol=0)
    assert ((have.dequantize().double() - w).abs() <= step.unsqueeze(1) * 0.5001).all()
    expected = F.linear(x.double(), w, None if linear.bias is None else linear.bias.detach().double())
    y = quantized(x)
    assert y.dtype == dtype
    # The operator rounds each weight, and at the end the result, to the dtype.
    rounding = torch.finfo(dtype).eps * x.double().abs().sum(1, keepdim=True) * w.abs().amax()
    bound = x.double().abs().sum(1, keepdim=True) * step / 2 + rounding
    error = (y.double() - expected).abs()
    assert (error <= bound).all()
    assert error.max() > 1e-4


def test_zero_channels_and_weights_that_are_too_small_for_a_scale() -> None:
    linear = layer(16, 4).half()
    with torch.no_grad():
        linear.weight[1] = 0
        linear.weight[2] = 6e-8  # the smallest float16; its scale underflows
    quantized = W8A16Linear.from_float(linear)
    assert not quantized.quantized_weight().codes[1:3].any()
    y = quantized(torch.randn(3, 16).half())
    assert torch.equal(y[:, 1:3], linear.bias.detach()[1:3].expand(3, 2))


def test_float16_sums_of_large_inputs_do_not_overflow() -> None:
    linear = layer(64, 2).half()
    with torch.no_grad():
        linear.weight.fill_(0.01)
        linear.bias.zero_()
    y = W8A16Linear.from_float(linear)(torch.full((1, 64), 100.0).half())  # 64 * 127 * 100 is beyond float16
    torch.testing.assert_close(y.float(), torch.full((1, 2), 64.0), rtol=2e-3, atol=0)


@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    quantized = W8A16Linear.from_float(layer(8, 5).bfloat16())
    x = torch.randn(shape).bfloat16()
    y = quantized(x)
    assert y.shape == (*shape[:-1], 5)
    assert torch.equal(y.reshape(-1, 5), quantized(x.reshape(-1, 8)))


def test_it_can_be_described_saved_and_loaded() -> None:
    linear = layer(12, 7).bfloat16().eval()
    before = copy.deepcopy(linear.state_dict())
    quantized = W8A16Linear.from_float(linear)
    assert all(torch.equal(before[name], value) for name, value in linear.state_dict().items())
    assert type(quantized) is W8A16Linear
    assert not quantized.training
    loaded = empty(quantized.describe())
    loaded.load_state_dict(quantized.state_dict())
    x = torch.randn(5, 12).bfloat16()
    assert torch.equal(loaded(x), quantized(x))


def test_traces_as_one_operator() -> None:
    quantized = W8A16Linear.from_float(layer().bfloat16())
    (graph,) = traced(quantized, [[torch.randn(1, n, 40).bfloat16()] for n in (2, 5, 40)], dynamic=True)
    operator = torch.ops.npu.npu_weight_quant_batchmatmul.default
    assert len(graph.find_nodes(op="call_function", target=operator)) == 1


def test_refusals() -> None:
    with pytest.raises(TypeError, match="W8A16Linear.from_float: module must be a torch.nn.Linear, got ReLU"):
        W8A16Linear.from_float(nn.ReLU())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"weight.dtype is torch.float32; accepted: torch.float16, torch.bfloat"
    ):
        W8A16Linear.from_float(layer())
    linear = layer().half()
    with torch.no_grad():
        linear.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="W8A16Linear.from_float: weight has infinities or NaN"):
        W8A16Linear.from_float(linear)
