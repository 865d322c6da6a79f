"""What looks like a W8A8 MLP's middle and is none: not fused, said why, and computed as eager does."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional as F

from tests.passes._harness import DIALECTS, Outcome, fuse, fuse_only
from tests.passes._w8a8 import Spelling

npu = torch.ops.npu
aten = torch.ops.aten

NAME = "dequant_swiglu_quant"
SQUARE = 32
"""Tokens = H, so that a scale of the wrong axis broadcasts."""


def inputs() -> list[Tensor]:
    return Spelling().inputs(tokens=SQUARE)


def refused(outcome: Outcome, *reasons: str, exact: bool = True) -> None:
    """Not fused; one of the refusals says each reason; the result is eager's (Inductor's own decompositions
    of silu and gelu are not exact)."""
    assert "npu_dequant_swiglu_quant" not in outcome.fused
    said = outcome.reasons(NAME)
    for reason in reasons:
        assert any(s.startswith(reason) for s in said), said
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        assert have.dtype == want.dtype
        if exact:
            assert torch.equal(have, want)
        elif have.dtype.is_floating_point:
            torch.testing.assert_close(have, want)
        else:
            assert (have.int() - want.int()).abs().max() <= 1


def alone(fn: Callable[..., Any], args: list[Tensor], **options: Any) -> Outcome:
    return fuse_only(NAME, fn, args, **options)


def dequantize(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor) -> Tensor:
    return torch._int_mm(q, w).float() * ws * ts


def swiglu(d: Tensor) -> Tensor:
    a, b = d.chunk(2, -1)
    return F.silu(a) * b


def to_int8(v: Tensor) -> Tensor:
    return v.round().clamp(-128, 127).to(torch.int8)


def per_token(h: Tensor) -> tuple[Tensor, Tensor]:
    s = h.abs().amax(-1, keepdim=True) / 127
    return to_int8(h / s), s


Parts = dict[str, Callable[..., Any]]


def with_parts(**parts: Callable[..., Any]) -> Callable[..., Any]:
    """The plain chain with one step replaced: ``dequantize``, ``act`` or ``quantize``."""
    steps: Parts = {"dequantize": dequantize, "act": swiglu, "quantize": per_token, **parts}

    def middle(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, *rest: Tensor) -> Any:
        return steps["quantize"](steps["act"](steps["dequantize"](q, w, ws, ts)))

    return middle


def test_the_plain_chain_fuses() -> None:
    outcome = alone(with_parts(), inputs())
    assert outcome.fused == {"npu_dequant_swiglu_quant": 1}


def _scaled(denominator: float) -> Callable[[Tensor], Any]:
    def quantize(h: Tensor) -> Any:
        s = h.abs().amax(-1, keepdim=True) / denominator
        return to_int8(h / s), s

    return quantize


def _asymmetric(h: Tensor) -> Any:
    low, high = h.amin(-1, keepdim=True), h.amax(-1, keepdim=True)
    s = (high - low) / 255
    zero = (-128 - low / s).round()
    return to_int8(h / s + zero), s


def _uint8(h: Tensor) -> Any:
    s = h.abs().amax(-1, keepdim=True) / 127
    return ((h / s).round() + 128).clamp(0, 255).to(torch.uint8), s


def _rounding(rounded: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    def quantize(h: Tensor) -> Any:
        s = h.abs().amax(-1, keepdim=True) / 127
        return rounded(h / s).clamp(-128, 127).to(torch.int8), s

    return quantize


def _maximum(maximum: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    def quantize(h: Tensor) -> Any:
        s = maximum(h) / 127
        return to_int8(h / s), s

    return quantize


def _eps_added(h: Tensor) -> Any:
    s = h.abs().amax(-1, keepdim=True) / 127 + 1e-6
    return to_int8(h / s), s


def _eps_added_to_maximum(h: Tensor) -> Any:
    s = (h.abs().amax(-1, keepdim=True) + 1e-6) / 127
    return to_int8(h / s), s


def _fake_quantized(h: Tensor) -> Any:
    s = h.abs().amax(-1, keepdim=True) / 127
    return ((h / s).round().clamp(-128, 127) * s,)


def _fake_quantized_without_clamp(h: Tensor) -> Any:
    s = h.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return ((h / s).round() * s,)


def _static_clamp(h: Tensor) -> Any:
    return ((h / 0.03).round().clamp(-127, 127).to(torch.int8),)


def _static_no_clamp(h: Tensor) -> Any:
    return ((h / 0.5).round().to(torch.int8),)


def _zero_point_after_rounding(h: Tensor) -> Any:
    return (((h / 0.03125).round() + 3).clamp(-128, 127).to(torch.int8),)


def _clamp_before_zero_point(h: Tensor) -> Any:
    return (((h / 0.03125).clamp(-128, 127) + 3).round().to(torch.int8),)


def _narrower_clamp_inside(h: Tensor) -> Any:
    return ((h / 0.03125).round().clamp(-16, 15).clamp(-128, 127).to(torch.int8),)


def _multiplied(h: Tensor) -> Any:
    s = h.abs().amax(-1, keepdim=True) / 127
    return to_int8(h * s), s


def _rounded_to_uint8(h: Tensor) -> Any:
    s = h.abs().amax(-1, keepdim=True) / 127
    return (h / s).round().clamp(0, 255).to(torch.uint8), s


NOT_ROUNDED = "the values are not rounded half to even before the cast to int8"

QUANTIZATIONS = {
    "127.5": (_scaled(127.5), "the scale is not amax(abs(x)) / 127: the denominator is 127.5"),
    "128": (_scaled(128), "the scale is not amax(abs(x)) / 127: the denominator is 128"),
    "255": (_scaled(255.0), "the scale is not amax(abs(x)) / 127: the denominator is 255"),
    "127.5 by factor": (
        _maximum(lambda h: h.abs().amax(-1, True) * (127 / 127.5)),
        "the scale is not amax(abs(x)) / 127",
    ),
    "asymmetric": (_asymmetric, "the quantization is asymmetric"),
    "uint8": (_rounded_to_uint8, "the quantized type is uint8, the operator's is int8"),
    "uint8 around 128": (_uint8, "the zero point is added after rounding, the operator adds it before"),
    "signed maximum": (
        _maximum(lambda h: h.amax(-1, True)),
        "the quantization is asymmetric: the scale does not come from amax(abs(x))",
    ),
    "floor(x + 0.5)": (_rounding(lambda v: (v + 0.5).floor()), "rounds by floor"),
    "trunc": (_rounding(torch.trunc), "rounds by trunc"),
    "ceil": (_rounding(torch.ceil), "rounds by ceil"),
    "half away from zero": (
        _rounding(lambda v: torch.sign(v) * (v.abs() + 0.5).floor()),
        NOT_ROUNDED,
    ),
    "no rounding": (_rounding(lambda v: v), NOT_ROUNDED),
    "round to one decimal": (
        _rounding(lambda v: v.round(decimals=1)),
        NOT_ROUNDED,
    ),
    "maximum over tokens": (
        _maximum(lambda h: h.abs().amax(0, True)),
        "the scale is not per token: the maximum is not over the last dimension: dimension 0",
    ),
    "maximum over everything": (
        _maximum(lambda h: h.abs().amax()),
        "the scale is not per token: the maximum is not over the last dimension: the whole tensor",
    ),
    "maximum along the wrong axis": (
        _maximum(lambda h: h.abs().amax(-1)),
        "the scale is not applied per token: [32] for [32, 32]",
    ),
    "maximum of something else": (
        _maximum(lambda h: (h + 1).abs().amax(-1, True)),
        "the scale comes from another tensor than the one quantized",
    ),
    "maximum of half the row": (
        _maximum(lambda h: h[:, :16].abs().amax(-1, True)),
        "the scale comes from another tensor than the one quantized",
    ),
    "eps added to the scale": (_eps_added, "eps is added to the scale, which changes every value: 1e-06"),
    "eps added to the maximum": (_eps_added_to_maximum, "eps is added to the scale"),
    "large lower bound": (
        _maximum(lambda h: h.abs().amax(-1, True).clamp(min=3.0)),
        "the scale is not along the last dimension",
    ),
    "multiplied by the scale": (_multiplied, "the values are multiplied by their scale"),
    "clamp to another range": (
        _rounding(lambda v: v.round().clamp(-100, 100)),
        "the clamp is not to the range",
    ),
    "clamp to uint8": (
        _rounding(lambda v: v.round().clamp(0, 255)),
        "the clamp is not to the range of int8: [0,",
    ),
    "fake quantized": (_fake_quantized, "quantized and dequantized again: the next matmul is a floating one"),
    "fake quantized, no clamp": (_fake_quantized_without_clamp, "quantized and dequantized again"),
    "static, symmetric clamp": (_static_clamp, "the clamp is not to the range of int8: [-127, 127]"),
    "static, no clamp": (_static_no_clamp, "the clamp is not to the range of int8: [None, None]"),
    "static, zero point after rounding": (
        _zero_point_after_rounding,
        "the zero point is added after rounding, the operator adds it before",
    ),
    "static, clamp before zero point": (
        _clamp_before_zero_point,
        "the values are clamped before the zero point is added",
    ),
    "static, narrower clamp inside": (
        _narrower_clamp_inside,
        "the clamp is not to the range of int8: [-16, 15]",
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", QUANTIZATIONS)
def test_other_quantization(case: str, dialect: str) -> None:
    quantize, reason = QUANTIZATIONS[case]
    outcome = alone(with_parts(quantize=quantize), inputs(), dialect=dialect)
    refused(outcome, reason, exact=dialect == "aot")


def test_static_scale_per_token_is_not_one_per_channel() -> None:
    """With as many tokens as channels its shape would fit."""
    args = inputs()
    scale = torch.rand(SQUARE, 1) + 0.5
    outcome = alone(with_parts(quantize=lambda h: (to_int8(h / scale),)), args)
    refused(outcome, "the scale is not along the last dimension: [32, 1]")


GATES: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "gelu": (lambda d: F.gelu(d[:, :32]) * d[:, 32:], "the activation is not silu: gelu(gate) * up"),
    "relu": (lambda d: F.relu(d[:, :32]) * d[:, 32:], "the activation is not silu: relu(gate) * up"),
    "sigmoid": (
        lambda d: torch.sigmoid(d[:, :32]) * d[:, 32:],
        "the activation is not silu: sigmoid(gate) * up",
    ),
    "tanh": (lambda d: torch.tanh(d[:, :32]) * d[:, 32:], "the activation is not silu: tanh(gate) * up"),
    "scaled sigmoid": (
        lambda d: d[:, :32] * torch.sigmoid(1.702 * d[:, :32]) * d[:, 32:],
        "the sigmoid's argument is scaled, which swiglu_mode 0 does not do: by 1.702",
    ),
    "gpt-oss": (
        lambda d: (
            (d[:, 32:].clamp(-7, 7) + 1)
            * (d[:, :32].clamp(max=7) * torch.sigmoid(1.702 * d[:, :32].clamp(max=7)))
        ),
        "the sigmoid's argument is scaled",
    ),
    "gate clamped": (
        lambda d: F.silu(d[:, :32].clamp(max=7)) * d[:, 32:],
        "gate or up is clamped, which swiglu_mode 0 does not do",
    ),
    "up clamped": (lambda d: F.silu(d[:, :32]) * d[:, 32:].clamp(-7, 7), "gate or up is clamped"),
    "up clamped, plus one": (
        lambda d: F.silu(d[:, :32]) * (d[:, 32:].clamp(-7, 7) + 1),
        "gate or up is clamped",
    ),
    "unequal parts": (
        lambda d: F.silu(d[:, :24]) * d[:, 24:48],
        "gate and up are not the two equal halves of the last dimension",
    ),
    "overlapping parts": (
        lambda d: F.silu(d[:, :40]) * d[:, 24:],
        "gate and up are not the two equal halves of the last dimension: [0 : 40 : 1] of dimension 1 and",
    ),
    "every second": (
        lambda d: F.silu(d[:, 0::2]) * d[:, 1::2],
        "gate and up are not the two equal halves of the last dimension",
    ),
    "halves of the tokens": (
        lambda d: F.silu(d[:16]) * d[16:],
        "gate and up are not the two equal halves of the last dimension: [0 : 16 : 1] of dimension 0",
    ),
    "the same half twice": (lambda d: F.silu(d[:, :32]) * d[:, :32], "gate and up are the same half"),
    "halves of different tensors": (
        lambda d: F.silu(d[:, :32]) * (d + 1)[:, 32:],
        "gate and up are halves of different tensors",
    ),
}


@pytest.mark.parametrize("case", GATES)
def test_other_gate(case: str) -> None:
    act, reason = GATES[case]
    refused(alone(with_parts(act=act), inputs()), *([reason] if reason else []))


@pytest.mark.parametrize("case", GATES)
def test_other_gate_of_bfloat16(case: str) -> None:
    act, reason = GATES[case]
    outcome = alone(with_parts(act=lambda d: act(d.bfloat16()).float()), inputs())
    refused(outcome, *([reason] if reason else []))


@pytest.mark.parametrize("case", GATES)
def test_other_gate_in_inductors_dialect(case: str) -> None:
    act, _ = GATES[case]
    refused(alone(with_parts(act=act), inputs(), dialect="inductor"), exact=False)


def _float_product(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor) -> Tensor:
    return (q.float() @ w.float()) * ws * ts


def _bfloat16_product(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor) -> Tensor:
    return (q.bfloat16() @ w.bfloat16()).float() * ws * ts


def _two_products(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor) -> Tensor:
    return torch._int_mm(q, w).float() * ws * (torch._int_mm(q, w.flip(0)).float() * 1e-4)


def _product_of_products(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor) -> Tensor:
    return (torch._int_mm(q, w).float() * torch._int_mm(q, w.flip(0)).float()) * (ws * 1e-4) * ts


def _group_wise(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor) -> Tensor:
    scales = (ts * torch.ones(2)).repeat_interleave(32, dim=1)
    return torch._int_mm(q, w).float() * ws * scales


def _no_weight_scale(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor) -> Tensor:
    return torch._int_mm(q, w).float() * (ts * 1.0)


def _bias_between(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor) -> Tensor:
    return (torch._int_mm(q, w).float() * ws + ws) * ts


def _bias_per_token(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor) -> Tensor:
    return torch._int_mm(q, w).float() * ws * ts + ts


def _residual(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor) -> Tensor:
    d = torch._int_mm(q, w).float() * ws * ts
    return d + d.sin()


PRODUCTS = {
    "float32 matmul": (
        _float_product,
        "there is no int32 product: the matmul is done in floating point: mm gives",
    ),
    "bfloat16 matmul": (_bfloat16_product, "there is no int32 product: the matmul is done in floating point"),
    "two products, one scaled": (_two_products, "a scale is neither per output channel nor per token"),
    "product of products": (_product_of_products, "two int32 products are multiplied with each other"),
    "group-wise scale": (_group_wise, "a scale is neither per output channel nor per token"),
    "no weight scale": (_no_weight_scale, "the int32 product has no weight scale"),
    "bias between the scales": (
        _bias_between,
        "the value before swiglu is no scaled int32 product: it is add",
    ),
    "bias per token": (_bias_per_token, "the value before swiglu is no scaled int32 product: it is add"),
    "residual": (_residual, "the value before swiglu is no scaled int32 product: it is add"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", PRODUCTS)
def test_other_product(case: str, dialect: str) -> None:
    product, reason = PRODUCTS[case]
    refused(alone(with_parts(dequantize=product), inputs(), dialect=dialect), reason, exact=dialect == "aot")


def test_scale_of_tokens_that_broadcasts_along_channels_stays_one_of_channels() -> None:
    """[T] without unsqueeze, T = 2H: eager scales channels by it, so does the fused operator."""
    spelling = Spelling()
    args = spelling.inputs(tokens=64)
    args[3] = args[3].flatten()
    outcome = alone(with_parts(), args)
    assert outcome.fused == {"npu_dequant_swiglu_quant": 1}
    assert (outcome.result[0].int() - outcome.expected[0].int()).abs().max() <= 1
    torch.testing.assert_close(outcome.result[1], outcome.expected[1])


def test_gate_and_up_from_two_matmuls() -> None:
    def separate(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, *rest: Tensor) -> Any:
        gate = torch._int_mm(q, w[:, :32].contiguous()).float() * ws[:32] * ts
        up = torch._int_mm(q, w[:, 32:].contiguous()).float() * ws[32:] * ts
        return per_token(F.silu(gate) * up)

    outcome = alone(separate, inputs())
    refused(outcome, "gate and up are two separate matmuls of the same input: npu_fusion.prepare(model)")


INTERMEDIATES = (
    "floats",
    "by channel",
    "dequantized",
    "gate",
    "up",
    "activated",
    "gated",
    "absolute",
    "maximum",
    "quotient",
    "rounded",
    "clamped",
)


def _with_intermediates(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor) -> dict[str, Tensor]:
    v = {"product": torch._int_mm(q, w)}
    v["floats"] = v["product"].float()
    v["by channel"] = v["floats"] * ws
    v["dequantized"] = v["by channel"] * ts
    v["gate"], v["up"] = v["dequantized"].chunk(2, -1)
    v["activated"] = F.silu(v["gate"])
    v["gated"] = v["activated"] * v["up"]
    v["absolute"] = v["gated"].abs()
    v["maximum"] = v["absolute"].amax(-1, keepdim=True)
    v["scale"] = v["maximum"] / 127
    v["quotient"] = v["gated"] / v["scale"]
    v["rounded"] = v["quotient"].round()
    v["clamped"] = v["rounded"].clamp(-128, 127)
    v["y"] = v["clamped"].to(torch.int8)
    return v


@pytest.mark.parametrize("name", INTERMEDIATES)
def test_second_user(name: str) -> None:
    def middle(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, *rest: Tensor) -> Any:
        values = _with_intermediates(q, w, ws, ts)
        return values["y"], values["scale"], values[name].cos()

    refused(
        alone(middle, inputs()),
        "an intermediate value that the fused operator does not return has a second user",
    )


@pytest.mark.parametrize("name", INTERMEDIATES)
def test_intermediate_returned(name: str) -> None:
    def middle(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, *rest: Tensor) -> Any:
        values = _with_intermediates(q, w, ws, ts)
        return values["y"], values["scale"], values[name]

    refused(
        alone(middle, inputs()),
        "an intermediate value that the fused operator does not return has a second user",
    )


@pytest.mark.parametrize(
    "returned", [("y", "product"), ("y",), ("product", "scale", "y"), ("y", "scale", "scale")]
)
def test_other_users_of_product_and_results_are_fine(returned: tuple[str, ...]) -> None:
    def middle(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, *rest: Tensor) -> Any:
        values = _with_intermediates(q, w, ws, ts)
        return [values[name] + 1 for name in returned]

    outcome = alone(middle, inputs(), numerics="strict")
    assert outcome.fused == {"npu_dequant_swiglu_quant": 1}
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        assert torch.equal(have, want)


def _label_streams(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta["stream_label"] = "cube" if node.target is aten.silu.default else "vector"


def test_different_streams() -> None:
    outcome = alone(with_parts(), inputs(), prepare_graph=_label_streams)
    refused(outcome, "the nodes run on different streams: stream labels 'cube', 'vector'")


def _write_weight_scale(graph: fx.Graph) -> None:
    """``ws.copy_(ws)`` after its last reader but before the region ends."""
    silu = next(n for n in graph.nodes if n.target is aten.silu.default)
    scale = [n for n in graph.nodes if n.op == "placeholder"][2]
    with graph.inserting_after(silu):
        graph.call_function(aten.copy_.default, (scale, scale)).meta["val"] = scale.meta["val"]


def test_input_written_in_between() -> None:
    outcome = alone(with_parts(), inputs(), prepare_graph=_write_weight_scale)
    refused(outcome, "an input is written in between: copy_")


def _write_through_a_view(graph: fx.Graph) -> None:
    """One of the parts of ``ws`` is multiplied by one in place."""
    silu = next(n for n in graph.nodes if n.target is aten.silu.default)
    scale = [n for n in graph.nodes if n.op == "placeholder"][2]
    parts = aten.split.Tensor(scale.meta["val"], 32)
    with graph.inserting_before(silu.next):
        split = graph.call_function(aten.split.Tensor, (scale, 32))
        part = graph.call_function(operator.getitem, (split, 1))
        written = graph.call_function(aten.mul_.Tensor, (part, 1.0))
    split.meta["val"] = parts
    part.meta["val"] = written.meta["val"] = parts[1]


def test_input_written_through_a_view() -> None:
    outcome = alone(with_parts(), inputs(), prepare_graph=_write_through_a_view)
    refused(outcome, "an input is written in between: mul_")


def test_training_graph() -> None:
    outcome = alone(with_parts(), inputs(), inference=False)
    assert outcome.fused == {}
    assert outcome.reasons("all") == ["the graph is traced for training: run the model under torch.no_grad()"]
    assert all(map(torch.equal, outcome.result, outcome.expected))


def test_flag_off() -> None:
    outcome = fuse(with_parts(), inputs(), dequant_swiglu_quant=False, swiglu_quant=False)
    refused(outcome)
    assert outcome.reasons(NAME) == []


@pytest.mark.parametrize("target", ["ascend910b", "ascend910_93", "ascend950"])
def test_alignment_of_the_target(target: str) -> None:
    spelling = Spelling()
    args = spelling.inputs()
    assert alone(spelling.function(), args, target=target).fused == {"npu_dequant_swiglu_quant": 1}
    narrow = [
        args[0],
        args[1][:, :48].contiguous(),
        args[2][:48],
        args[3],
        args[4][:48],
        args[5][:24],
        args[6],
    ]
    assert alone(spelling.function(), narrow).fused == {"npu_dequant_swiglu_quant": 1}
    outcome = alone(spelling.function(), narrow, target=target)
    refused(outcome, "the last dimension is not a multiple of 64: it is 48")


def test_float_bias_on_a_target() -> None:
    spelling = Spelling(bias="float32")
    refused(
        alone(spelling.function(), spelling.inputs(), target="ascend910b"),
        "the operator documents an int32 bias only: float32",
    )


@settings(max_examples=25, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    st.sampled_from(("denominator", "low", "high", "factor")),
    st.floats(-0.5, 0.5).filter(lambda d: abs(d) > 1e-2),
)
def test_one_constant_changed(which: str, by: float) -> None:
    denominator, low, high, factor = (
        value + (by if which == name else 0)
        for name, value in {"denominator": 127.0, "low": -128.0, "high": 127.0, "factor": 1.0}.items()
    )

    def quantize(h: Tensor) -> Any:
        s = h.abs().amax(-1, keepdim=True) / denominator
        return (h / s * factor).round().clamp(low, high).to(torch.int8), s

    outcome = alone(with_parts(quantize=quantize), inputs())
    refused(outcome)
    assert outcome.fused == {}
