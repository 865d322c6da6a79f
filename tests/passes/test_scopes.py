"""Scope markers: what is between two of them is neither fused with what is outside nor moved over one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from npu_fusion.passes import scopes
from tests.passes._harness import Outcome, fuse

# torchair defines the first two, torch_npu the others; neither is here.
_LIBRARIES = [torch.library.Library("air", "FRAGMENT"), torch.library.Library("npu", "FRAGMENT")]
_MARKERS = (
    "scope_enter(str[] keys, str[] values) -> ()",
    "scope_exit() -> ()",
    "tagged_event_wait(str tag) -> ()",
    "super_kernel_scope_begin(str? scope_name=None) -> ()",
    "super_kernel_scope_end(str? scope_name=None) -> ()",
)
for library, schemas in zip(_LIBRARIES, (_MARKERS[:3], _MARKERS[3:]), strict=True):
    for schema in schemas:
        library.define(schema)
        library.impl(schema.partition("(")[0], lambda *args: None, "CompositeExplicitAutograd")
for operator in (
    torch.ops.air.scope_enter.default,
    torch.ops.air.scope_exit.default,
    torch.ops.air.tagged_event_wait.default,
    torch.ops.npu.super_kernel_scope_begin.default,
    torch.ops.npu.super_kernel_scope_end.default,
):
    fx.node.has_side_effect(operator)

KINDS = {
    "stream": (
        (torch.ops.air.scope_enter.default, (["_user_stream_label"], ["1"])),
        (torch.ops.air.scope_exit.default, ()),
    ),
    "super kernel": (
        (torch.ops.npu.super_kernel_scope_begin.default, ("mlp",)),
        (torch.ops.npu.super_kernel_scope_end.default, ("mlp",)),
    ),
}


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _around(kind: str, first: str, last: str) -> Callable[[fx.Graph], None]:
    """Put the markers of ``kind`` around the nodes from ``first`` to ``last``, by name."""

    def edit(graph: fx.Graph) -> None:
        named = {node.name: node for node in graph.nodes}
        (enter, enter_args), (leave, leave_args) = KINDS[kind]
        with graph.inserting_before(named[first]):
            graph.call_function(enter, enter_args)
        with graph.inserting_after(named[last]):
            graph.call_function(leave, leave_args)

    return edit


def _run(kind: str, first: str, last: str, fn: Callable = swiglu) -> Outcome:
    return fuse(fn, [torch.randn(3, 8)], prepare_graph=_around(kind, first, last))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_fused_across_a_marker(kind: str) -> None:
    got = _run(kind, "silu", "silu")
    assert got.fused == {}
    (reason,) = got.reasons("swiglu")
    assert reason.startswith("the nodes are in different scopes: in ")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_fused_in_a_scope_stays_between_its_markers(kind: str) -> None:
    got = _run(kind, "split", "mul")
    assert got.fused == {"npu_swiglu": 1}
    positions = (
        [got.code.index(name) for name in ("scope_enter", "scope_exit")]
        if kind == "stream"
        else [got.code.index(name) for name in ("scope_begin", "scope_end")]
    )
    assert positions[0] < got.code.index("npu_swiglu") < positions[1]
    torch.testing.assert_close(got.result, got.expected)


def test_a_scope_in_between_that_is_not_touched_does_not_matter() -> None:
    def beside(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = x.chunk(2, -1)
        gate = F.silu(gate)
        other = x.cos()
        return gate * up, other

    got = _run("stream", "cos", "cos", beside)
    assert got.fused == {"npu_swiglu": 1}
    assert got.code.index("scope_enter") < got.code.index("cos(") < got.code.index("scope_exit")


def test_nothing_is_moved_over_a_marker() -> None:
    """The sum is needed before the smooth scales, an input, exist: what is quantized would have to move."""

    def norm(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = x + y
        early = total.cos()
        weight = weight * 2
        return F.rms_norm(total, (8,), weight, 1e-6), early

    args = [torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)]
    assert fuse(norm, args).fused == {"npu_add_rms_norm": 1}
    got = fuse(norm, args, prepare_graph=_around("stream", "cos", "cos"))
    assert got.fused.get("npu_add_rms_norm", 0) == 0
    reasons = got.reasons("add_rms_norm")
    assert reasons[0].startswith("the graph would have to be reordered over the border of a scope"), reasons
    assert got.code.index("scope_enter") < got.code.index("cos(") < got.code.index("scope_exit")
    torch.testing.assert_close(got.result, got.expected)


def test_labels_of_nested_and_named_scopes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")

    def mark(kind: str, which: int, *args: object) -> None:
        target, default = KINDS[kind][which]
        graph.call_function(target, args or default)

    names = []
    for step in (
        ("stream", 0),
        ("node",),
        ("super kernel", 0, "a"),
        ("super kernel", 0, "b"),
        ("node",),
        ("super kernel", 1, "a"),
        ("stream", 1),
        ("node",),
        ("super kernel", 1, "b"),
        ("node",),
    ):
        if step[0] == "node":
            names.append(graph.call_function(torch.ops.aten.cos.default, (x,)))
        else:
            mark(*step)
    markers, events = scopes.label(graph)
    assert len(markers) == 6 and not events
    inside = [len(node.meta.get(scopes.SCOPE, ())) for node in names]
    assert inside == [1, 3, 1, 0]
    labels = [node.meta.get(scopes.SCOPE) for node in names]
    assert len(set(labels)) == 4


def test_nothing_is_fused_from_both_sides_of_an_event() -> None:
    """What is read after a wait, another stream may still be writing before it."""

    def norm(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weight = weight * 2
        total = x + y
        early = total.cos()
        return F.rms_norm(total, (8,), weight, 1e-6), early

    def wait(graph: fx.Graph) -> None:
        (early,) = (n for n in graph.nodes if n.name == "cos")
        with graph.inserting_after(early):
            graph.call_function(torch.ops.air.tagged_event_wait.default, ("weights",))

    args = [torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)]
    assert fuse(norm, args).fused == {"npu_add_rms_norm": 1}
    got = fuse(norm, args, prepare_graph=wait)
    assert got.fused == {"npu_rms_norm": 1}
    assert got.reasons("add_rms_norm")[0].startswith("a stream records or waits for an event in between")
    assert got.code.index("tagged_event_wait") < got.code.index("npu_rms_norm")
    torch.testing.assert_close(got.result, got.expected)


def test_what_replacements_share_is_made_in_each_scope() -> None:
    def products(q: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch._int_mm(q, w), torch._int_mm(q + 1, w), torch._int_mm(q + 2, w)

    def no_int_mm(operator: object, args: object, kwargs: object) -> str | None:
        return "none" if operator is torch.ops.aten._int_mm.default else None

    q, w = (torch.randint(-9, 9, shape, dtype=torch.int8) for shape in ((24, 16), (16, 8)))
    inside = _around("stream", "_int_mm", "_int_mm")
    got = fuse(products, [q, w], prepare_graph=inside, admission=no_int_mm)
    assert got.fused == {"npu_quant_matmul": 3}
    assert got.code.count("aten.full") == 2  # one for the two outside
    assert all(torch.equal(a, b) for a, b in zip(got.result, got.expected, strict=True))
