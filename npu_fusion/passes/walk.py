"""Stepping through canonical terms while keeping account of what the step gives up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from npu_fusion.config import Numerics
from npu_fusion.passes.checks import Sizes, Truth
from npu_fusion.passes.terms import LOW_PRECISION, Drift, Term, representable

if TYPE_CHECKING:
    from npu_fusion.passes.pattern import Context


def dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


class Walk:
    """One attempt at a match: collects the :class:`Drift` of every rounding or spelling stepped over."""

    def __init__(self, sizes: Sizes, drift: tuple[Drift, ...] = ()) -> None:
        self.sizes = sizes
        self.drift: list[Drift] = list(drift)

    def note(self, level: Numerics, what: str) -> None:
        self.drift.append(Drift(level, what))

    def took(self, step: Walk, what: str) -> None:
        """The way that ``step`` tried was right: its drift counts, and that of ``what`` was done there."""
        self.drift.extend(step.drift)
        self.note(Numerics.ACCURATE, what)

    def seen(self, term: Term) -> Term:
        """Account for what canonicalization gave up in ``term``."""
        self.drift.extend(term.drift)
        return term

    def rows(self, term: Term) -> Term:
        """Through views that leave the last dimension alone: the rows stay what and in the order they are."""
        while term.op == "view" and self._keeps_last(term):
            term = term.args[0]
        return term

    def _keeps_last(self, term: Term) -> bool:
        source, shape = term.args
        if not source.shape or not shape:
            return False
        return self.sizes.equal(source.shape[-1], shape[-1]) is Truth.YES

    def value(self, term: Any) -> Any:
        """Through views of rows, and through roundings to 16 bits of a float32 value (each is noted)."""
        while isinstance(term, Term):
            term = self.rows(term)
            rounded = self._rounded(term)
            if rounded is None:
                break
            term = rounded
        return term

    def _rounded(self, term: Term) -> Term | None:
        """``t`` for ``cast(view(cast(t, bf16)), f32)`` with a float32 ``t``."""
        if term.op != "cast" or term.dtype != torch.float32:
            return None
        inner = self.rows(term.args[0])
        if inner.op != "cast" or inner.dtype not in LOW_PRECISION or inner.args[0].dtype != torch.float32:
            return None
        source = inner.args[0]
        if not representable(source, inner.dtype):
            self.note(Numerics.ACCURATE, f"{described(source)} is not rounded to {dtype_name(inner.dtype)}")
        return source

    def unwrapped(self, term: Term) -> Term:
        """Through a cast to a 16-bit float on the outside of a float32 value (noted), then :meth:`value`."""
        inner = self.rows(term)
        if inner.op == "cast" and inner.dtype in LOW_PRECISION and inner.args[0].dtype == torch.float32:
            self.note(
                Numerics.ACCURATE, f"{described(inner.args[0])} is not rounded to {dtype_name(inner.dtype)}"
            )
            inner = inner.args[0]
        return self.value(inner)


_NAMES = {"mul": "a product", "div": "a quotient", "add": "a sum", "half": "the dequantized product"}


def described(term: Term) -> str:
    """What a term is, for a note to the user."""
    return _NAMES.get(term.op, term.op)


def operands(term: Term) -> Iterator[tuple[Any, Any]]:
    """Both orders of a binary term's operands."""
    a, b = term.args
    yield a, b
    if a is not b:
        yield b, a


def narrow(term: Term, dtype: torch.dtype | None) -> Term | None:
    """The tensor of the 16-bit ``dtype`` that a float32 value was widened from."""
    if term.op == "cast" and term.args[0].dtype == dtype and dtype in LOW_PRECISION:
        return term.args[0]
    return None


def rounded(term: Term, context: Context) -> Term:
    """The rounding to 16 bits of a float32 value, if nothing else reads it; else the value itself."""
    dead = context.rewriter.dead
    readers = {context.view.of.get(u) for n in term.nodes for u in n.users if u not in dead}
    readers.discard(term)  # copies
    if len(readers) == 1:
        reader = readers.pop()
        if isinstance(reader, Term) and reader.op == "cast" and reader.dtype in LOW_PRECISION:
            return reader if reader.args[0] is term else term
    return term


def stored(term: Term, context: Context) -> Term:
    """The value as a node holds it: the rounding that the graph makes of it at once, or itself."""
    if term.nodes:
        return rounded(term, context)
    for user in context.view.users(term):
        if user.op == "cast" and user.dtype in LOW_PRECISION and user.nodes:
            return user
    return term


def buildable(term: Term) -> bool:
    """Does a node hold the value, or can one be made by casts and views alone (:meth:`Emitter.term`)?"""
    while not term.nodes and term.op in ("cast", "view"):
        term = term.args[0]
    return bool(term.nodes)


def unexpanded(term: Term) -> Term:
    """A value before it was broadcast by ``expand``."""
    while term.op == "expand":
        term = term.args[0]
    return term
