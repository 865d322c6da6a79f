"""Reductions, always as if ``keepdim=True``; without it a view takes the dimension away.

::

    amax(abs(x)) · max(abs(x)).values · norm(x, inf) · max(-amin(x), amax(x)) ->  absmax(x, dims)
    amax · max.dim · aminmax                                                  ->  amax(x, dims), amin(x, dims)
    mean.dim · sum                                                            ->  mean(x, dims), sum(x, dims)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from npu_fusion.passes.canonicalize.views import reshaped
from npu_fusion.passes.terms import LOW_PRECISION, Term, TermGraph, rule, sizes_of

aten = torch.ops.aten


def _dims(x: Term, dims: Any) -> tuple[int, ...]:
    rank = len(x.shape)
    if dims is None or dims == ():
        return tuple(range(rank))
    if isinstance(dims, int):
        dims = (dims,)
    return tuple(sorted(d % rank for d in dims)) if rank else ()


def reduced(view: TermGraph, op: str, x: Term, dims: Any) -> Term:
    where = _dims(x, dims)
    if op == "amax" and x.op == "abs":
        op, x = "absmax", x.args[0]
    return view.make(op, (x, where), x.dtype)


def _extremum(view: TermGraph, node: fx.Node, op: str, x: Any, dims: Any, value: torch.Tensor) -> Any:
    """amax and amin of a rounded tensor are exact: the rounding stays inside."""
    result = value.dtype
    wide = torch.float32 if result in LOW_PRECISION else result
    term = reduced(view, op, view.cast(x, wide), dims)
    return view.cast(reshaped(view, term, sizes_of(value.shape)), result)


@rule(aten.amax.default)
def _amax(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return _extremum(view, node, "amax", args[0], args[1], node.meta["val"])


@rule(aten.amin.default)
def _amin(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return _extremum(view, node, "amin", args[0], args[1], node.meta["val"])


@rule(aten.max.default)
def _max(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return _extremum(view, node, "amax", args[0], None, node.meta["val"])


@rule(aten.max.dim)
def _max_dim(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x, dim, keepdim = args
    values = _extremum(view, node, "amax", x, dim, node.meta["val"][0])
    return values, view.make("argmax", (x, dim, keepdim), torch.int64)


@rule(aten.aminmax.default)
def _aminmax(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x, dim, _ = args
    low, high = node.meta["val"]
    return _extremum(view, node, "amin", x, dim, low), _extremum(view, node, "amax", x, dim, high)


@rule(aten.linalg_vector_norm.default)
def _vector_norm(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x, order, dims, _, dtype = args
    if order != math.inf or dtype not in (None, x.dtype):
        return NotImplemented
    value = node.meta["val"]
    wide = torch.float32 if value.dtype in LOW_PRECISION else value.dtype
    term = view.make("absmax", (view.cast(x, wide), _dims(x, dims)), wide)
    return view.cast(reshaped(view, term, sizes_of(value.shape)), value.dtype)


@rule(aten.mean.dim, aten.sum.dim_IntList)
def _accumulated(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    """Sums of 16-bit floats are accumulated in float32 and rounded once."""
    x, dims, _, _ = args
    value = node.meta["val"]
    wide = torch.float32 if value.dtype in LOW_PRECISION else value.dtype
    op = "mean" if node.target is aten.mean.dim else "sum"
    term = reduced(view, op, view.cast(x, wide), dims)
    return view.cast(reshaped(view, term, sizes_of(value.shape)), value.dtype)
