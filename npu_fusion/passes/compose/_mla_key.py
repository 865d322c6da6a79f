"""The key side of latent attention: a normalized latent, the rotated key beside it, and their caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from npu_fusion.passes.axes import Axis, Layout, coalesced, layout
from npu_fusion.passes.canonicalize.cache_writes import rows_of
from npu_fusion.passes.checks import Truth
from npu_fusion.passes.compose._mla_cache import Caches, caches
from npu_fusion.passes.compose._mla_exits import Tokens, unpaired
from npu_fusion.passes.compose._mla_sites import (
    Norm,
    Projection,
    Sites,
    Turn,
    bare,
)
from npu_fusion.passes.lift.rms_norm import FLOATS
from npu_fusion.passes.pattern import Context, Refused
from npu_fusion.passes.terms import Term


@dataclass(frozen=True)
class Key:
    """The side of the keys: latent and rotated part of one projection, and their caches."""

    norm: Norm
    turn: Turn
    caches: Caches
    scale: float

    @property
    def projection(self) -> Projection:
        return self.norm.projection


def keyed(norm: Norm, found: Sites, context: Context) -> Turn | None:
    """The rotation beside a latent's norm; None if there is none."""
    beside = found.turns.get(norm.projection.root, ())
    columns = norm.at.dims[-1]
    if len(columns) != 1 or columns[0].step != 1:
        return None
    end = norm.at.origin[1] + columns[0].size
    for turn in beside:
        if context.sizes.equal(turn.at.origin[1], end) is Truth.YES and not _has_heads(turn, norm):
            return turn
    return None


def _has_heads(turn: Turn, norm: Norm) -> bool:
    """More columns than one head's: a query, say, in one product with the latent."""
    width = turn.x.shape[-1]
    return any(a.dim == 1 and a.step not in (1, 2) and a.step == width for a in turn.at.flat())


def key_side(norm: Norm, turn: Turn, tokens: Tokens, found: Sites, context: Context) -> Key | Refused:
    """Where the latent and the rotated key are written."""
    kv = [(w, s) for t, s in _with_scales(norm.term, found) for w in found.whole_writes(t)]
    kr = found.whole_writes(bare(turn.term))
    if not kv:
        return _unwritten(norm, context)
    if not kr:
        return Refused("the rotated key is not written to a cache of its own", "", (turn.term,))
    if len(kv) > 1 or len(kr) > 1:
        return Refused("the latent or the rotated key is written to several caches", "", (norm.term,))
    (written, scale), (rotated,) = kv[0], kr
    where = caches(written, rotated, tokens, context)
    if isinstance(where, Refused):
        return where
    for write, at, source in ((written, norm.at, norm.term), (rotated, turn.at, turn.term)):
        refused = _rows_of_tokens(write, at, source, tokens, context)
        if refused is not None:
            return refused
    return Key(norm, turn, where, scale)


def _with_scales(term: Term, found: Sites) -> list[tuple[Term, float]]:
    """The value itself, and what is written of it multiplied by a number."""
    scaled = [(t, s) for t in found.writes for inner, s in [unscaled(t)] if inner is term and t is not term]
    return [(term, 1.0), *scaled]


def unscaled(term: Term) -> tuple[Term, float]:
    """A value and the number that it was multiplied by."""
    scale = 1.0
    while term.op in ("mul", "div") and isinstance(term.args[1], (int, float)):
        scale = scale * term.args[1] if term.op == "mul" else scale / term.args[1]
        term = bare(term.args[0])
    return term, scale


def _rows_of_tokens(
    write: Term, at: Layout, source: Term, tokens: Tokens, context: Context
) -> Refused | None:
    rows = rows_of(write)
    known = dict([unpaired(source, at)])
    here = layout(rows, context.sizes, known=known, through=_inner)
    flat = () if here is None else here.flat()
    columns = coalesced(at.dims[-1])
    whole = here is not None and here.root is at.root and here.origin == at.origin
    if (
        not whole
        or flat[len(flat) - len(columns) :] != columns
        or not all_tokens(flat[: len(flat) - len(columns)], tokens, context)
    ):
        return Refused("the new rows are not one per token", f"{list(rows.shape)}", (write,))
    return None


def all_tokens(axes: Sequence[Axis], tokens: Tokens, context: Context) -> bool:
    """Do these axes run once through all tokens, in their order?"""
    equal, total = context.sizes.equal, tokens.total
    if not axes:
        return equal(total, 1) is Truth.YES
    (axis, *more) = axes
    return not more and axis.dim == 0 and axis.step == 1 and equal(axis.size, total) is Truth.YES


def _inner(term: Term) -> Term | None:
    """The operand of a rounding or a scaling."""
    if term.op == "cast" and term.dtype in FLOATS and term.args[0].dtype in FLOATS:
        return term.args[0]
    if term.op in ("mul", "div") and isinstance(term.args[1], (int, float)):
        return term.args[0]
    return None


def _unwritten(norm: Norm, context: Context) -> Refused:
    """Why the latent is in no cache."""
    pending, seen = [norm.term], {norm.term}
    while pending:
        term = pending.pop()
        for user in context.view.users(term):
            if user.op == "mm":
                return Refused(
                    "keys and values are expanded from the latent before they are cached, or not cached",
                    "mla_absorb attends to a cached latent",
                    (norm.term,),
                )
            if user.op in ("view", "cast", "permute", "expand") and user not in seen:
                seen.add(user)
                pending.append(user)
    grown = [
        t
        for t in context.view.by_operator().get("cat", ())
        if t.nodes and any(isinstance(p, Term) and bare(p) is norm.term for p in t.args[0])
    ]
    for cat in grown:
        if cat.args[1] == len(cat.shape) - 1:
            return Refused("latent and rotated key are stored in one tensor", "", (cat,))
        return Refused("the cache grows: it is put together with cat", "use a static cache", (cat,))
    return Refused("the latent is not written to a cache in this graph", "", (norm.term,))
