"""Attention to a latent instead of to keys and values expanded from it (multi-head latent attention).

::

    %e = view(mm(%c, t(%w)), [B, L, N, D+Dv])               %q = cat(bmm(%qn, W_UK), %qr)    [B, N, S, C+Dr]
    %kn, %v = split(transpose(%e), [D, Dv])        ──▶      %k = cat(%c, %kr)                [B, 1, L, C+Dr]
    %k = cat(%kn, expand(%kr))                              %l = attention(%q, %k, %k[:C])
    %y = attention(cat(%qn, %qr), %k, %v)                   %y = bmm(%l, W_UV)

W_UK [N, D, C] and W_UV [N, C, Dv] are views of the weight %w of [N*(D+Dv), C], or the two tensors that it is
put together from. Scale and mask stay. The expansion ran over the whole cache at every step; now the query
and the result are projected, which is cheaper while there are fewer than C(D+Dv) / (2C-D-Dv) queries (170 for
DeepSeek-V3). Attention written out reads the latent once for all heads. An attention operator gets %k as its
value too, since many take one size of head only; the columns of %kr in the result are cut off.

Conditions: nothing else reads what is expanded; a bmm for each product, or an attention operator without
dropout; one latent and one rotary key for all heads; as many heads in the query; no bias. Traps: an operator
takes its scale from the size of the head unless told; with a cache of expanded keys and values there is
nothing to absorb, since the latent is gone.

Attention may be in float32 where the expansion is in 16 bits: the source widens what was expanded, as
Inductor's graphs of a bfloat16 model do. Scores, weights and sums stay in the source's dtypes: %q and %k are
widened. The products with W_UK and W_UV are in the dtype of the weight, as the expansion was, so %l is
rounded to that. A query of genuine float32 numbers is not rounded: its product with W_UK is in float32.

Always ``relaxed``: the products are summed in another order, and in 16 bits rounded at other places.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from npu_fusion.config import Numerics
from npu_fusion.passes.axes import layout
from npu_fusion.passes.checks import Sizes, Truth
from npu_fusion.passes.compose._attention import Attention, called, too_wide, written_out
from npu_fusion.passes.compose._latent import (
    Expansion,
    expansion,
    is_key,
    product_of,
    same_axes,
    whole_axes,
    written,
)
from npu_fusion.passes.pattern import Constraint, Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import Drift, Size, Term, sizes_of
from npu_fusion.passes.walk import buildable, dtype_name, narrow, unexpanded

aten = torch.ops.aten

_WHAT = "attention to the latent: W_UK and W_UV are multiplied to query and result, not to keys and values"


class MlaAbsorb(Fusion):
    name = "mla_absorb"
    operator = None
    anchors: ClassVar = ("attention", "bmm")
    priority = 5
    stage = "absorb"

    def match(self, term: Term, context: Context) -> Match | Refused | None:
        found = _attention(term, context)
        if not isinstance(found, Attention):
            return found
        read = expansion(found.key, found.value, context)
        if not isinstance(read, Expansion):
            return _cached(found, context) if read is None else read
        return _absorbed(found, read, context)


def _attention(term: Term, context: Context) -> Attention | Refused | None:
    if term.op == "attention":
        _, _, key, value = term.args
        read = expansion(key, value, context)
        found = called(term, context)
        # what is refused is near only where there is something to absorb
        return None if read is None and isinstance(found, Refused) else found
    product = product_of(term.args[1], context)
    if product is None or product.node is None or term.node is None:
        return None
    return written_out(term, product.node, lambda k: is_key(k, product, context), context)


def _cached(found: Attention, context: Context) -> Refused | None:
    """Keys and values that are written to, or grow, caches of their own after they were expanded."""
    key, value = (written(t, context) for t in (found.key, found.value))
    if key is None or value is None or expansion(key, value, context) is None:
        return None
    return Refused(
        "keys and values are cached after they were expanded",
        "the cache would have to hold the latent",
        (found.result,),
    )


def _absorbed(found: Attention, at: Expansion, context: Context) -> Match | Refused | None:
    sizes, result = context.sizes, found.result
    dtype = at.product.dtype
    assert dtype is not None
    rotary = None if at.rotary is None else unexpanded(narrow(at.rotary, dtype) or at.rotary)
    if rotary is not None and not sizes.same_shape(rotary.shape[:-1], (at.batch, 1, at.rows)):
        shown = f"it is {list(rotary.shape)}"
        return Refused("the rotary key is not one for all heads", shown, (result,))
    weight = _weight(at, context)
    if isinstance(weight, Refused):
        return weight
    query = _query(found, at, sizes)
    if query is None:
        shown = f"{list(found.query.shape)} and {at.heads} heads of keys"
        return Refused("the query has other heads than the keys", shown, (result,))
    latent = at.latent
    limit = too_wide(found, at.rank + query.turned)
    if limit is not None:
        return limit

    def build(e: Emitter) -> list[fx.Node]:
        plain, turning = query.parts(e)
        q = _per_head(e, plain, weight.part(e, at.nope))
        read = [e.view(e.term(latent), (at.batch, 1, at.rows, at.rank))]
        if rotary is not None:
            read.append(e.term(rotary))
        q = e.cast(q if turning is None else _side_by_side(e, [q, turning]), found.query.dtype)
        if found.scale != 1:
            q = e.call(aten.mul.Tensor, q, found.scale)
        if sizes.equal(at.length, at.rows) is not Truth.YES:
            read = [e.call(aten.slice.Tensor, x, 2, 0, *e.sizes((at.length,))) for x in read]
        k = e.cast(read[0] if rotary is None else _side_by_side(e, read), found.key.dtype)
        over = found.rebuild(e, q, k, at.rank, query.width**-0.5)
        up = e.call(aten.permute.default, weight.part(e, at.value), [0, 2, 1])
        return [e.cast(_per_head(e, e.cast(over, dtype), up), result.dtype)]

    drift = [Drift(Numerics.RELAXED, _WHAT)]
    if result.dtype != dtype:
        what = f"the attended latent is rounded to {dtype_name(dtype)}, the dtype of W_UV"
        drift.append(Drift(Numerics.RELAXED, what))
    return Match(
        [*query.inputs, latent, rotary, *weight.inputs, *found.others],
        [[result]],
        build,
        drift,
        [_pays(query.length, at, sizes)],
    )


def _pays(length: Size, at: Expansion, sizes: Sizes) -> Constraint:
    """Fewer queries than it takes to make the longer rows of the latent dearer than the expansion."""
    reason = "the query is too long for absorbing to pay"
    once, each = at.rank * (at.nope[1] + at.value[1]), 2 * at.rank - at.nope[1] - at.value[1]
    if each <= 0:
        return Constraint(Truth.YES, reason)
    most = (once - 1) // each
    relation = length <= most
    return Constraint(sizes.decide(relation), reason, f"{length} queries, at most {most}", relation)


@dataclass(frozen=True)
class Query:
    """The query [B, N, S, D+Dr] and its parts, where the model has them apart."""

    whole: Term
    shape: tuple[Size, ...]
    pieces: tuple[Term, ...]
    split: int
    """D"""
    turned: int
    """Dr"""

    @property
    def inputs(self) -> tuple[Term, ...]:
        return self.pieces or (self.whole,)

    @property
    def length(self) -> Size:
        return self.shape[2]

    @property
    def width(self) -> int:
        return self.split + self.turned

    def parts(self, e: Emitter) -> tuple[fx.Node, fx.Node | None]:
        """[B, N, S, D] and [B, N, S, Dr]"""
        if self.pieces:
            return e.term(self.pieces[0]), e.term(self.pieces[1])
        whole = e.view(e.term(self.whole), self.shape)
        if not self.turned:
            return whole, None
        plain = e.call(aten.slice.Tensor, whole, 3, 0, self.split)
        return plain, e.call(aten.slice.Tensor, whole, 3, self.split, self.width)


def _query(found: Attention, at: Expansion, sizes: Sizes) -> Query | None:
    """The query, or None where its heads are not those of the keys."""
    given, split = found.query, at.nope[1]
    *rows, length, width = given.shape
    if not isinstance(width, int):
        return None
    shape, turned = (at.batch, at.heads, length, width), width - split
    if at.rotary is not None:
        read = layout(given, sizes)
        pieces = _pieces(read.root, shape, split, sizes) if read is not None else ()
        if read is not None and pieces and same_axes(read.flat(), whole_axes(shape), sizes):
            plain = narrow(pieces[0], at.product.dtype)
            if plain is not None and buildable(plain):
                pieces = (plain, pieces[1])
            return Query(given, shape, pieces, split, turned)
    have = (math.prod(rows), *given.shape[-2:])
    want = (at.batch * at.heads, length, width)
    return Query(_unwidened(given, sizes), shape, (), split, turned) if sizes.same_shape(have, want) else None


def _unwidened(given: Term, sizes: Sizes) -> Term:
    """The 16-bit tensor that a value holds all entries of in memory order, widened; else the value itself."""
    read = layout(given, sizes)
    if read is None or read.root.dtype == given.dtype or not buildable(read.root):
        return given
    return read.root if same_axes(read.flat(), whole_axes(read.root.shape), sizes) else given


def _pieces(root: Term, shape: tuple[Size, ...], split: int, sizes: Sizes) -> tuple[Term, ...]:
    """What a query of that shape is put together from, where it is cut at ``split``."""
    if root.op != "cat" or root.args[1] != 3 or len(root.args[0]) != 2:
        return ()
    pieces: tuple[Term, ...] = root.args[0]
    return pieces if pieces[0].shape[3] == split and sizes.same_shape(root.shape, shape) else ()


@dataclass(frozen=True)
class Weight:
    """W_UK and W_UV in the one weight, or already apart."""

    inputs: tuple[Term, ...]
    apart: dict[tuple[int, int], Term]
    heads: int
    width: int
    transposed: bool

    def part(self, e: Emitter, columns: tuple[int, int]) -> fx.Node:
        """[N, columns, C]"""
        if columns in self.apart:
            return e.term(self.apart[columns])
        weight = e.term(self.inputs[0])
        if not self.transposed:
            weight = e.call(aten.permute.default, weight, [1, 0])
        rank = weight.meta["val"].shape[1]
        start, length = columns
        whole = e.view(weight, (self.heads, self.width, rank))
        return e.call(aten.slice.Tensor, whole, 1, start, start + length)


def _weight(at: Expansion, context: Context) -> Weight | Refused:
    """Where the weight of the expansion comes from."""
    given = at.product.args[1]
    transposed = given.op == "permute"
    weight = given.args[0] if transposed else given
    if weight.op == "view" and transposed and weight.args[0].op == "cat":
        pieces, dim = weight.args[0].args
        shapes = [p.shape for p in pieces]
        if dim == 1 and all(len(s) == 3 and s[0] == at.heads and isinstance(s[1], int) for s in shapes):
            starts = [sum(s[1] for s in shapes[:i]) for i in range(len(shapes))]
            apart = {(start, s[1]): p for start, s, p in zip(starts, shapes, pieces, strict=True)}
            if at.nope in apart and at.value in apart and all(map(_is_constant, pieces)):
                return Weight((apart[at.nope], apart[at.value]), apart, at.heads, at.width, True)
    if not _is_constant(weight):
        node = weight.node
        return Refused(
            "the weight of the expansion is computed in the graph",
            f"by {node.name}" if node is not None else "",
            (at.product,),
        )
    return Weight((weight,), {}, at.heads, at.width, transposed)


def _is_constant(term: Term) -> bool:
    return term.op == "input" and term.args[0].op in ("placeholder", "get_attr")


def _side_by_side(e: Emitter, parts: list[fx.Node]) -> fx.Node:
    """One tensor of two that differ in the last dimension, and in dtype where only one of them is float32."""
    wide = torch.promote_types(*(p.meta["val"].dtype for p in parts))
    return e.call(aten.cat.default, [e.cast(p, wide) for p in parts], -1)


def _per_head(e: Emitter, x: fx.Node, weight: fx.Node) -> fx.Node:
    """[B, N, S, a] times [N, a, b] for each head, in the wider of their dtypes: [B, N, S, b]."""
    wide = torch.promote_types(x.meta["val"].dtype, weight.meta["val"].dtype)
    x, weight = e.cast(x, wide), e.cast(weight, wide)
    batch, heads, length, _ = _shape(x)
    rows = e.view(e.call(aten.permute.default, x, [1, 0, 2, 3]), (heads, batch * length, _shape(x)[3]))
    product = e.call(aten.bmm.default, rows, weight)
    apart = e.view(product, (heads, batch, length, _shape(weight)[2]))
    return e.call(aten.permute.default, apart, [1, 0, 2, 3])


def _shape(node: fx.Node) -> tuple[Size, ...]:
    return sizes_of(node.meta["val"].shape)
