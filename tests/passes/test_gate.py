"""What the gate guarantees for every fusion: no lost input, memory, layout, devices, undoing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from npu_fusion.config import FusionConfig
from npu_fusion.passes import pipeline
from npu_fusion.passes.pattern import FUSIONS, Context, Match
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import Term, TermGraph
from tests.passes._harness import fuse

aten = torch.ops.aten


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def test_a_transposed_result_keeps_what_follows_working() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y = swiglu(
            x.transpose(1, 2)
        )  # the source's result keeps the transposed layout, the operator's does not
        return y.transpose(1, 2).reshape(2, -1)

    outcome = fuse(model, [torch.randn(2, 8, 6)])
    assert outcome.fused == {"npu_swiglu": 1}
    torch.testing.assert_close(outcome.result, outcome.expected)


def quantized(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale).clamp(-128, 127).to(torch.int8)


def _zero_input_after(target: Any) -> Any:
    """An edit that overwrites the graph's input right after the first node with this target."""

    def write(graph: fx.Graph) -> None:
        x = next(n for n in graph.nodes if n.op == "placeholder")
        with graph.inserting_after(next(n for n in graph.nodes if n.target is target)):
            zero = graph.call_function(aten.zero_.default, (x,))
            zero.meta["val"] = x.meta["val"]

    return write


def test_an_input_written_before_the_result_is_complete_is_refused() -> None:
    # the last read of x is the division: the operator would read x where its result is, after the write
    outcome = fuse(quantized, [torch.randn(3, 8)], prepare_graph=_zero_input_after(aten.round.default))
    assert outcome.fused == {}
    assert outcome.reasons("dynamic_quant") == ["an input is written in between: zero__default writes arg0_1"]
    assert torch.equal(outcome.result, outcome.expected)


def test_an_input_written_between_two_reads_is_another_value() -> None:
    outcome = fuse(swiglu, [torch.randn(3, 8)], prepare_graph=_zero_input_after(aten.silu.default))
    assert outcome.fused == {}


def test_equal_reads_before_and_after_a_write_are_not_one_term() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.randn(4)

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = x.meta["val"]
        return node

    before, again = call(aten.silu.default, x), call(aten.silu.default, x)
    call(aten.add_.Tensor, x, 1)
    after = call(aten.silu.default, x)
    graph.output((before, again, after))
    view = TermGraph(graph)
    assert view.of[before] is view.of[again]
    assert view.of[before] is not view.of[after]


def test_a_result_read_with_as_strided_is_refused() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return swiglu(x).as_strided((2, 2), (1, 2))

    outcome = fuse(model, [torch.randn(3, 8)])
    assert outcome.fused == {}
    assert outcome.reasons("swiglu") == ["the result is read by its memory layout: as_strided reads mul"]
    assert torch.equal(outcome.result, outcome.expected)


def test_streams_are_not_crossed() -> None:
    def label(graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "call_function":
                node.meta["stream_label"] = "b" if node.target is aten.mul.Tensor else "a"

    outcome = fuse(swiglu, [torch.randn(3, 8)], prepare_graph=label)
    assert outcome.fused == {}
    assert outcome.reasons("swiglu") == ["the nodes run on different streams: stream labels 'a', 'b'"]


def test_labels_are_inherited() -> None:
    graphs: list[fx.Graph] = []

    def label(graph: fx.Graph) -> None:
        graphs.append(graph)
        for node in graph.nodes:
            node.meta["stream_label"] = "s1"

    assert fuse(swiglu, [torch.randn(3, 8)], prepare_graph=label).fused == {"npu_swiglu": 1}
    made = [n for n in graphs[0].nodes if n.target is torch.ops.npu.npu_swiglu.default]
    assert [n.meta["stream_label"] for n in made] == ["s1"]
    assert "swiglu" in made[0].meta["stack_trace"]


def test_a_device_without_a_kernel_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    with torch._subclasses.FakeTensorMode():
        x.meta["val"] = torch.empty(3, 8, device="cuda")
        halves = graph.call_function(aten.split.Tensor, (x, 4, -1))
        halves.meta["val"] = x.meta["val"].split(4, -1)
        parts = []
        for index in range(2):
            part = graph.call_function(__import__("operator").getitem, (halves, index))
            part.meta["val"] = halves.meta["val"][index]
            parts.append(part)
        silu = graph.call_function(aten.silu.default, (parts[0],))
        silu.meta["val"] = F.silu(parts[0].meta["val"])
        mul = graph.call_function(aten.mul.Tensor, (silu, parts[1]))
        mul.meta["val"] = silu.meta["val"] * parts[1].meta["val"]
    graph.output(mul)
    report = pipeline.run(graph, FusionConfig(strict=True))
    assert report.fused == {}
    assert [(r.reason, r.detail) for r in report.refused] == [
        ("the operator has no kernel for this device", "cuda")
    ]


@pytest.mark.parametrize("dialect", ["aot", "inductor"])
def test_a_result_that_is_also_copied_into_a_buffer_is_replaced_there_too(dialect: str) -> None:
    def layer(x: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
        buffer.copy_(y)
        return y * 2

    buffer = torch.zeros(3, 8)
    args = [torch.randn(3, 8), torch.randn(8), buffer]
    got = fuse(layer, args, dialect=dialect)
    assert got.fused == {"npu_rms_norm": 1}
    torch.testing.assert_close(got.result, got.expected)
    torch.testing.assert_close(buffer * 2, got.expected)


def _no_swiglu(operator: Any, args: Any, kwargs: Any) -> str | None:
    return "there is no swiglu here" if operator is torch.ops.npu.npu_swiglu.default else None


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_the_host_does_not_take_is_refused_and_the_graph_stays(dry_run: bool) -> None:
    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gate, up = F.rms_norm(x, (8,), weight, 1e-6).chunk(2, -1)
        return F.silu(gate) * up

    got = fuse(layer, [torch.randn(3, 8), torch.randn(8)], admission=_no_swiglu, dry_run=dry_run)
    assert got.fused == {"npu_rms_norm": 1}
    assert got.reasons("swiglu") == [
        "the host or the target does not take the replacement: there is no swiglu here"
    ]
    assert "silu" in got.code
    torch.testing.assert_close(got.result, got.expected)


def test_a_dry_run_refuses_what_the_real_run_would_not_write_down() -> None:
    """A replacement is built in a dry run, too: what cannot be built is no fusion there either."""

    def layer(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def fail(operator: Any, args: Any, kwargs: Any) -> str | None:
        return f"no {operator}"

    real, dry = (fuse(layer, [torch.randn(3, 8)], admission=fail, dry_run=d) for d in (False, True))
    assert real.fused == dry.fused == {}
    assert real.reasons("swiglu") == dry.reasons("swiglu")
    assert dry.code == dry.before


def test_a_graph_without_fusions_is_left_as_it_is() -> None:
    seen: list[tuple[list[fx.Node], str]] = []

    def look(graph: fx.Graph) -> None:
        seen.append((list(graph.nodes), pipeline.readable(graph)))
        report = pipeline.run(graph, FusionConfig(strict=True))
        assert report.fused == {}
        assert list(graph.nodes) == seen[0][0]
        assert pipeline.readable(graph) == seen[0][1]

    fuse(lambda x: F.gelu(x @ x.t()).softmax(-1), [torch.randn(4, 4)], prepare_graph=look)
    assert seen


def _broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """npu_swiglu's replacement fails after it has put a node into the graph."""
    original = FUSIONS["swiglu"].match

    def match(term: Term, context: Context) -> Any:
        found = original(term, context)
        if isinstance(found, Match):

            def build(e: Emitter) -> list[fx.Node]:
                e.call(aten.neg.default, e.term(found.inputs[0]))  # type: ignore[arg-type]
                raise ArithmeticError("broken on purpose")

            found.build = build
        return found

    monkeypatch.setattr(FUSIONS["swiglu"], "match", match)


def test_a_failing_fusion_warns_and_leaves_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    _broken(monkeypatch)
    with pytest.warns(RuntimeWarning, match="swiglu: ArithmeticError: broken on purpose"):
        outcome = fuse(swiglu, [torch.randn(3, 8)], strict=False)
    assert outcome.fused == {}
    assert outcome.code == outcome.before
    assert outcome.report.failures == ["swiglu: ArithmeticError: broken on purpose"]
    assert torch.equal(outcome.result, outcome.expected)


def test_a_failing_fusion_raises_in_strict_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    _broken(monkeypatch)
    with pytest.raises(Exception, match="npu_fusion pass failed: swiglu: ArithmeticError: broken on purpose"):
        fuse(swiglu, [torch.randn(3, 8)])


def test_a_failing_clean_up_undoes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def lint(self: fx.Graph) -> None:
        raise RuntimeError("lint is unhappy")

    def broken_lint(graph: fx.Graph) -> None:
        monkeypatch.setattr(fx.Graph, "lint", lint)

    with pytest.warns(RuntimeWarning, match="clean up: RuntimeError: lint is unhappy"):
        outcome = fuse(swiglu, [torch.randn(3, 8)], strict=False, prepare_graph=broken_lint)
    monkeypatch.undo()
    assert outcome.fused == {}
    assert "npu_swiglu" not in outcome.code
    assert torch.equal(outcome.result, outcome.expected)
