"""Views and the parts of a tensor.

::

    view · _unsafe_view · reshape · squeeze · unsqueeze · flatten           ->  view(x, sizes)
    chunk · split · split_with_sizes · slice · narrow · view(..,2,H).unbind ->  half(x, 0|1), when it is one
    the same, otherwise                                                     ->  slice(x, dim, start, size, ..)
    t · transpose · permute                                                 ->  permute(x, dims)

``half(x, i)`` is a half of the *last* dimension. Where that size is symbolic, ``chunk`` gives
``ceil(n/2)`` and the rest; they are halves if n is even, which the fusion has to check.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from npu_fusion.passes.terms import Size, Term, TermGraph, rule, same_size, size_of, sizes_of

aten = torch.ops.aten


@rule(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
def _view(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return reshaped(view, args[0], sizes_of(node.meta["val"].shape))


def reshaped(view: TermGraph, x: Term, shape: tuple[Size, ...]) -> Term:
    """``x`` viewed as ``shape``; views of views and views to the same shape disappear."""
    if x.op == "view":
        x = x.args[0]
    if x.op == "const":
        return view.make("const", (x.args[0], shape), x.dtype)
    return x if x.shape == shape else view.make("view", (x, shape), x.dtype)


@rule(aten.expand.default)
def _expand(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x, shape = args[0], sizes_of(node.meta["val"].shape)
    if x.op == "const":
        return view.make("const", (x.args[0], shape), x.dtype)
    return x if x.shape == shape else view.make("expand", (x, shape), x.dtype)


@rule(aten.t.default)
def _t(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    rank = len(args[0].shape)
    return permuted(view, args[0], tuple(reversed(range(rank))))


@rule(aten.transpose.int)
def _transpose(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x, a, b = args
    dims = list(range(len(x.shape)))
    dims[a], dims[b] = dims[b], dims[a]
    return permuted(view, x, tuple(dims))


@rule(aten.permute.default)
def _permute(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x, dims = args
    return permuted(view, x, tuple(d % len(dims) for d in dims))


def permuted(view: TermGraph, x: Term, dims: tuple[int, ...]) -> Term:
    if x.op == "permute":
        inner = x.args[1]
        x, dims = x.args[0], tuple(inner[d] for d in dims)
    return x if dims == tuple(range(len(dims))) else view.make("permute", (x, dims), x.dtype)


def part(view: TermGraph, x: Term, dim: int, start: Size, length: Size, step: int = 1) -> Term:
    """``length`` entries of dimension ``dim`` from ``start``: a half, a slice, or all of ``x``."""
    size = x.shape[dim]
    if step == 1 and start == 0 and length == size:
        return x
    if step == 1 and dim == len(x.shape) - 1:
        if isinstance(size, int):
            if isinstance(start, int) and length * 2 == size and start in (0, length):
                return view.make("half", (x, 0 if start == 0 else 1), x.dtype)
        elif _halves(length, size) and (start == 0 or _halves(start, size)):
            return view.make("half", (x, 0 if start == 0 else 1), x.dtype)
    return view.make("slice", (x, dim, start, length, step), x.dtype)


def _halves(part: Size, size: sympy.Expr) -> bool:
    """Is this half of a symbolic size, if that is even: ``n // 2``, ``(n + 1) // 2``, or what they leave?"""
    halved = size / 2
    if halved.is_integer:
        return same_size(part, halved)
    rounded = (FloorDiv(size, 2), FloorDiv(size + 1, 2))
    return any(same_size(part, half) or same_size(part, size - half) for half in rounded)


def _halved(size: Size, half: Size) -> bool:
    """Is ``half`` half of ``size``, a symbolic one assumed to be even (the view took all of it, so it is)?"""
    return same_size(size, 2 * half) or (not isinstance(size, int) and _halves(half, size))


@rule(aten.slice.Tensor)
def _slice(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x, dim, start, end, step = args
    if isinstance(step, Term) or not isinstance(step, int):
        return NotImplemented
    dim %= len(x.shape)
    size = x.shape[dim]
    start = 0 if start is None else start
    if isinstance(start, int) and start < 0:
        start = size + start
    if isinstance(start, Term) or isinstance(end, Term):
        return NotImplemented
    length = size_of(node.meta["val"].shape[dim])
    return part(view, x, dim, start, length, step)


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unsafe_split.Tensor)
def _split(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x, _, dim = args
    dim %= len(x.shape)
    pieces = []
    start: Size = 0
    for value in node.meta["val"]:
        length = size_of(value.shape[dim])
        pieces.append(part(view, x, dim, start, length))
        start = start + length
    return tuple(pieces)


@rule(aten.unbind.int)
def _unbind(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x, dim = args
    dim %= len(x.shape)
    count = len(node.meta["val"])
    return tuple(_selected(view, x, dim, i) for i in range(count))


@rule(aten.select.int)
def _select(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x, dim, index = args
    if not isinstance(index, int):
        return NotImplemented
    dim %= len(x.shape)
    if index < 0:
        if not isinstance(x.shape[dim], int):
            return NotImplemented
        index += int(x.shape[dim])
    return _selected(view, x, dim, index)


def _selected(view: TermGraph, x: Term, dim: int, index: int) -> Term:
    """``x.select(dim, index)``: a half where x is ``view(y, [.., 2, H])`` and dim the 2; every other entry of
    y where x is ``view(y, [.., H, 2])``."""
    shape = x.shape
    if x.op == "view" and dim == len(shape) - 1 and shape[dim] == 2:
        base = x.args[0]
        if len(base.shape) == dim and base.shape[-1] == 2 * shape[-2]:
            base = reshaped(view, base, (*shape[: dim - 1], base.shape[-1]))
            return part(view, base, dim - 1, index, shape[-2], 2)
    if x.op == "view" and dim == len(shape) - 2 and shape[dim] == 2:
        base = x.args[0]
        if _halved(base.shape[-1], shape[-1]):
            base = reshaped(view, base, (*shape[:dim], base.shape[-1]))
            return view.make("half", (base, index), x.dtype)
    kept = shape[:dim] + shape[dim + 1 :]
    return reshaped(view, view.make("slice", (x, dim, index, 1, 1), x.dtype), kept)


@rule(aten.cat.default)
def _cat(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    pieces, dim = args
    if not all(isinstance(p, Term) for p in pieces) or len({p.dtype for p in pieces}) > 1:
        return NotImplemented
    rank = len(node.meta["val"].shape)
    return view.make("cat", (pieces, dim % rank), node.meta["val"].dtype)


@rule(aten.stack.default)
def _stack(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    pieces, dim = args
    if not all(isinstance(p, Term) for p in pieces):
        return NotImplemented
    rank = len(node.meta["val"].shape)
    dim %= rank
    grown = tuple(reshaped(view, p, (*p.shape[:dim], 1, *p.shape[dim:])) for p in pieces)
    return view.make("cat", (grown, dim), node.meta["val"].dtype)
