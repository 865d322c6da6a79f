"""A tensor that is filled piece by piece, as AOTAutograd leaves the assignments to its slices.

::

    %e = new_empty(..)
    %a = slice_scatter(%e, copy(.., %x), 3, 0, 16)     ->  filled(%e, %x, 3)
    %k = slice_scatter(%a, copy(.., %y), 3, 16, end)   ->  cat([%x, %y], 3)

The pieces must come in order, without a gap, and at the end cover the dimension; nothing of what was there
before is then left. A piece without entries changes nothing. One piece that begins later is rows written into
a cache (:mod:`.cache_writes`). ``copy(a, b)`` is ``b`` in the shape and dtype of ``a``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from npu_fusion.passes.canonicalize.cache_writes import into_part, written
from npu_fusion.passes.terms import Term, TermGraph, rule, same_size, size_of, sizes_of

aten = torch.ops.aten


@rule(aten.copy.default)
def _copy(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    target, source = node.args[:2]
    assert isinstance(target, fx.Node) and isinstance(source, fx.Node)
    if target.meta["val"].device != source.meta["val"].device:
        return NotImplemented
    shape, x = sizes_of(node.meta["val"].shape), view.term(source)
    if x.op != "const" and x.shape != shape:
        x = view.make("expand", (x, shape), x.dtype)
    return view.cast(x, node.meta["val"].dtype)


@rule(aten.slice_scatter.default)
def _slice_scatter(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    base, piece, dim, start, end, step = args
    if step != 1 or isinstance(start, Term) or isinstance(end, Term) or piece.dtype != base.dtype:
        return NotImplemented
    dim %= len(base.shape)
    start = 0 if start is None else start
    if isinstance(start, int) and start < 0:
        return NotImplemented
    pieces: tuple[Term, ...] = ()
    if piece.shape[dim] == 0:
        return base
    if start == 0 and into_part(view, base, piece, dim) is not None:
        return into_part(view, base, piece, dim)
    if base.op == "filled" and base.args[2] == dim:
        base, pieces, _ = base.args
    begun = sum((p.shape[dim] for p in pieces), start=0)
    if not same_size(start, begun):
        return NotImplemented if pieces else written(view, base, piece, start, "range", dim)
    pieces = (*pieces, piece)
    target = node.args[1]
    assert isinstance(target, fx.Node)
    if same_size(begun + size_of(target.meta["val"].shape[dim]), size_of(node.meta["val"].shape[dim])):
        return piece if len(pieces) == 1 else view.make("cat", (pieces, dim), piece.dtype)
    return view.make("filled", (base, pieces, dim), piece.dtype)
