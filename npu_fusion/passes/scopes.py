"""Which nodes lie between which markers: streams, core limits, deterministic parts, super kernels, events.

::

    air.scope_enter(['_user_stream_label'], ['1'])      # torchair.scope.npu_stream_switch, limit_core_num ...
      y = op(x)                                          # runs as the scope says because of where it stands
    air.scope_exit()

What is between two markers runs under them by its position alone. A fusion may therefore neither take nodes
of different scopes together nor move anything over a marker. :func:`label` notes for each node the markers
that are open around it; torchair's and npugraph_ex's markers nest, those of super kernels are paired by
name.

Streams wait for each other by events, which have no data in the graph either: what is computed after a wait
may read what another stream has written before. Nothing is therefore fused from both sides of an event.

Source: torch_npu 2.13.0, torchair.scope and torchair.ops, the same of npugraph_ex, and torch_npu.npu.graphs.
"""

from __future__ import annotations

from typing import Any

from torch import fx

SCOPE = "npu_fusion_scope"
"""Key of the label in ``node.meta``; absent outside of all scopes."""

_NESTING = ("air", "npugraph_ex")
_ORDERING = (*_NESTING, "streams")


def label(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """Label the nodes of ``graph``; returns its scope markers and its events, each in order."""
    markers: list[fx.Node] = []
    events: list[fx.Node] = []
    nested: list[fx.Node] = []
    named: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        kind = _kind(node)
        if kind is None:
            if getattr(node.target, "namespace", None) in _ORDERING:
                events.append(node)
            if nested or named:
                node.meta[SCOPE] = (*(n.name for n in nested), *sorted(n.name for n in named.values()))
            continue
        markers.append(node)
        if kind == "enter":
            nested.append(node)
        elif kind == "exit":
            if nested:  # a graph break may leave one marker of a pair in another graph: torchair refuses that
                nested.pop()
        else:
            name = node.args[0] if node.args else node.kwargs.get("scope_name")
            if kind == "begin":
                named[name] = node
            else:
                named.pop(name, None)
    return markers, events


def stream_of(node: fx.Node) -> Any:
    """The stream that a node runs in, by the labels of torchair and of Dynamo."""
    label = node.meta.get("stream_label")
    custom = node.meta.get("custom")
    if isinstance(custom, dict) and custom.get("stream") is not None:
        return (label, custom["stream"])
    return label


def place_of(node: fx.Node) -> tuple[Any, Any]:
    """Stream and scope that a node runs in."""
    return stream_of(node), node.meta.get(SCOPE)


def _kind(node: fx.Node) -> str | None:
    """enter, exit, begin, end; None for what is no marker."""
    if node.op != "call_function":
        return None
    name = getattr(node.target, "_opname", None)
    if name in ("scope_enter", "scope_exit"):
        return name.removeprefix("scope_") if getattr(node.target, "namespace", None) in _NESTING else None
    if name in ("super_kernel_scope_begin", "super_kernel_scope_end"):
        return name.removeprefix("super_kernel_scope_")
    return None
