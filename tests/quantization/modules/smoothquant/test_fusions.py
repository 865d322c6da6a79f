"""What the layers become in a compiled graph: fused operators, no arithmetic on scales, the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from npu_fusion.quantization.modules.smoothquant import (
    LLMInt8Linear,
    W8A8B8O8Linear,
    W8A8B8O8LinearReLU,
    W8A8BFP32OFP32Linear,
    W8A8Linear,
    quantize_static,
    requantize,
)
from tests.passes._harness import DIALECTS, fuse
from tests.quantization.modules.smoothquant._layers import int8, layer

BF16, FP16 = torch.bfloat16, torch.float16
QUANTIZE, PRODUCT, DYNAMIC = "npu_quantize", "npu_quant_matmul", "npu_dynamic_quant"
VIEWS = {"aten.t", "aten.permute", "aten.reshape", "aten.view", "aten._unsafe_view"}
CASTS = {"aten._to_copy", "prims.convert_element_type"}
S_X, S_Y = 0.03, 0.02


def arithmetic(operators: dict[str, int]) -> dict[str, int]:
    """All operators that compute something."""
    return {name: count for name, count in operators.items() if name not in VIEWS | CASTS}


def activations(dtype: torch.dtype = BF16, *lead: int) -> Tensor:
    return torch.randn(*(lead or (2, 16)), 40, generator=torch.Generator().manual_seed(1)).to(dtype)


class MLP(nn.Module):
    """The feed-forward block of OPT as torch_int builds it: int8 between its two layers."""

    def __init__(self, dtype: torch.dtype, weight_quant: str, offset: int | None) -> None:
        super().__init__()
        self.up = W8A8B8O8LinearReLU.from_float(
            layer(40, 64), S_X, S_Y, weight_quant=weight_quant, input_offset=offset, output_offset=offset
        )
        self.down = W8A8BFP32OFP32Linear.from_float(
            layer(64, 40, seed=1), S_Y, weight_quant=weight_quant, input_offset=offset, dtype=dtype
        )
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(quantize_static(x, S_X, self.offset)))


@pytest.mark.parametrize(
    ("dtype", "weight_quant", "offset", "dialect", "dynamic"),
    [
        (BF16, "per_channel", None, "aot", False),
        (BF16, "per_channel", None, "aot", True),
        (BF16, "per_channel", None, "inductor", True),
        (BF16, "per_tensor", 5, "inductor", False),
        (FP16, "per_channel", -9, "aot", True),
        (torch.float32, "per_tensor", None, "aot", False),
    ],
)
def test_a_feed_forward_block(
    dtype: torch.dtype, weight_quant: str, offset: int | None, dialect: str, dynamic: bool
) -> None:
    model = MLP(dtype, weight_quant, offset)
    outcome = fuse(model, [activations(dtype)], dialect=dialect, dynamic=dynamic, numerics="strict")
    narrow = dtype != torch.float32
    assert outcome.fused == {QUANTIZE: 1, PRODUCT: 2 if narrow else 1}
    after = arithmetic(outcome.report.operators_after)
    assert (after[f"npu.{QUANTIZE}"], after[f"npu.{PRODUCT}"]) == (1, 2 if narrow else 1)
    if narrow:
        others = {n for n in after if not n.startswith("npu.")}  # the ReLU, a scale and zero point as tensors
        assert others <= {"aten.clamp_min", "aten.maximum", "aten.full", "aten.sym_size"}
    else:
        (reason,) = outcome.reasons("quant_matmul")
        assert reason == "npu_quant_matmul returns 16-bit floats: the product is used in float32"
    assert outcome.result.dtype == dtype
    assert torch.equal(outcome.result, outcome.expected)


@pytest.mark.parametrize(
    ("bias", "offsets", "weight_quant", "dialect"),
    [
        (True, (None, None), "per_channel", "aot"),
        (True, (None, None), "per_tensor", "inductor"),
        (False, (None, None), "per_channel", "inductor"),
        (True, (4, -6), "per_channel", "inductor"),
        (False, (4, -6), "per_tensor", "aot"),
    ],
)
def test_int8_results_are_one_operator(
    bias: bool, offsets: tuple[int | None, int | None], weight_quant: str, dialect: str
) -> None:
    quantized = W8A8B8O8Linear.from_float(
        layer(bias=bias),
        S_X,
        S_Y,
        weight_quant=weight_quant,
        input_offset=offsets[0],
        output_offset=offsets[1],
    )
    outcome = fuse(quantized, [int8(2, 16, 40)], dialect=dialect, numerics="strict", target="ascend910b")
    assert outcome.fused == {PRODUCT: 1}
    assert not outcome.report.refused
    assert (
        outcome.report.operators_before["aten._int_mm"] == 1
        and "aten.round" in outcome.report.operators_before
    )
    assert arithmetic(outcome.report.operators_after) == {f"npu.{PRODUCT}": 1}
    assert torch.equal(outcome.result, outcome.expected)


def test_projections_that_read_one_tensor_quantize_it_once() -> None:
    linears = [layer(40, n, seed=n) for n in (48, 16, 16)]
    queries = [W8A8B8O8Linear.from_float(linear, S_X, S_Y) for linear in linears]

    def attention(x: Tensor) -> list[Tensor]:
        return [query(quantize_static(x, S_X)) for query in queries]

    outcome = fuse(attention, [activations()], numerics="strict")
    assert outcome.fused == {QUANTIZE: 1, PRODUCT: 3}
    assert arithmetic(outcome.report.operators_after) == {
        f"npu.{QUANTIZE}": 1,
        f"npu.{PRODUCT}": 3,
        "aten.full": 1,
    }
    assert all(map(torch.equal, outcome.result, outcome.expected))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_16_bit_layer_and_the_quantization_of_its_result_are_one_operator(dialect: str) -> None:
    first = W8A8BFP32OFP32Linear.from_float(layer(bias=False), S_X, dtype=BF16)

    def both(q: Tensor) -> Tensor:
        return quantize_static(first(q), S_Y, 3)

    outcome = fuse(both, [int8(32, 40)], dialect=dialect)
    assert outcome.fused == {PRODUCT: 1}
    assert set(arithmetic(outcome.report.operators_after)) == {f"npu.{PRODUCT}", "aten.div", "aten.full"}
    x, w = int8(32, 40).double(), first.weight.double()
    exact = (x @ w.t() * first.dequant_scale.double() / S_Y + 3).clamp(-128, 127)
    fused, eager = ((y.double() - exact).abs().mean() for y in (outcome.result, outcome.expected))
    assert fused <= eager


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_function_behind_a_product(dialect: str) -> None:
    def requantized(q: Tensor, w: Tensor, s_w: Tensor) -> Tensor:
        return requantize(torch._int_mm(q, w.t()), S_X, s_w, S_Y, -2)

    q, w, s_w = int8(32, 40), int8(24, 40, seed=1), torch.rand(24) * 1e-2
    outcome = fuse(requantized, [q, w, s_w], dialect=dialect, numerics="strict")
    assert outcome.fused == {PRODUCT: 1}
    assert f"npu.{PRODUCT}" in outcome.report.operators_after
    assert not {"aten.round", "aten.clamp", "aten._int_mm"} & set(outcome.report.operators_after)
    assert torch.equal(outcome.result, outcome.expected)


@pytest.mark.parametrize(
    ("dtype", "dialect", "dynamic"),
    [(BF16, "aot", False), (BF16, "inductor", True), (FP16, "aot", True), (FP16, "inductor", False)],
)
def test_outliers_apart_cost_a_small_product_and_nothing_else(
    dtype: torch.dtype, dialect: str, dynamic: bool
) -> None:
    """The mask of the other channels is the smooth_scales of their quantization, no product of its own."""
    linear = layer().to(dtype)
    quantized = LLMInt8Linear.from_float(linear, torch.tensor([3, 17]))
    x = activations(dtype)
    x[..., [3, 17]] *= 100
    outcome = fuse(quantized, [x], dialect=dialect, dynamic=dynamic)
    assert outcome.fused == {DYNAMIC: 1, PRODUCT: 1}
    before, after = outcome.report.operators_before, arithmetic(outcome.report.operators_after)
    assert before["aten._int_mm"] == 1
    assert (after[f"npu.{DYNAMIC}"], after[f"npu.{PRODUCT}"], after["aten.mm"], after["aten.add"]) == (1,) * 4
    assert not {"aten.mul", "aten.div", "aten.round", "aten._int_mm"} & set(after)
    assert "smooth_scales" in outcome.code
    exact = x.double() @ linear.weight.double().t() + linear.bias.double()
    fused, eager = ((y.double() - exact).abs().mean() for y in (outcome.result, outcome.expected))
    assert fused <= eager * 1.001


@pytest.mark.parametrize(
    "make",
    [
        lambda linear: W8A8Linear.from_float(linear),
        lambda linear: W8A8Linear.from_float(linear, "per_tensor", "per_tensor"),
    ],
)
def test_fake_quantization_stays_floating(make: Callable[[nn.Linear], nn.Module]) -> None:
    outcome = fuse(make(layer().to(BF16)), [activations()])
    assert outcome.fused == {}
    assert outcome.report.operators_after == outcome.report.operators_before
    assert torch.equal(outcome.result, outcome.expected)
