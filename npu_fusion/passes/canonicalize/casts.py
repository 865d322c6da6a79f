"""Conversions of dtype, and operators that return their input's values unchanged.

::

    _to_copy(x, dtype=d) · convert_element_type(x, d) · to.dtype(x, d) · type_as(x, y)  ->  cast(x, d)
    clone(x) · detach(x) · alias(x) · contiguous(x) · lift_fresh_copy(x)                ->  x

Graphs are functional where these are read (mutation is checked by the gate), so a copy is its source.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from npu_fusion.passes.terms import Term, TermGraph, pointwise, rule, sizes_of

aten = torch.ops.aten
prims = torch.ops.prims

pointwise("cast")


def _output_dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


@rule(aten._to_copy.default)
def _to_copy(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    source, result = x.meta["val"], node.meta["val"]
    if source.device != result.device or source.layout != result.layout:
        return NotImplemented
    return view.cast(args[0], result.dtype)


@rule(
    prims.convert_element_type.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.type_as.default,
)
def _convert(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if x.meta["val"].device != node.meta["val"].device:
        return NotImplemented
    return view.cast(args[0], _output_dtype(node))


@rule(
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)
def _same(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return args[0]


@rule(aten.full.default)
def _full(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return _filled(view, node, args[1])


@rule(aten.full_like.default)
def _full_like(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return _filled(view, node, args[1])


@rule(aten.zeros.default, aten.zeros_like.default)
def _zeros(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return _filled(view, node, 0)


@rule(aten.ones.default, aten.ones_like.default)
def _ones(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return _filled(view, node, 1)


@rule(aten.scalar_tensor.default)
def _scalar_tensor(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return _filled(view, node, args[0])


def _filled(view: TermGraph, node: fx.Node, value: Any) -> Any:
    """A tensor of one number."""
    if isinstance(value, Term) or not isinstance(value, (int, float)):
        return NotImplemented
    result = node.meta["val"]
    return view.constant(value, sizes_of(result.shape), result.dtype)
