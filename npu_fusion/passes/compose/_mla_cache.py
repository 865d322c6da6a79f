"""Where new rows go in the two caches, as the operators want it: pages and one slot per row.

::

    cache [BlockNum, BlockSize, 1, C], slot of each row                                  as it is
    cache [R, C], row numbers                                                            pages of the rows
    cache [B, 1, L, C], positions [S] for all batches            slots b * L + position, pages of L
    cache[:B, start:end]                                         slots b * L + start + 0, 1, ..

A view of a contiguous cache as pages moves nothing. A negative index counts from the end where the source is
``index_put``, and skips the row in the operator: it is brought into range first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from npu_fusion.passes.canonicalize.cache_writes import as_write
from npu_fusion.passes.checks import Truth, row_major
from npu_fusion.passes.compose._mla_exits import Tokens
from npu_fusion.passes.memory import storage_root
from npu_fusion.passes.pattern import Context, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import Size, Term

aten = torch.ops.aten

_PREFERRED = (128, 64, 32, 16)
"""Rows of a page, where the cache has no pages of its own."""


@dataclass(frozen=True)
class Caches:
    """Two caches that are written at the same slots."""

    kv: Term
    kr: Term
    """The tensors before the write."""
    kv_out: Term
    kr_out: Term
    """The terms of the caches after it."""
    where: Any
    how: str
    dim: int | None
    wraps: bool
    rows: Size
    """Of one batch (or of the whole cache): what a slot of the next batch is ahead by."""
    indexed: Term
    """The cache as the write sees it."""
    pages: tuple[Size, Size]
    tokens: Tokens
    """[B, S] where the cache has batches, also of hidden states [T, He]."""

    @property
    def mode(self) -> str:
        return "PA_NZ" if self.how == "PA_NZ" else "PA_BSND"

    @property
    def inputs(self) -> list[Term]:
        return [self.kv, self.kr, *([self.where] if isinstance(self.where, Term) else [])]

    def paged(self, e: Emitter) -> tuple[fx.Node, fx.Node]:
        kv, kr = (e.view(e.term(c), (*self.pages, 1, c.shape[-1])) for c in (self.kv, self.kr))
        return kv, kr

    def slots(self, e: Emitter) -> fx.Node:
        """int64, of the shape of the tokens."""
        key = (Caches, self.where, self.how, self.dim, self.wraps, self.rows, self.tokens)
        return e.shared(key, lambda: self._slots(e))

    def _extent(self, e: Emitter) -> Any:
        return self.rows if isinstance(self.rows, int) else e.size(e.term(self.indexed), self.dim or 0)

    def _slots(self, e: Emitter) -> fx.Node:
        if isinstance(self.where, Term):
            slots = e.term(self.where, torch.int64)
            if self.wraps and not _from_zero(self.where):
                slots = e.call(aten.remainder.Scalar, slots, self._extent(e))
        else:
            slots = e.arange(self.tokens.shape[-1] if self.dim else self.tokens.total)
            if self.where != 0:
                slots = e.call(aten.add.Tensor, slots, *e.sizes((self.where,)))
            if not isinstance(self.where, int):  # a slice may begin at a negative position
                slots = e.call(aten.remainder.Scalar, slots, self._extent(e))
        if not self.dim:  # a slot for every row, or batches that do not exist
            return e.view(slots, self.tokens.shape)
        batch, length = self.tokens.shape
        if batch == 1:
            return e.view(slots, (batch, length))
        first = e.view(e.arange(batch, self._extent(e)), (batch, 1))
        return e.call(aten.add.Tensor, first, slots)


def caches(kv: Term, kr: Term, tokens: Tokens, context: Context) -> Caches | Refused:
    """The caches that the terms ``kv`` and ``kr`` write rows into, one row per token."""
    view, sizes = context.view, context.sizes
    first, second = as_write(view, kv), as_write(view, kr)
    assert first is not None and second is not None
    if first.args[2:] != second.args[2:]:
        return Refused("the two caches are written at different places", "", (kv, kr))
    bases = [_base(w) for w in (first, second)]
    if not sizes.same_shape(bases[0].shape[:-1], bases[1].shape[:-1]):
        shown = f"{list(bases[0].shape)} and {list(bases[1].shape)}"
        return Refused("the two caches have different shapes", shown, (kv, kr))
    for base in bases:
        held = base.node
        if held is None or not row_major(held.meta["val"]):
            return Refused("a cache is not contiguous", f"{list(base.shape)}", (kv, kr))
    rows, (where, how, dim, wraps) = first.args[1], first.args[2:]
    shape, indexed = bases[0].shape, first.args[0]

    def found(dim: int | None, length: Size, pages: tuple[Size, Size]) -> Caches:
        return Caches(bases[0], bases[1], kv, kr, where, how, dim, wraps, length, indexed, pages, tokens)

    if how in ("PA", "PA_NZ"):
        return found(None, shape[0] * shape[1], (shape[0], shape[1]))
    if dim == len(first.args[0].shape) - 1:
        return Refused("columns of a cache are written, not rows", f"{list(shape)}", (kv, kr))
    middle = list(first.args[0].shape[:-1])
    del middle[dim]
    if any(s != 1 for s in middle[1 if dim else 0 :]):
        return Refused("a cache has rows of several heads", f"{list(shape)}", (kv, kr))
    if dim == 0:
        paged = first.args[0] is not bases[0]
        total = first.args[0].shape[0]
        if sizes.equal(rows.shape[0], tokens.total) is not Truth.YES:
            return Refused("the new rows are not one per token", f"{list(rows.shape)}", (kv, kr))
        pages = (shape[0], shape[1]) if paged else _pages(total, 1, context)
        return _ragged(total) if pages is None else found(0, total, pages)
    shown = f"{list(rows.shape)} for tokens {list(tokens.shape)}"
    if len(tokens.shape) != 2:  # quantized layers flatten what they read
        flat, tokens = tokens, Tokens((rows.shape[0], rows.shape[dim]))
        if sizes.equal(tokens.total, flat.total) is not Truth.YES:
            return Refused("the new rows are not one per token", shown, (kv, kr))
    if sizes.equal(rows.shape[dim], tokens.shape[1]) is not Truth.YES or not _batches(rows, tokens, context):
        return Refused("the new rows are not one per token", shown, (kv, kr))
    length = shape[dim]
    pages = _pages(length, shape[0], context)
    return _ragged(length) if pages is None else found(dim, length, pages)


def _ragged(length: Size) -> Refused:
    return Refused("the cache cannot be seen as pages of a multiple of 16 rows", f"it has {length}")


def _batches(rows: Term, tokens: Tokens, context: Context) -> bool:
    return context.sizes.equal(rows.shape[0], tokens.shape[0]) is Truth.YES


def _base(write: Term) -> Term:
    """The cache as the model holds it, pages and all."""
    cache = write.args[0]
    if write.args[4] == 0 and write.args[3] == "rows" and cache.op == "view" and cache.args[0].nodes:
        base = cache.args[0]
        if base.shape[-1] == cache.shape[-1] and len(base.shape) == 4 and base.shape[2] == 1:
            return base
    return cache


def _pages(rows: Size, batches: Size, context: Context) -> tuple[Size, Size] | None:
    """Number and rows of pages, for ``batches`` times ``rows``."""
    if isinstance(rows, int):
        for size in _PREFERRED:
            if rows % size == 0:
                return batches * (rows // size), size
    return (batches, rows) if context.config.target is None else None


def _from_zero(index: Term) -> bool:
    """Is no index negative, since they count up from 0 or a number above it?"""
    if index.op == "aten.arange.default":
        return True
    first = {"aten.arange.start": 0, "aten.arange.start_step": 0, "prims.iota.default": 1}.get(index.op)
    if first is None:
        return False
    step = 1 if index.op == "aten.arange.start" else index.args[2]
    return all(isinstance(n, int) and n >= 0 for n in (index.args[first], step))


def later_reader(caches: Caches, context: Context, *, overwritten: bool = False) -> Refused | None:
    """Something that reads an old cache after the new rows are written, other than the write itself.

    ``overwritten``: the operator writes into the old cache, so that nobody else may read it at all.
    """
    of, dead = context.view.of, context.rewriter.dead
    for cache, out in ((caches.kv, caches.kv_out), (caches.kr, caches.kr_out)):
        written = min(out.nodes)
        rows = as_write(context.view, out)
        pending = list(cache.nodes[:1])
        if not pending:
            continue
        pending = [storage_root(pending[0])]
        while pending:
            for user in pending.pop().users:
                then = of.get(user)
                if user in dead or _part_of_write(then, out, rows) or _written_back(user, out, of):
                    continue
                if getattr(user.target, "is_view", False) or user.target is aten.reshape.default:
                    pending.append(user)
                elif (overwritten or user > written) and user.target is not aten.copy_.default:
                    return Refused("the old cache is read after the write", f"by {user.name}", (out,))
    return None


def _part_of_write(then: Any, out: Term, rows: Term | None) -> bool:
    if isinstance(then, tuple):
        return out in then
    assert rows is not None
    if then is out or then is rows.args[1]:
        return True
    return isinstance(then, Term) and then.op in ("write", "filled") and rows.args[1] in _sources(then)


def _written_back(user: fx.Node, out: Term, of: Mapping[fx.Node, Any]) -> bool:
    """Does the node put the written cache back into the tensor that it is a part of?"""
    if user.target not in (aten.select_scatter.default, aten.slice_scatter.default):
        return False
    source = of.get(user.args[1])  # type: ignore[arg-type]
    while isinstance(source, Term) and source is not out and source.op == "view":
        source = source.args[0]
    return source is out


def _sources(write: Term) -> tuple[Any, ...]:
    return write.args[1] if write.op == "filled" else (write.args[1],)
