"""Where the entries of a value come from: views, transposes, slices and broadcasts as labelled axes.

::

    %q = mm(..)                      [T, N*(D+Dr)]
    %v = view(%q, [B, S, N, D+Dr])
    %t = permute(%v, [0, 2, 1, 3])        ->   root %q, B: T by S | N: columns by D+Dr | S: T by 1 |
    %p = slice(%t, 3, D, D+Dr)                           Dr: columns by 1, origin (0, D)

An :class:`Axis` runs over one dimension of the root in steps. However a model writes the transposes around a
product per head (einsum, matmul, bmm), the axes are the same. A ``cat`` is looked into where one piece has
everything; a widening cast changes no value and is passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from npu_fusion.passes.checks import Sizes, Truth
from npu_fusion.passes.terms import LOW_PRECISION, Size, Term, same_size

BROADCAST = -1
"""The ``dim`` of an axis along which the value is repeated."""


@dataclass(frozen=True)
class Axis:
    """``size`` entries of dimension ``dim`` of the root, ``step`` apart."""

    dim: int
    step: Size
    size: Size


Dim = tuple[Axis, ...]
"""One dimension of a value: the axes it runs over, outermost first; none for a size of 1."""


@dataclass(frozen=True)
class Layout:
    """A value of shape given by ``dims`` that holds entries of ``root`` from ``origin`` (one per dimension of
    the root) on."""

    root: Term
    dims: tuple[Dim, ...]
    origin: tuple[Size, ...]

    def flat(self) -> Dim:
        """The axes in memory order of a contiguous value, merged where they run on."""
        return coalesced(axis for dim in self.dims for axis in dim)

    def over(self, dim: int) -> Dim:
        """The axes over one dimension of the root, in memory order."""
        return tuple(axis for axis in self.flat() if axis.dim == dim)


def coalesced(axes: Iterable[Axis]) -> Dim:
    """Neighbours that together run through one range evenly, as one axis; axes of size 1 are left out."""
    merged: list[Axis] = []
    for axis in axes:
        if axis.size == 1:
            continue
        if merged and merged[-1].dim == axis.dim and same_size(merged[-1].step, axis.step * axis.size):
            axis = Axis(axis.dim, axis.step, merged.pop().size * axis.size)
        merged.append(axis)
    return tuple(merged)


def layout(
    term: Term,
    sizes: Sizes,
    known: Mapping[Term, Layout] | None = None,
    through: Callable[[Term], Term | None] | None = None,
) -> Layout | None:
    """Where the entries of ``term`` come from; None where a view cuts through what was put together.

    ``known``: terms at which to stop, with the layout that they have. ``through``: for a term that computes
    each entry from the entry at the same place of another, that other; one of the same shape.
    """
    chain: list[Term] = []
    root = term
    while known is None or root not in known:
        if root.op in ("view", "permute", "expand", "slice", "half"):
            chain.append(root)
            root = root.args[0]
        elif _is_widening(root):
            root = root.args[0]
        else:
            source = None if through is None else through(root)
            if source is None:
                break
            root = source
    found: Layout | None = whole(root) if known is None or root not in known else known[root]
    for step in reversed(chain):
        if found is not None:
            found = stepped(found, step, sizes)
    if root.op == "cat" and found is not None and found.root is root:
        return _inside_piece(found, sizes)
    return found


def whole(root: Term) -> Layout:
    """A value as its own root."""
    dims = tuple(() if s == 1 else (Axis(d, 1, s),) for d, s in enumerate(root.shape))
    return Layout(root, dims, (0,) * len(dims))


def _is_widening(term: Term) -> bool:
    return term.op == "cast" and term.dtype == torch.float32 and term.args[0].dtype in LOW_PRECISION


def stepped(of: Layout, step: Term, sizes: Sizes) -> Layout | None:
    """The layout after one more operation, whose operand has the layout ``of``."""
    if step.op == "view":
        return viewed(of, step.args[1], sizes)
    if step.op == "permute":
        return Layout(of.root, tuple(of.dims[d] for d in step.args[1]), of.origin)
    if step.op == "expand":
        return _expanded(of, step.args[0].shape, step.args[1])
    if step.op == "half":
        base, which = step.args
        length = step.shape[-1]
        return _sliced(of, len(base.shape) - 1, length if which else 0, length, 1)
    _, dim, start, length, by = step.args
    return _sliced(of, dim, start, length, by)


def viewed(of: Layout, shape: Sequence[Size], sizes: Sizes) -> Layout | None:
    """The layout of a view of that shape."""
    dims = _viewed(of.flat(), shape, sizes)
    return None if dims is None else Layout(of.root, dims, of.origin)


def _viewed(axes: Dim, shape: Sequence[Size], sizes: Sizes) -> tuple[Dim, ...] | None:
    """The axes cut and put together to the sizes of ``shape``."""
    queue = list(axes)
    dims: list[Dim] = []
    for size in shape:
        group: list[Axis] = []
        need = size
        while need != 1:
            if not queue:
                return None
            axis = queue.pop(0)
            more, less = _quotient(need, axis.size, sizes), _quotient(axis.size, need, sizes)
            if more is not None:
                group.append(axis)
                need = more
            elif less is not None:
                group.append(Axis(axis.dim, axis.step * less, need))
                queue.insert(0, Axis(axis.dim, axis.step, less))
                need = 1
            else:
                return None
        dims.append(tuple(group))
    return None if queue else tuple(dims)


def _quotient(a: Size, b: Size, sizes: Sizes) -> Size | None:
    """``a / b`` where that is whole."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if sizes.equal(a, b) is Truth.YES:
        return 1
    quotient = sympy.cancel(a / b)
    if quotient.is_Integer:
        return int(quotient)
    return quotient if quotient.is_integer and sympy.denom(quotient) == 1 else None


def _expanded(of: Layout, before: Sequence[Size], after: Sequence[Size]) -> Layout:
    lead = len(after) - len(before)
    dims: list[Dim] = [(Axis(BROADCAST, 0, s),) for s in after[:lead]]
    for dim, have, want in zip(of.dims, before, after[lead:], strict=True):
        dims.append((Axis(BROADCAST, 0, want),) if have == 1 and want != 1 else dim)
    return Layout(of.root, tuple(dims), of.origin)


def _sliced(of: Layout, dim: int, start: Size, length: Size, by: int) -> Layout | None:
    axes = coalesced(of.dims[dim])
    if len(axes) > 1:
        return None
    origin = list(of.origin)
    cut: Dim = ()
    for axis in axes:
        if axis.dim != BROADCAST:
            origin[axis.dim] = origin[axis.dim] + axis.step * start
        if length != 1:
            cut = (Axis(axis.dim, axis.step * by, length),)
    return Layout(of.root, (*of.dims[:dim], cut, *of.dims[dim + 1 :]), tuple(origin))


def _inside_piece(of: Layout, sizes: Sizes) -> Layout:
    """The layout within the one piece of a ``cat`` that it runs over, or as it is."""
    pieces, dim = of.root.args
    axes = [a for d in of.dims for a in d if a.dim == dim]
    first = of.origin[dim]
    last = first + sum(a.step * (a.size - 1) for a in axes)
    start: Size = 0
    for piece in pieces:
        if len(piece.shape) != len(of.origin):
            continue  # an empty tensor of one dimension, which cat takes with any others
        end = start + piece.shape[dim]
        if sizes.decide(start <= first) is Truth.YES and sizes.decide(last < end) is Truth.YES:
            origin = (*of.origin[:dim], first - start, *of.origin[dim + 1 :])
            inner = layout(piece, sizes)
            composed = None if inner is None else _composed(Layout(piece, of.dims, origin), inner)
            return composed or Layout(piece, of.dims, origin)
        start = end
    return of


def _composed(of: Layout, inner: Layout) -> Layout | None:
    """The layout ``of`` a piece, which itself is ``inner`` of a deeper root, on that root."""
    origin = list(inner.origin)
    for dim, start in enumerate(of.origin):
        if start == 0:
            continue
        axes = inner.dims[dim]
        if len(axes) != 1:
            return None
        if axes[0].dim != BROADCAST:
            origin[axes[0].dim] = origin[axes[0].dim] + axes[0].step * start
    dims: list[Dim] = []
    for group in of.dims:
        replaced: list[Axis] = []
        for axis in group:
            if axis.dim == BROADCAST:
                replaced.append(axis)
                continue
            under = inner.dims[axis.dim]
            if len(under) == 1:
                base = under[0]
                replaced.append(Axis(base.dim, base.step * axis.step, axis.size))
            elif axis.step == 1 and axis.size == of.root.shape[axis.dim]:
                replaced.extend(under)
            else:
                return None
        dims.append(tuple(replaced))
    return Layout(inner.root, tuple(dims), tuple(origin))
