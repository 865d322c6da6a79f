"""The MLP as models with torch_npu operators write it, the gate's limits, and what a rewrite leaves alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from npu_fusion.config import FusionConfig
from npu_fusion.passes import pipeline
from npu_fusion.passes.pattern import FUSIONS, Context, Match, Refused
from npu_fusion.passes.pipeline import FusionError
from npu_fusion.passes.terms import Term
from tests.passes._harness import DIALECTS, Outcome, fuse, fuse_only
from tests.passes._w8a8 import Spelling

npu = torch.ops.npu

NAME = "dequant_swiglu_quant"
OPERATOR = "npu_dequant_swiglu_quant"
TOKENS, HIDDEN, INTERMEDIATE = 32, 48, 32
BFLOAT16 = torch.bfloat16


class Layer:
    """A W8A8 MLP in torch_npu's operators; ``options`` are more arguments of its calls."""

    def __init__(
        self, native: bool = False, lead: tuple[int, ...] = (TOKENS,), **options: dict[str, Any]
    ) -> None:
        self.native = native
        self.lead = lead
        self.options = options

    def inputs(self, channel_dtype: torch.dtype = torch.float32) -> list[Tensor]:
        g = torch.Generator().manual_seed(1)
        x = torch.randn(*self.lead, HIDDEN, generator=g).to(BFLOAT16)
        up = torch.randint(-127, 128, (HIDDEN, 2 * INTERMEDIATE), generator=g, dtype=torch.int8)
        down = torch.randint(-127, 128, (INTERMEDIATE, HIDDEN), generator=g, dtype=torch.int8)
        up_scale = (torch.rand(2 * INTERMEDIATE, generator=g) + 0.5) * 3e-3
        down_scale = (torch.rand(HIDDEN, generator=g) + 0.5) * 3e-3
        return [x, up, up_scale.to(channel_dtype), down, down_scale.to(channel_dtype)]

    def _call(self, which: str, operator: Any, *args: Any, **kwargs: Any) -> Any:
        return operator(*args, **{**kwargs, **self.options.get(which, {})})

    def __call__(self, x: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor) -> Tensor:
        x2 = x.view(-1, x.shape[-1])
        q, s = self._call("quantize_input", npu.npu_dynamic_quant, x2, dst_type=torch.int8)
        d = self._call(
            "up", npu.npu_quant_matmul, q, up, up_scale, pertoken_scale=s.view(-1), output_dtype=BFLOAT16
        )
        d = d.view(*x.shape[:-1], d.shape[-1])
        if self.native:
            h = F.silu(d[..., :INTERMEDIATE]) * d[..., INTERMEDIATE:]
        else:
            h = self._call("swiglu", npu.npu_swiglu, d)
        q, s = self._call("quantize", npu.npu_dynamic_quant, h, dst_type=torch.int8)
        y = self._call(
            "down",
            npu.npu_quant_matmul,
            q.view(-1, q.shape[-1]),
            down,
            down_scale,
            pertoken_scale=s.view(-1),
            output_dtype=BFLOAT16,
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    def exact(self, args: list[Tensor]) -> Tensor:
        """The layer in float64, but for the quantization of its input."""
        x, up, up_scale, down, down_scale = args
        first = self.options.get("quantize_input", {})
        q, s = npu.npu_dynamic_quant(x.view(-1, HIDDEN), **first)
        bias = self.options.get("up", {}).get("bias")
        p = q.double() @ up.double()
        if bias is not None and bias.dtype == torch.int32:
            p = p + bias
        d = p * up_scale.double() * s.double().view(-1, 1)
        if bias is not None and bias.dtype != torch.int32:
            d = d + bias.double()
        h = F.silu(d[:, :INTERMEDIATE]) * d[:, INTERMEDIATE:]
        smooth = self.options.get("quantize", {}).get("smooth_scales")
        if smooth is not None:
            h = h * smooth.double()
        return ((h @ down.double()) * down_scale.double()).view(*self.lead, HIDDEN)


def fused_layer(layer: Layer, outcome: Outcome, args: list[Tensor]) -> None:
    assert outcome.fused == {OPERATOR: 1}, outcome.reasons(NAME)
    (record,) = outcome.report.fusions
    assert record.level == "accurate"
    after = outcome.report.operators_after
    assert after[f"npu.{OPERATOR}"] == 1
    assert after["npu.npu_dynamic_quant"] == 1 and after["npu.npu_quant_matmul"] == 2
    assert not {"npu.npu_swiglu", "aten.silu", "aten.exp"} & set(after)
    exact = layer.exact(args)
    fused, eager = ((r.double() - exact).abs().mean() for r in (outcome.result, outcome.expected))
    assert fused <= eager * 1.01


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("channel_dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("native", [False, True])
def test_operators_of_torch_npu(
    native: bool, channel_dtype: torch.dtype, dialect: str, dynamic: bool
) -> None:
    layer = Layer(native)
    args = layer.inputs(channel_dtype)
    fused_layer(layer, fuse(layer, args, dialect=dialect, dynamic=dynamic), args)


def _smooth(size: int) -> Tensor:
    return (torch.rand(size, generator=torch.Generator().manual_seed(2)) + 0.5).to(BFLOAT16)


def _bias(dtype: torch.dtype) -> Tensor:
    bias = torch.randn(2 * INTERMEDIATE, generator=torch.Generator().manual_seed(3))
    return (bias * 3e3).int() if dtype == torch.int32 else bias.to(dtype)


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "smooth scales": {"quantize": {"smooth_scales": _smooth(INTERMEDIATE)}},
    "smooth scales, both": {
        "quantize": {"smooth_scales": _smooth(INTERMEDIATE)},
        "quantize_input": {"smooth_scales": _smooth(HIDDEN)},
    },
    "int32 bias": {"up": {"bias": _bias(torch.int32)}},
    "bfloat16 bias": {"up": {"bias": _bias(BFLOAT16)}},
    "float32 bias": {"up": {"bias": _bias(torch.float32)}},
    "dtype as number": {"up": {"output_dtype": 15}, "quantize": {"dst_type": 1}},
    "no dtype": {"quantize": {"dst_type": None}},
}


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("lead", [(TOKENS,), (2, TOKENS // 2)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, lead: tuple[int, ...], native: bool) -> None:
    layer = Layer(native, lead, **VARIANTS[variant])
    args = layer.inputs()
    fused_layer(layer, fuse(layer, args), args)


def test_strict_leaves_roundings_alone() -> None:
    layer = Layer()
    outcome = fuse(layer, layer.inputs(), numerics="strict")
    assert OPERATOR not in outcome.fused
    (reason,) = outcome.reasons(NAME)
    assert reason.startswith("numerics='strict' does not allow the difference: ") and "bfloat16" in reason
    assert torch.equal(outcome.result, outcome.expected)


OTHER_ARGUMENTS: dict[str, tuple[dict[str, dict[str, Any]], bool]] = {
    "npu_dynamic_quant(smooth_scales)": ({"quantize": {"smooth_scales": _smooth(INTERMEDIATE)}}, True),
    "npu_dynamic_quant(group_index)": (
        {
            "quantize": {
                "smooth_scales": torch.stack([_smooth(INTERMEDIATE), 2 * _smooth(INTERMEDIATE).flip(0)]),
                "group_index": torch.tensor([10, TOKENS], dtype=torch.int32),
            }
        },
        False,
    ),
    "npu_dynamic_quant(quant_mode)": ({"quantize": {"quant_mode": "pertensor"}}, False),
    "npu_quant_matmul(no pertoken_scale)": ({"up": {"pertoken_scale": None}}, True),
    "npu_quant_matmul(bias)": ({"up": {"bias": _bias(torch.int32)}}, True),
    "npu_quant_matmul(output_dtype)": ({"up": {"output_dtype": torch.float16}}, True),
    "npu_quant_matmul(scale)": ({"up": {"scale": torch.full((1,), 3e-3)}}, True),
}


@pytest.mark.parametrize("case", OTHER_ARGUMENTS)
def test_no_argument_is_ignored(case: str) -> None:
    """Either carried over, or not fused: eager's result in any case."""
    options, fuses = OTHER_ARGUMENTS[case]
    up = options.get("up", {})
    scale = up.get("scale")
    layer = Layer(up={k: v for k, v in up.items() if k != "scale"}, quantize=options.get("quantize", {}))
    args = layer.inputs()
    args[2] = args[2] if scale is None else scale
    if up.get("pertoken_scale", 0) is None:
        args[2] = args[2] / 32

    def middle(x: Tensor, up: Tensor, up_scale: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        q, s = npu.npu_dynamic_quant(x)
        options = {"pertoken_scale": s, "output_dtype": BFLOAT16, **layer.options["up"]}
        h = npu.npu_swiglu(npu.npu_quant_matmul(q, up, up_scale, **options))
        return npu.npu_dynamic_quant(h, **layer.options["quantize"])

    outcome = fuse_only(NAME, middle, args)
    assert outcome.fused == ({OPERATOR: 1} if fuses else {})
    (y, scale_out), (want, want_scale) = outcome.result, outcome.expected
    torch.testing.assert_close(scale_out, want_scale, rtol=2e-2, atol=1e-6)
    assert (y.int() - want.int()).abs().max() <= 2


@pytest.mark.parametrize(
    "options,reason",
    [
        ({"group_index": torch.tensor([TOKENS]).int(), "smooth_scales": _smooth(INTERMEDIATE)[None]},
         "group_index of npu_dynamic_quant is a running sum, the fused operator takes counts"),
        ({"quant_mode": "pertensor"}, "npu_dynamic_quant is called in another mode: quant_mode='pertensor'"),
        ({"dst_type": torch.quint4x2}, "the quantized type is not int8: dst_type="),
    ],
    ids=["group_index", "quant_mode", "dst_type"],
)  # fmt: skip
def test_other_modes_of_dynamic_quant(options: dict[str, Any], reason: str) -> None:
    def middle(x: Tensor, up: Tensor, up_scale: Tensor) -> Any:
        q, s = npu.npu_dynamic_quant(x)
        d = npu.npu_quant_matmul(q, up, up_scale, pertoken_scale=s, output_dtype=BFLOAT16)
        return npu.npu_dynamic_quant(npu.npu_swiglu(d), **options)

    outcome = fuse_only(NAME, middle, Layer().inputs()[:3])
    assert outcome.fused == {}
    (said,) = outcome.reasons(NAME)
    assert said.startswith(reason)
    assert all(map(torch.equal, outcome.result, outcome.expected))


def _packed_scale(x: Tensor, up: Tensor, up_scale: Tensor) -> Tensor:
    q, _ = npu.npu_dynamic_quant(x)
    packed = (up_scale / 32).view(torch.int32).long()
    return npu.npu_quant_matmul(q, up, packed, output_dtype=torch.float16)


def _offset(x: Tensor, up: Tensor, up_scale: Tensor) -> Tensor:
    q, _ = npu.npu_dynamic_quant(x)
    offset = torch.full_like(up_scale, 2.0)
    return npu.npu_quant_matmul(q, up, up_scale / 32, offset=offset).to(torch.float16)


def _swiglu_over_tokens(x: Tensor, up: Tensor, up_scale: Tensor) -> Tensor:
    q, s = npu.npu_dynamic_quant(x)
    d = npu.npu_quant_matmul(q, up, up_scale, pertoken_scale=s, output_dtype=BFLOAT16)
    return npu.npu_swiglu(d, dim=0).repeat(1, 2)


@pytest.mark.parametrize("product", [_packed_scale, _offset])
def test_other_calls_of_quant_matmul(product: Callable[..., Tensor]) -> None:
    def middle(*args: Tensor) -> Any:
        return npu.npu_dynamic_quant(npu.npu_swiglu(product(*args)))

    outcome = fuse_only(NAME, middle, Layer().inputs()[:3])
    assert outcome.fused == {}
    (said,) = outcome.reasons(NAME)
    assert "int32 product" in said
    assert all(map(torch.equal, outcome.result, outcome.expected))


def test_swiglu_over_another_dimension() -> None:
    def middle(*args: Tensor) -> Any:
        return npu.npu_dynamic_quant(_swiglu_over_tokens(*args))

    outcome = fuse_only(NAME, middle, Layer().inputs()[:3])
    assert outcome.fused == {}
    assert all(map(torch.equal, outcome.result, outcome.expected))


@pytest.mark.parametrize("bias", [None, torch.int32, torch.float32, BFLOAT16])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_dequant_bias(bias: torch.dtype | None, dialect: str) -> None:
    given = None if bias is None else _bias(bias)

    def middle(x: Tensor, up: Tensor, up_scale: Tensor) -> Any:
        q, s = npu.npu_dynamic_quant(x)
        product = npu.npu_quant_matmul(q, up, up_scale, output_dtype=torch.int32)
        d = npu.npu_dequant_bias(product, up_scale, s, given, output_dtype=BFLOAT16)
        return npu.npu_dynamic_quant(npu.npu_swiglu(d))

    outcome = fuse(middle, Layer().inputs(BFLOAT16)[:3], dialect=dialect)
    assert outcome.fused == {OPERATOR: 1}, outcome.reasons(NAME)
    assert "npu.npu_dequant_bias" not in outcome.report.operators_after
    assert (outcome.result[0].int() - outcome.expected[0].int()).abs().max() <= 2


@pytest.mark.parametrize("divides", [True, False])
@pytest.mark.parametrize("size", [1, INTERMEDIATE])
@pytest.mark.parametrize("offset", [False, True])
def test_npu_quantize(divides: bool, size: int, offset: bool) -> None:
    scale = torch.linspace(0.02, 0.05, size)
    zero = torch.linspace(-5, 5, size).round() if offset else None

    def middle(x: Tensor, up: Tensor, up_scale: Tensor) -> Any:
        q, s = npu.npu_dynamic_quant(x)
        d = npu.npu_quant_matmul(q, up, up_scale, pertoken_scale=s, output_dtype=BFLOAT16)
        given = scale if divides else 1 / scale
        return (npu.npu_quantize(npu.npu_swiglu(d), given, zero, torch.int8, -1, divides),)

    outcome = fuse(middle, Layer().inputs()[:3])
    assert outcome.fused == {OPERATOR: 1}, outcome.reasons(NAME)
    assert "npu.npu_quantize" not in outcome.report.operators_after
    (have,), (want,) = outcome.result, outcome.expected
    assert (have.int() - want.int()).abs().max() <= 2
    assert (have != want).float().mean() < 0.2 and want.unique().numel() > 20


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_all_layers_read_one_zero_offset(dynamic: bool, dialect: str) -> None:
    """The operator demands an offset beside a static scale: one of zeros for all layers of a width."""
    plain = Spelling(static="x / vector")
    layer = plain.function()

    def twice(first: list[Tensor], second: list[Tensor]) -> tuple[Tensor, Tensor]:
        return layer(*first)[0], layer(*second)[0]

    args = [plain.inputs(seed) for seed in (0, 1)]
    outcome = fuse(twice, args, dialect=dialect, dynamic=dynamic)
    assert outcome.fused == {"npu_dequant_swiglu_quant": 2}
    after = outcome.report.operators_after
    assert after["aten.full"] == 1
    assert "aten.zeros_like" not in after
    for result, expected in zip(outcome.result, outcome.expected, strict=True):
        assert (result.int() - expected.int()).abs().max() <= 1


def test_duplicated_quantization_is_replaced_together() -> None:
    def middle(p: Tensor, ws: Tensor, ts: Tensor) -> Any:
        a, b = (p.float() * ws * ts).chunk(2, -1)
        h = F.silu(a) * b
        results = []
        for _ in range(3):
            s = h.abs().amax(-1, keepdim=True) / 127
            results += [(h / s).round().clamp(-128, 127).to(torch.int8), s]
        return results

    q, w, ws, ts, *_ = Spelling().inputs()
    outcome = fuse(middle, [torch._int_mm(q, w), ws, ts], numerics="strict")
    assert outcome.fused == {OPERATOR: 1}
    assert all(map(torch.equal, outcome.result, outcome.expected))
    assert outcome.report.operators_after[f"npu.{OPERATOR}"] == 1


def test_zero_rows() -> None:
    """Eager divides zero by zero; the operator gives 0, which is what the guards of real models are for."""
    spelling = Spelling(maximum_guard="clamp_min")
    args = spelling.inputs()
    args[0][3] = 0
    outcome = fuse(spelling.function(), args)
    assert outcome.fused == {OPERATOR: 1}
    assert torch.equal(outcome.result[0][3], outcome.expected[0][3])
    assert outcome.result[1][3] == 0


def test_golden_of_op_plugin() -> None:
    """Scale and factor from one maximum, without keepdim, clamped before rounding."""

    def golden(p: Tensor, ws: Tensor, ts: Tensor, smooth: Tensor) -> Any:
        d = p.to(torch.float32) * ws * ts
        a, b = d.chunk(2, dim=-1)
        h = F.silu(a) * b * smooth
        largest = torch.amax(h.abs(), dim=-1)
        scale = largest / 127
        y = h * (1 / largest * 127).unsqueeze(1)
        return torch.round(torch.clamp(y, -128, 127)).to(torch.int8), scale

    q, w, ws, ts, _, smooth, _ = Spelling().inputs()
    outcome = fuse(golden, [torch._int_mm(q, w), ws, ts, smooth])
    assert outcome.fused == {OPERATOR: 1}
    assert torch.equal(outcome.result[1], outcome.expected[1])
    assert (outcome.result[0].int() - outcome.expected[0].int()).abs().max() <= 1


def test_golden_of_vllm_ascend() -> None:
    """Rounded to bfloat16 and widened again twice over."""

    def golden(p: Tensor, ws: Tensor, ts: Tensor) -> Any:
        d = p.to(torch.float32) * ws.view(1, -1) * ts.view(-1, 1)
        h = F.silu(d[:, :INTERMEDIATE]) * d[:, INTERMEDIATE:]
        rounded = h.to(BFLOAT16)
        scale = rounded.to(torch.float32).abs().amax(dim=-1) / 127.0
        y = torch.clamp(torch.round(rounded.to(torch.float32) / scale.unsqueeze(-1)), -128, 127)
        return y.to(torch.int8), scale

    q, w, ws, ts, *_ = Spelling().inputs()
    outcome = fuse(golden, [torch._int_mm(q, w), ws, ts.flatten()])
    assert outcome.fused == {OPERATOR: 1}
    assert (outcome.result[0].int() - outcome.expected[0].int()).abs().max() <= 1


def test_memory_gate_counts_only_new_products() -> None:
    layer = Layer()
    args = layer.inputs()
    row = 4 * 2 * INTERMEDIATE
    assert fuse(layer, args, int32_bytes_per_token=row).fused == {OPERATOR: 1}
    outcome = fuse(layer, args, int32_bytes_per_token=row - 1)
    assert OPERATOR not in outcome.fused
    assert outcome.reasons(NAME) == [
        "the int32 product needs more bytes per token than int32_bytes_per_token allows: "
        f"4 x {2 * INTERMEDIATE} bytes, limit {row - 1}"
    ]
    assert fuse(layer, args, int32_product_bytes=row * TOKENS).fused == {OPERATOR: 1}
    outcome = fuse(layer, args, int32_product_bytes=row * TOKENS - 1)
    (reason,) = outcome.reasons(NAME)
    assert reason.startswith(
        "the int32 product needs more bytes than int32_product_bytes allows: up to 8192 bytes"
    )
    plain = Spelling()
    assert fuse(plain.function(), plain.inputs(), int32_product_bytes=0, int32_bytes_per_token=0).fused == {
        OPERATOR: 1
    }


def test_memory_gate_of_symbolic_sizes() -> None:
    layer = Layer()
    args = layer.inputs()
    torch._dynamo.mark_static(args[1])
    torch._dynamo.mark_dynamic(args[0], 0, min=2, max=64)
    limit = 4 * 2 * INTERMEDIATE * 64
    assert fuse(layer, args, dynamic=None, int32_product_bytes=limit).fused == {OPERATOR: 1}
    (reason,) = fuse(layer, args, dynamic=None, int32_product_bytes=limit - 1).reasons(NAME)
    assert f"up to {limit} bytes" in reason
    args = layer.inputs()
    torch._dynamo.mark_static(args[1])
    torch._dynamo.mark_dynamic(args[0], 0)
    (reason,) = fuse(layer, args, dynamic=None, int32_product_bytes=limit).reasons(NAME)
    assert "unbounded" in reason
    assert fuse(layer, args, dynamic=None, int32_bytes_per_token=4 * 2 * INTERMEDIATE).fused == {OPERATOR: 1}


def test_dry_run_counts_and_changes_nothing() -> None:
    spelling = Spelling()
    args = spelling.inputs()
    real = fuse(spelling.function(), args)
    dry = fuse(spelling.function(), args, dry_run=True)
    assert dry.fused == real.fused == {OPERATOR: 1}
    assert dry.code == dry.before == real.before != real.code
    assert dry.report.operators_after == dry.report.operators_before
    assert dry.report.fusions[0].nodes == real.report.fusions[0].nodes and not dry.report.fusions[0].emitted
    layer = Layer()
    assert fuse(layer, layer.inputs(), dry_run=True).fused == fuse(layer, layer.inputs()).fused


def test_a_graph_with_nothing_to_fuse_is_left_as_it_is() -> None:
    kept: list[tuple[fx.Graph, list[fx.Node]]] = []

    def plain(q: Tensor, w: Tensor, ws: Tensor) -> Tensor:
        return torch._int_mm(q, w).float() * ws + ws.sum()

    outcome = fuse(plain, Spelling().inputs()[:3], prepare_graph=lambda g: kept.append((g, list(g.nodes))))
    ((graph, nodes),) = kept
    assert outcome.fused == {} and outcome.code == outcome.before
    assert all(a is b for a, b in zip(graph.nodes, nodes, strict=True))
    assert torch.equal(outcome.result, outcome.expected)


def _failing_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replacement is half built when it raises."""
    fusion = FUSIONS[NAME]
    matched = type(fusion).match

    def match(self: Any, term: Term, context: Context) -> Match | Refused | None:
        found = matched(self, term, context)
        if isinstance(found, Match):
            build = found.build

            def failing(emitter: Any) -> Any:
                build(emitter)
                raise RuntimeError("no luck")

            found.build = failing
        return found

    monkeypatch.setattr(type(fusion), "match", match)


def test_a_failing_build_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    _failing_build(monkeypatch)
    spelling = Spelling()
    with pytest.warns(RuntimeWarning, match="was undone: dequant_swiglu_quant: RuntimeError: no luck"):
        outcome = fuse_only(NAME, spelling.function(), spelling.inputs(), strict=False)
    assert outcome.fused == {} and outcome.code == outcome.before
    assert outcome.report.failures == ["dequant_swiglu_quant: RuntimeError: no luck"]
    assert all(map(torch.equal, outcome.result, outcome.expected))


def test_a_failing_build_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    _failing_build(monkeypatch)
    spelling = Spelling()
    with pytest.warns(RuntimeWarning, match="no luck"):
        outcome = fuse(spelling.function(), spelling.inputs(), strict=False)
    assert outcome.fused and OPERATOR not in outcome.fused
    assert (outcome.result[0].int() - outcome.expected[0].int()).abs().max() <= 1


def test_a_failing_build_raises_in_strict_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    _failing_build(monkeypatch)
    spelling = Spelling()
    with pytest.raises(Exception, match="no luck") as raised:
        fuse_only(NAME, spelling.function(), spelling.inputs())
    chain: list[BaseException | None] = [raised.value]
    while chain[-1] is not None:
        chain.append(chain[-1].__cause__ or getattr(chain[-1], "inner_exception", None))
    assert any(isinstance(error, FusionError) for error in chain)


def test_two_models_do_not_meet() -> None:
    """The same graph twice with different settings, one after the other in one process."""
    spelling = Spelling(activation="x * sigmoid(x)")
    args = spelling.inputs()
    first = fuse(spelling.function(), args)
    second = fuse(spelling.function(), args, numerics="strict")
    third = fuse(spelling.function(), args)
    assert first.fused == third.fused == {OPERATOR: 1} and OPERATOR not in second.fused
    assert first.code == third.code
    assert [r.reason for r in first.report.refused] == [r.reason for r in third.report.refused]


def test_two_layers_in_one_graph() -> None:
    layer = Layer()
    args = layer.inputs()

    def both(*args: Tensor) -> Tensor:
        return layer(layer(*args), *args[1:])

    outcome = fuse(both, args)
    assert outcome.fused == {OPERATOR: 2}
    assert len({f.nodes for f in outcome.report.fusions}) == 2
    difference = (outcome.result.float() - outcome.expected.float()).abs().max()
    assert difference <= 0.05 * outcome.expected.float().abs().max()


def test_verify_runs_region_and_replacement() -> None:
    spelling = Spelling()
    assert fuse(spelling.function(), spelling.inputs(), verify=True).fused == {OPERATOR: 1}
    layer = Layer()
    assert fuse(layer, layer.inputs(), verify=True).fused == {OPERATOR: 1}


def test_the_pipeline_is_quiet() -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = pipeline.run(graph, FusionConfig(strict=True))
    assert report.fused == {} and report.refused == []
