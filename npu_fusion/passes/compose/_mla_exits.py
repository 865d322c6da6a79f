"""The values of a replaced region that others read, and how their dimensions stand to the operator's.

The source holds the query as [N, T, C], [B, N, S, C] or [T, N, C], whatever its product per head gives and
its attention takes; the operator returns [T, N, C] or [B, S, N, C]. Views and transposes are followed to the
values that something else reads, and each is a transpose of what the operator returns.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import fx

from npu_fusion.passes.axes import Axis, Dim, Layout, coalesced, layout
from npu_fusion.passes.checks import Truth, product
from npu_fusion.passes.pattern import Context
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import Size, Term


@dataclass(frozen=True)
class Tokens:
    """The operator's leading dimensions: [B, S] or [T]."""

    shape: tuple[Size, ...]

    @property
    def total(self) -> Size:
        return product(self.shape)

    @property
    def names(self) -> str:
        return "bs" if len(self.shape) == 2 else "t"


@dataclass(frozen=True)
class Exit:
    """A value that is read outside."""

    term: Term
    dims: tuple[int, ...]
    """The order in which it has the operator's dimensions."""

    def of(self, e: Emitter, node: fx.Node) -> fx.Node:
        if self.dims == tuple(range(len(self.dims))):
            return node
        return e.call(torch.ops.aten.permute.default, node, list(self.dims))


def readers(value: Term, context: Context, ignoring: Container[fx.Node] = ()) -> list[Term]:
    """``value`` and its views and transposes, as far as something other than those (and ``ignoring``) reads
    them."""
    dead, of = context.rewriter.dead, context.view.of
    found: list[Term] = []
    pending, seen = [value], {value}
    while pending:
        term = pending.pop()
        read = False
        if not term.nodes:  # inside an operator that transposes its result
            pending.extend(t for t in context.view.users(term) if t.op == "permute" and t.nodes)
        for node in term.nodes:
            for user in node.users:
                then = of.get(user)
                if user in dead or user in ignoring or then is term:
                    continue
                if isinstance(then, Term) and then.op in ("view", "permute"):
                    if then not in seen:
                        seen.add(then)
                        pending.append(then)
                else:
                    read = True
        if read:
            found.append(term)
    return found


def exits(
    value: Term,
    at: Layout,
    tokens: Tokens,
    context: Context,
    heads: Axis | None,
    ignoring: Container[fx.Node] = (),
) -> list[Exit] | None:
    """All readers of ``value``, which has the layout ``at``; None where one has another order.

    ``heads``: the axis that counts them; None: the operator's result has none. ``ignoring``: nodes that are
    no readers.
    """
    columns = coalesced(at.dims[-1])
    value, at = unpaired(value, at)
    found = []
    for term in readers(value, context, ignoring):
        here = layout(term, context.sizes, known={value: at})
        dims = None if here is None else _order(here.flat(), tokens, heads, columns, context)
        if dims is None:
            return None
        found.append(Exit(term, dims))
    return found


def unpaired(value: Term, at: Layout) -> tuple[Term, Layout]:
    """For a view of rotated pairs [.., Dr/2, 2] these pairs, which other views are of as well."""
    if value.op != "view" or value.args[0].op != "turned_pairs":
        return value, at
    *lead, last = at.dims
    (columns,) = coalesced(last)
    pairs = Axis(columns.dim, columns.step * 2, value.shape[-1] // 2), Axis(columns.dim, columns.step, 2)
    return value.args[0], Layout(at.root, (*lead, *((axis,) for axis in pairs)), at.origin)


def _order(
    axes: Dim, tokens: Tokens, heads: Axis | None, columns: Dim, context: Context
) -> tuple[int, ...] | None:
    names = tokens.names + ("c" if heads is None else "nc")
    order, rest = "", axes
    while rest:
        axis, after = rest[0], rest[1:]
        if axis.dim == 0:
            letters = _token_letters(axis.size, axis.step, tokens, context)
            if letters is None:
                return None
            order += letters
        elif axis == heads:
            order += "n"
        elif columns and rest[: len(columns)] == columns:
            order, after = order + "c", rest[len(columns) :]
        else:
            return None
        rest = after
    # What has one entry is nowhere in the layout: it may stand where the operator has it.
    for i, name in enumerate(names):
        if name not in order:
            order = order[:i] + name + order[i:]
    if sorted(order) != sorted(names):
        return None
    return tuple(names.index(letter) for letter in order)


def _token_letters(size: Size, step: Size, tokens: Tokens, context: Context) -> str | None:
    equal = context.sizes.equal
    if equal(size, tokens.total) is Truth.YES and step == 1:
        return tokens.names
    if len(tokens.shape) == 2:
        batch, length = tokens.shape
        if step == 1 and equal(size, length) is Truth.YES:
            return "s"
        if equal(step, length) is Truth.YES and equal(size, batch) is Truth.YES:
            return "b"
    return None
