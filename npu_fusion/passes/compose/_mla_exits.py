"""The values of a replaced region that others read, and how their dimensions stand to the operator's.

The source holds the query as [N, T, C], [B, N, S, C] or [T, N, C], whatever its product per head gives and
its attention takes; the operator returns [T, N, C] or [B, S, N, C]. Views and transposes are followed to the
values that something else reads, and each is a transpose of what the operator returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from npu_fusion.passes.axes import Layout, layout
from npu_fusion.passes.checks import Truth
from npu_fusion.passes.pattern import Context
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import Size, Term


@dataclass(frozen=True)
class Tokens:
    """The operator's leading dimensions: [B, S] or [T]."""

    shape: tuple[Size, ...]

    @property
    def total(self) -> Size:
        total: Size = 1
        for size in self.shape:
            total = total * size
        return total

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


def readers(value: Term, context: Context) -> list[Term]:
    """``value`` and its views and transposes, as far as something other than those reads them."""
    live, of = context.rewriter.dead, context.view.of
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
                if user in live or then is term:
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
    is_head: Callable[[Size], bool] | None,
) -> list[Exit] | None:
    """All readers of ``value``, which has the layout ``at``; None where one has another order.

    ``is_head``: which steps over the columns count heads; None: the operator's result has no heads.
    """
    found = []
    for term in readers(value, context):
        here = layout(term, context.sizes, known={value: at})
        dims = None if here is None else _order(here, tokens, is_head, context)
        if dims is None:
            return None
        found.append(Exit(term, dims))
    return found


def _order(
    at: Layout, tokens: Tokens, is_head: Callable[[Size], bool] | None, context: Context
) -> tuple[int, ...] | None:
    names = tokens.names + ("nc" if is_head else "c")
    order = ""
    for axis in at.flat():
        if axis.dim == 0:
            letters = _token_letters(axis.size, axis.step, tokens, context)
            if letters is None:
                return None
        elif axis.dim == 1 and is_head is not None and is_head(axis.step):
            letters = "n"
        else:
            letters = "c"
        if not (letters == "c" and order.endswith("c")):
            order += letters
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
