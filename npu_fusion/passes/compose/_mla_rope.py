"""One cosine and one sine [.., Dr] per token out of what the rotations of query and key are given.

::

    cos [B, 1, S, Dr], [T, 1, Dr], expanded over heads               ->   view
    cos [1, 1, S, Dr] for every batch                                ->   view, expand
    slice(cos, :Dr/2), used for both halves                          ->   cos, if it is cat(f, f); cat(c, c)
    complex [.., Dr/2]                                               ->   real and imaginary part, twice
    for each pair side by side                                       ->   of the even elements, of the odd

Both rotations must read the same values; the operator reads the two halves independently.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from npu_fusion.config import Numerics
from npu_fusion.passes.axes import Dim
from npu_fusion.passes.checks import Truth
from npu_fusion.passes.compose._mla_exits import Tokens
from npu_fusion.passes.compose._mla_sites import Turn, entries
from npu_fusion.passes.pattern import Context, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import Drift, Size, Term, representable
from npu_fusion.passes.walk import buildable, dtype_name, unexpanded

aten = torch.ops.aten


@dataclass(frozen=True)
class Angles:
    """Where cosine and sine come from."""

    cos: Term
    sin: Term | None
    """None: ``cos`` is complex."""
    whole: tuple[Term, Term] | None
    """Cosine and sine of full width, of which the source reads one half."""
    twice: bool
    paired: bool
    """Side by side for each pair, where the operator has the even elements' first."""
    shape: tuple[Size, ...]
    """With 1 where one value serves for all, before the columns."""
    tokens: Tokens
    dtype: torch.dtype
    read: tuple[Term, ...]
    """All that the source reads them from."""
    drift: tuple[Drift, ...]

    @property
    def inputs(self) -> tuple[Term, ...]:
        return (*self.read, *(self.whole or ()))

    def nodes(self, e: Emitter) -> tuple[fx.Node, fx.Node]:
        if self.sin is None:
            cos, sin = (self._shared(e, self.cos, part) for part in (0, 1))
            return cos, sin
        given = self.whole or (self.cos, self.sin)
        cos, sin = (self._shared(e, term, None) for term in given)
        return cos, sin

    def _shared(self, e: Emitter, term: Term, part: int | None) -> fx.Node:
        doubled = self.twice and self.whole is None
        key = (Angles, term, part, self.shape, self.tokens, self.dtype, doubled, self.paired)
        return e.shared(key, lambda: self._node(e, term, part))

    def _node(self, e: Emitter, term: Term, part: int | None) -> fx.Node:
        node = e.term(term)
        if part is not None:
            parts = e.call(aten.view_as_real.default, node)
            node = e.call(aten.select.int, parts, parts.meta["val"].dim() - 1, part)
        node = e.cast(node, self.dtype)
        width = term.shape[-1]
        node = e.view(node, (*self.shape, width))
        if self.paired:
            halves = [e.call(aten.slice.Tensor, node, len(self.shape), i, width, 2) for i in (0, 1)]
            node = e.call(aten.cat.default, halves, -1)
        if self.twice and self.whole is None:
            node = e.call(aten.cat.default, [node, node], -1)
            width = 2 * width
        if self.shape != self.tokens.shape:
            node = e.call(aten.expand.default, node, [*e.sizes(self.tokens.shape), width])
        return node


def angles(
    query: Turn, key: Turn, tokens: Tokens, dtype: torch.dtype | None, context: Context
) -> Angles | Refused:
    """Cosine and sine for both rotations, in ``dtype``."""
    assert dtype is not None
    ours, theirs = _read(query, context), _read(key, context)
    if ours != theirs or (query.twice, query.mode) != (key.twice, key.mode):
        return Refused("query and key are rotated by different angles", "", (query.term, key.term))
    shape = _covers(query, tokens, context)
    if shape is None or shape != _covers(key, tokens, context):
        shown = f"{list(unexpanded(query.cos).shape)} for {list(query.x.shape)}"
        return Refused("cosine and sine are not one row per token", shown, (query.term,))
    cos, sin = unexpanded(query.cos), None if query.sin is None else unexpanded(query.sin)
    given = [t for turn in (query, key) for t in (turn.cos, turn.sin) if t is not None]
    drift: list[Drift] = []
    narrowed: list[Term] = []
    for term in (cos, sin):
        if term is None:
            continue
        if term.dtype == torch.float32 != dtype and representable(term, dtype):
            term = context.view.cast(term, dtype)
        elif term.dtype != dtype:
            what = f"cosine and sine are rounded from {dtype_name(term.dtype)} to {dtype_name(dtype)}"
            if not (term.dtype == torch.complex64 and dtype == torch.float32):
                drift.append(Drift(Numerics.RELAXED, what))
        narrowed.append(term)
    if not all(buildable(t) for t in narrowed):
        return Refused("no node holds cosine and sine", "", (query.term,))
    whole = None
    if sin is not None and query.twice:
        whole = _whole(narrowed[0], narrowed[1], context)
    read = tuple(dict.fromkeys((*narrowed, *given, *(unexpanded(t) for t in given))))
    return Angles(
        narrowed[0],
        None if sin is None else narrowed[1],
        whole,
        query.twice,
        query.mode == "interleave",
        shape,
        tokens,
        dtype,
        read,
        tuple(dict.fromkeys(drift)),
    )


def _read(turn: Turn, context: Context) -> tuple[object, ...]:
    """What of which tensors the rotation reads, whatever its shape."""
    found: list[object] = []
    for term in (turn.cos, turn.sin):
        if term is None:
            continue
        found.append(entries(term, context))
    return tuple(found)


def _covers(turn: Turn, tokens: Tokens, context: Context) -> tuple[Size, ...] | None:
    """The leading sizes of the cosine as [B, S] or [T], 1 where it is the same for all; None if it is not one
    row per token (or is per head)."""
    equal = context.sizes.equal
    shape = unexpanded(turn.cos).shape
    width = turn.x.shape[-1] if not turn.twice else turn.x.shape[-1] // 2
    other = shape if turn.sin is None else unexpanded(turn.sin).shape
    if shape[-1:] != (width,) or other != shape or len(shape) > len(turn.x.shape):
        return None
    full = (1,) * (len(turn.x.shape) - len(shape)) + shape
    present: list[tuple[Size, Dim]] = []
    missing = False
    for size, dim, have in zip(full[:-1], turn.at.dims[:-1], turn.x.shape[:-1], strict=True):
        if have == 1:
            continue
        if any(a.dim != 0 for a in dim):
            if size != 1:
                return None  # another angle for each head
            continue
        if equal(size, have) is Truth.YES:
            present.append((size, dim))
        elif size == 1:
            missing = True
        else:
            return None
    if not missing:
        return tokens.shape if _token_order(turn) else None
    if not present:
        return (1,) * len(tokens.shape)
    if len(tokens.shape) != 2 or len(present) != 1:
        return None
    ((size, dim),) = present
    positions = all(a.step == 1 for a in dim) and equal(size, tokens.shape[1]) is Truth.YES
    return (1, tokens.shape[1]) if positions else None


def _token_order(turn: Turn) -> bool:
    """Do batches come before positions?"""
    steps = [a.step for dim in turn.at.dims for a in dim if a.dim == 0]
    return len(steps) < 2 or steps[-1] == 1


def _whole(cos: Term, sin: Term, context: Context) -> tuple[Term, Term] | None:
    """The tensors of full width whose first halves these are, where both halves are equal."""
    found = []
    for term in (cos, sin):
        base = term.args[0] if term.op == "view" else term
        if base.op != "half" or base.args[1] != 0 or not base.args[0].nodes:
            return None
        if not _repeats(base.args[0]):
            return None
        found.append(base.args[0])
    return found[0], found[1]


def _repeats(term: Term) -> bool:
    """Are the two halves of the last dimension the same by how the value is made?"""
    while True:
        if term.op == "cat":
            pieces, dim = term.args
            return len(pieces) == 2 and pieces[0] is pieces[1] and dim == len(term.shape) - 1
        if term.op in ("cos", "sin", "cast") or (term.op == "mul" and isinstance(term.args[1], (int, float))):
            term = term.args[0]
        else:
            return False
