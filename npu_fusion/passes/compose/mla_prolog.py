"""The prolog of multi-head latent attention: hidden states to queries in latent space and new cache rows.

::

    %cq = rms_norm(mm(%x, %w_dq), %g_cq)                      %query, %query_rope, .., %kv_cache, %kr_cache =
    %q  = view(mm(%cq, %w_uq_qr), [B, S, N, D+Dr])                npu_mla_prolog_v3_functional(
    %query = %q[.., :D] @ W_UK [N, D, Hckv]                           %x, %w_dq, %w_uq_qr, %w_uk,
    %query_rope = rotate(%q[.., D:])                    ->            %w_dkv_kr, %g_cq, %g_ckv, sin, cos,
    %kv = mm(%x, %w_dkv_kr)                                           %kv_cache, %kr_cache,
    write(%kv_cache, rms_norm(%kv[.., :Hckv], %g_ckv), slots)         cache_index=slots, ..)
    write(%kr_cache, rotate(%kv[.., Hckv:]), slots)

Also read: the down projections as one product; weights [out, in] or [in, out]; every RMSNorm of
:mod:`..lift.rms_norm`; a product with W_UK by bmm, matmul, einsum, ``npu_transpose_batchmatmul``; W_UK as a
slice of kv_b_proj's weight; every rotation of :mod:`..lift.rotary_mul` and complex numbers; writes by
:mod:`..canonicalize.cache_writes`. The normed query may have other readers (``query_norm``); numbers that
scale the query and the latent (LongCat) are ``qc_qr_scale`` and ``kc_scale``. int8 tokens with dequantized
products and a dynamically quantized query are ``weight_quant_mode`` 2; only the query quantized is 1.

Conditions: one x for both down projections; no bias; query columns [D nope | Dr rope] per head, latent
columns [Hckv | Dr]; one cosine and sine for query and key; both caches written at the same slots, one row per
token, and no reader of an old cache after that; one dtype throughout; norm weights that are stored. The
operator rotates adjacent pairs and returns halves (even elements first). A model that keeps the pairs side by
side has the same scores but another cache: only with ``cache_layout="npu"``, which also allows it for complex
numbers. A model that rotates halves needs its rope columns permuted (``prepare``). npu_mla_prolog and _v2
overwrite the caches that they are given.

At least ``accurate``: norms and rotations are rounded once. ``relaxed`` where cosine and sine are rounded.

Source: torch_npu documentation of npu_mla_prolog_v3; the spellings are those of real models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from npu_fusion.config import Numerics
from npu_fusion.passes.axes import BROADCAST, Axis, Layout, coalesced, layout, viewed
from npu_fusion.passes.checks import Truth, row_major
from npu_fusion.passes.compose._mla_cache import Caches, caches, later_reader
from npu_fusion.passes.compose._mla_exits import Exit, Tokens, exits, unpaired
from npu_fusion.passes.compose._mla_pairs import other_rotation
from npu_fusion.passes.compose._mla_rope import Angles, angles
from npu_fusion.passes.compose._mla_sites import (
    HeadProduct,
    Norm,
    Projection,
    Sites,
    Turn,
    bare,
    entries,
    is_constant,
    quantized_norm,
    same_rows,
    sites,
    unbroadcast,
)
from npu_fusion.passes.lift.dequant import token_scale, weight_scale
from npu_fusion.passes.lift.dynamic_quant import Quantized, channel
from npu_fusion.passes.lift.rms_norm import vector
from npu_fusion.passes.pattern import Constraint, Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Drift, Size, Term
from npu_fusion.passes.walk import dtype_name, stored
from npu_fusion.targets import TARGETS

aten = torch.ops.aten
npu = torch.ops.npu

FLOATS = (torch.float32, *LOW_PRECISION)
PREPARE = "npu_fusion.prepare(model) lays them out once"


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


@dataclass(frozen=True)
class Query:
    """The side of the queries."""

    norm: Norm
    up: Projection
    product: HeadProduct
    turn: Turn
    quantized: Quantized | None
    smooth: Term | None

    @property
    def scale(self) -> float:
        return self.turn.factor


def _pairs(context: Context) -> bool:
    return context.config.cache_layout == "npu"


def _is_latent(norm: Norm, found: Sites) -> bool:
    """Is the norm of the first columns of a wider product, and its result written to a cache?"""
    part = norm.projection.root.shape[-1] != _width(norm.at)
    return part and norm.at.origin[1] == 0 and bool(found.whole_writes(norm.term))


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


class MlaProlog(Fusion):
    name = "mla_prolog"
    operator = "npu_mla_prolog_v3_functional"
    anchors: ClassVar = ("mul", "div", "rms_norm", "write", "filled")
    priority = 8
    stage = "compose"

    def match(self, term: Term, context: Context) -> Match | Refused | None:
        found = sites(context)
        for norm in _latents(term, found, context):
            turn = keyed(norm, found, context)
            if turn is not None:
                return _prolog(norm, turn, found, context)
            if _is_latent(norm, found):
                reason = (
                    "the columns beside the latent are not rotated, or something else is done to them first"
                )
                return Refused(reason, "", (norm.term,))
        return None


def _latents(term: Term, found: Sites, context: Context) -> list[Norm]:
    """The norms that belong to an anchor: its own, or (once) the one whose result it writes."""
    key = (MlaProlog, "tried")
    tried = context.memo.setdefault(key, set())
    inner = term.args[0] if term.op == "cast" else term
    if term.op in ("write", "filled"):
        rows = term.args[1] if term.op == "write" else term.args[1][0]
        inner = _unscaled(bare(rows))[0]
    fresh = [n for n in found.norms if n.term is inner and n not in tried]
    tried.update(fresh)
    return fresh


def _unscaled(term: Term) -> tuple[Term, float]:
    """A value and the number that it was multiplied by."""
    scale = 1.0
    while term.op in ("mul", "div") and isinstance(term.args[1], (int, float)):
        scale = scale * term.args[1] if term.op == "mul" else scale / term.args[1]
        term = bare(term.args[0])
    return term, scale


def _prolog(norm: Norm, turn: Turn, found: Sites, context: Context) -> Match | Refused:
    query = _query(norm, found, context)
    if isinstance(query, Refused):
        return query
    x = norm.projection.x
    if len(x.shape) not in (2, 3):
        return Refused("the hidden states are neither [B, S, He] nor [T, He]", f"{list(x.shape)}", (x,))
    tokens = Tokens(x.shape[:-1])
    key = key_side(norm, turn, tokens, found, context)
    if isinstance(key, Refused):
        return key
    return (
        _columns(query, key, tokens, context)
        or other_rotation(query.turn, pairs=_pairs(context))
        or other_rotation(key.turn, pairs=_pairs(context))
        or _types(query, key, context)
        or _weights(query, key, context)
        or later_reader(key.caches, context)
        or _match(query, key, tokens, context)
    )


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
    scaled = [(t, s) for t in found.writes for inner, s in [_unscaled(t)] if inner is term and t is not term]
    return [(term, 1.0), *scaled]


def _rows_of_tokens(
    write: Term, at: Layout, source: Term, tokens: Tokens, context: Context
) -> Refused | None:
    rows = write.args[1] if write.op == "write" else write.args[1][0]
    known = dict([unpaired(source, at)])
    here = layout(rows, context.sizes, known=known, through=_inner)
    flat = () if here is None else here.flat()
    columns = coalesced(at.dims[-1])
    whole = here is not None and here.root is at.root and here.origin == at.origin
    if (
        not whole
        or flat[len(flat) - len(columns) :] != columns
        or not _all_tokens(flat[: len(flat) - len(columns)], tokens, context)
    ):
        return Refused("the new rows are not one per token", f"{list(rows.shape)}", (write,))
    return None


def _all_tokens(axes: Sequence[Axis], tokens: Tokens, context: Context) -> bool:
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


def _query(latent: Norm, found: Sites, context: Context) -> Query | Refused:
    """The low-rank query of the same hidden states."""
    x = latent.projection.x
    others: list[Norm] = []
    seen: set[Any] = set()
    for norm in found.norms:
        if norm is latent or norm.projection.x is not x or norm.at == latent.at:
            continue
        ups = _ups(norm, found, context)
        for up, quantized, smooth in ups:
            products, turns = found.products.get(up.root, []), found.turns.get(up.root, [])
            if up.root in seen:
                continue
            seen.add(up.root)
            others.append(norm)
            if len(products) == 1 and len(turns) == 1:
                return Query(norm, up, products[0], turns[0], quantized, smooth)
    if not others:
        if any(_same_input(t, x) for ts in found.turns.values() for t in ts if t.projection.x is not x):
            return Refused("query and latent are projected from different tensors", "", (latent.term,))
        return Refused("the query has no low-rank projection of the same hidden states", "", (latent.term,))
    return Refused(
        "the query is not multiplied by W_UK",
        "keys and values are expanded (mla_absorb, with numerics='relaxed', rewrites that), or the query is "
        "something else first",
        (others[0].term,),
    )


def _same_input(turn: Turn, x: Term) -> bool:
    return bare(turn.projection.x) is bare(x)


Up = tuple[Projection, Quantized | None, Term | None]
"""A projection of the normed query, how that is quantized, and the factor per channel before."""


def _ups(norm: Norm, found: Sites, context: Context) -> list[Up]:
    """The projections of the normed query whose columns are rotated."""
    ups: list[Up] = []
    for turns in found.turns.values():
        up = turns[0].projection
        if up.x.dtype == torch.int8:
            quantized = quantized_norm(up.x, context)
            if quantized is None:
                continue
            inner, smooth = _smoothed(quantized[1], norm.term, context)
            if inner is norm.term:
                ups.append((up, quantized[0], smooth))
        elif same_rows(up.x, context) is norm.term:
            ups.append((up, None, None))
    return ups


def _smoothed(x: Term, norm: Term, context: Context) -> tuple[Term, Term | None]:
    """What is quantized, and the factor per channel in front of it."""
    inner = same_rows(x, context)
    if inner is not norm and inner.op == "mul" and isinstance(inner.args[1], Term):
        for value, factor in (inner.args, inner.args[::-1]):
            smooth = channel(factor, inner.shape[-1], context)
            if same_rows(value, context) is norm and smooth is not None:
                return norm, smooth
    return inner, None


def _columns(query: Query, key: Key, tokens: Tokens, context: Context) -> Refused | None:
    """That the parts are the columns that the operator takes."""
    for projection in (query.norm.projection, query.up, key.projection):
        if projection.biased:
            return Refused("a projection has a bias", "", (projection.root,))
    for norm in (query.norm, key.norm):
        if norm.found.gamma.op == "add" or bare(norm.found.gamma).op == "add":
            return Refused("the weight of a norm has an offset (1 + w)", "", (norm.term,))
    total, latent, turned = key.projection.root.shape[-1], _width(key.norm.at), key.turn.x.shape[-1]
    merged = query.norm.projection.root is key.projection.root
    first = key.norm.at.origin[1]
    if (not merged and (first != 0 or latent + turned != total)) or (first + latent + turned != total):
        shown = f"{latent} and {turned} of {total} columns"
        reason = "the rotation covers only a part of the columns beside the latent"
        return Refused(reason, shown, (key.turn.term,))
    rank, before = _width(query.norm.at), query.norm.at.origin[1]
    want = first if merged else query.norm.projection.root.shape[-1]
    if before != 0 or rank != want:
        return Refused("the norm of the query covers only a part of the columns", "", (query.norm.term,))
    normed = [a for a in query.norm.at.flat() if a.dim == 0]
    if query.norm.at.origin[0] != 0 or not _all_tokens(normed, tokens, context):
        return Refused("the query is not of all tokens in their order", "", (query.norm.term,))
    product, turn = query.product, query.turn
    nope, rope = product.operand.origin[1], turn.at.origin[1]
    plain, turning = product.weight.shape[-2], turn.x.shape[-1]
    heads = _heads(product, plain + turning)
    in_heads = [a for dim in turn.at.dims[:-1] for a in dim if a.dim == 1]
    headed = [Axis(1, plain + turning, heads)] if heads not in (None, 1) else []
    if (
        (nope, rope) != (0, plain)
        or heads is None
        or heads * (plain + turning) != query.up.root.shape[-1]
        or coalesced(product.operand.dims[2]) != coalesced([Axis(1, 1, plain)])
        or in_heads != headed
        or (product.operand.origin[0], turn.at.origin[0]) != (0, 0)
    ):
        shown = f"{plain} from column {nope} and {turning} from {rope}, of {query.up.root.shape[-1]} columns"
        return Refused("the query's columns are not [nope, rope] for each head", shown, (product.term,))
    if turning != turned:
        return Refused(
            "query and key are rotated in different widths", f"{turning} and {turned}", (turn.term,)
        )
    if not isinstance(heads, int) or not _is_weight_uk(product, heads):
        return Refused(
            "the weight per head is not [N, D, Hckv]", f"{list(product.weight.shape)}", (product.term,)
        )
    if product.weight.shape[-1] != latent:
        shown = f"{product.weight.shape[-1]} and {latent}"
        return Refused("the query is not projected to the width of the latent", shown, (product.term,))
    if product.factor != turn.factor:
        shown = f"{product.factor} and {turn.factor}"
        return Refused("the parts of the query are scaled by different numbers", shown, (product.term,))
    if key.turn.factor != 1.0:
        return Refused("the rotated key is scaled", f"by {key.turn.factor}", (key.turn.term,))
    return None


def _width(at: Layout) -> Size:
    return at.dims[-1][0].size if at.dims[-1] else 1


def _heads(product: HeadProduct, width: Size) -> Size | None:
    columns = [a for a in product.operand.flat() if a.dim == 1]
    if len(columns) == 1:
        return 1
    if len(columns) != 2 or columns[0].step != width:
        return None
    return columns[0].size


def _is_weight_uk(product: HeadProduct, heads: int) -> bool:
    """Are the batches of both operands the heads (and sequences, for which the weight is repeated)?"""
    ours, theirs = coalesced(product.operand.dims[0]), coalesced(product.weight_at.dims[0])
    aligned = len(ours) == len(theirs) and all(
        a.size == w.size and (a.dim == 0) == (w.dim == BROADCAST) for a, w in zip(ours, theirs, strict=True)
    )
    counted = [a.size for a in ours if a.dim == 1]
    w_uk = weight_uk(product)
    return aligned and counted == ([heads] if heads > 1 else []) and w_uk.shape[0] == heads


def _types(query: Query, key: Key, context: Context) -> Refused | None:
    dtype = key.caches.kv.dtype
    mode = _quant_mode(query, key)
    if mode is None:
        return Refused("only some of the projections are quantized", "", (key.norm.term,))
    if mode and not _own_scales(query, key, mode, context):
        return Refused("a quantized projection is scaled by another token's scale", "", (key.norm.term,))
    given = {
        "the caches": (key.caches.kv, key.caches.kr),
        "the weight per head": (query.product.weight,),
        "the norms' weights": (query.norm.found.gamma, key.norm.found.gamma),
        "the result": (query.product.term,),
    }
    if mode != 2:
        given["the hidden states"] = (key.projection.x,)
        given["the weights"] = (query.norm.projection.weight, key.projection.weight)
    if mode == 0:
        given["the weights"] += (query.up.weight,)
    accepted = FLOATS if context.config.target is None and mode == 0 else LOW_PRECISION
    if context.config.target is not None:
        accepted = (torch.bfloat16,)
    if dtype not in accepted:
        return Refused(
            "the operator does not take caches of this type", dtype_name(dtype), (key.caches.kv_out,)
        )
    for what, terms in given.items():
        for term in terms:
            if term.dtype != dtype:
                shown = f"{what}: {dtype_name(term.dtype)}, the cache {dtype_name(dtype)}"
                return Refused("the operator takes one type throughout", shown, (key.norm.term,))
    return None


def _own_scales(query: Query, key: Key, mode: int, context: Context) -> bool:
    """Is each product multiplied by the scale of what it is a product of?"""

    def token(projection: Projection) -> list[tuple[object, ...]]:
        assert projection.scales is not None
        return [entries(t, context) for t in projection.scales.per_token]

    assert query.quantized is not None
    ours = token(query.up)
    if len(ours) != 1 or ours[0] not in [entries(t, context) for t in query.quantized.scales]:
        return False
    return mode != 2 or (token(key.projection) == token(query.norm.projection) != [])


def _quant_mode(query: Query, key: Key) -> int | None:
    """``weight_quant_mode``, or None if the operator has none for the projections that are quantized."""
    down, up, latent = (p.scales is not None for p in (query.norm.projection, query.up, key.projection))
    return {(False, False, False): 0, (False, True, False): 1, (True, True, True): 2}.get((down, up, latent))


def _weights(query: Query, key: Key, context: Context) -> Refused | None:
    product = query.product
    stored = [p.weight for p in (query.norm.projection, query.up, key.projection)]
    for term in stored:
        root = layout(term, context.sizes)
        if root is None or not is_constant(root.root):
            return Refused("a weight is computed in the graph", f"{term}", (key.norm.term,))
    if context.config.target is None:
        return None
    loose = [t for t in stored if t.op != "input" or t.node is None or not row_major(t.node.meta["val"])]
    if loose or query.norm.projection.root is key.projection.root or weight_uk(product).op != "input":
        return Refused("the weights are not laid out as the operator takes them", PREPARE, (key.norm.term,))
    return None


def _match(query: Query, key: Key, tokens: Tokens, context: Context) -> Match | Refused:
    product, turn, where = query.product, query.turn, key.caches
    width = product.weight.shape[-2] + turn.x.shape[-1]
    rope = angles(turn, key.turn, tokens, where.kv.dtype, context)
    if isinstance(rope, Refused):
        return rope

    heads = Axis(1, width, _heads(product, width))
    turned = stored(turn.term, context)
    found_query = exits(product.term, product.at, tokens, context, heads)
    found_rope = exits(turned, _as_turned(turn), tokens, context, heads)
    if found_query is None or found_rope is None:
        return Refused(
            "the query's dimensions stand in an order that no transpose gives", "", (product.term,)
        )
    if turned.dtype != where.kv.dtype or stored(key.turn.term, context).dtype != where.kv.dtype:
        shown = f"{dtype_name(turned.dtype)}, the cache {dtype_name(where.kv.dtype)}"
        return Refused("the rotated query or key is kept in another type", shown, (turned,))
    mode = _quant_mode(query, key)
    assert mode is not None
    normed = _normed(query, mode, tokens, context)
    if normed is None:
        return Refused("the normed query is read in another order", "", (query.norm.term,))
    if normed and query.scale != 1.0:
        return Refused(
            "the normed query is read elsewhere, unscaled", f"by {query.scale}", (query.norm.term,)
        )
    operator = _operator(context)
    if operator != V3 and (normed or mode or query.scale != 1.0 or key.scale != 1.0):
        shown = f"query_norm, a scale or quantization; {operator} has none"
        return Refused(
            "the operator of the target has no argument for a part of this", shown, (product.term,)
        )
    shapes = _shapes(query, key, tokens, context)
    if isinstance(shapes, Refused):
        return shapes
    drift = _drift(query, key, rope)
    outputs: list[list[Term]] = []
    built: list[tuple[int, Exit]] = []
    for index, group in ((0, found_query), (1, found_rope), (3, normed)):
        for exit_ in group:
            outputs.append([exit_.term])
            built.append((index, exit_))
    scales = [] if query.quantized is None or not normed else [t for t in query.quantized.scales if t.nodes]

    def build(e: Emitter) -> list[fx.Node]:
        call = _call(e, operator, query, key, rope, bool(normed), mode)
        results = {i: e.item(call, i) for i in sorted({i for i, _ in built})}
        natural = [exit_.of(e, results[index]) for index, exit_ in built]
        kv, kr = (5, 6) if operator == V3 else (2, 3)
        more = [e.item(call, 4)] if scales else []
        return [*natural, e.item(call, kv), e.item(call, kr), *more]

    more = [scales] if scales else []
    return Match(
        _inputs(query, key, rope),
        [*outputs, [where.kv_out], [where.kr_out], *more],
        build,
        drift,
        shapes,
        operator=operator,
    )


V3 = "npu_mla_prolog_v3_functional"


def _operator(context: Context) -> str:
    return V3 if context.config.target is None else TARGETS[context.config.target].mla_prolog


def _as_turned(turn: Turn) -> Layout:
    """The layout of the rotated value: its columns are new, in the order of the operator's."""
    *lead, _ = turn.at.dims
    return Layout(turn.at.root, (*lead, (Axis(2, 1, turn.x.shape[-1]),)), (*turn.at.origin, 0))


def _normed(query: Query, mode: int, tokens: Tokens, context: Context) -> list[Exit] | None:
    """Readers of the normed query other than its up projection."""
    at: Layout | None
    if mode == 0:
        value, at = stored(query.norm.term, context), query.norm.at
    else:
        assert query.quantized is not None
        value = query.quantized.y
        at = viewed(query.norm.at, value.shape, context.sizes)
    found = None if at is None else exits(value, at, tokens, context, None)
    if found is None:
        return None
    ours = set(query.up.root.nodes)
    if query.up.scales is not None and query.up.scales.product is not None:
        ours |= set(query.up.scales.product.nodes)
    return [x for x in found if _read_elsewhere(x.term, ours, context)]


def _read_elsewhere(term: Term, ours: set[fx.Node], context: Context) -> bool:
    dead, of = context.rewriter.dead, context.view.of
    for node in term.nodes:
        for user in node.users:
            then = of.get(user)
            if user in dead or user in ours or then is term:
                continue
            if not (isinstance(then, Term) and then.op in ("view", "permute")):
                return True
    return False


def _inputs(query: Query, key: Key, rope: Angles) -> list[Term | None]:
    """Everything that the operator is given, and where the walk back from the outputs has to stop."""
    product = query.product
    given: list[Term | None] = [
        key.projection.x,
        query.norm.projection.weight,
        query.up.weight,
        key.projection.weight,
        product.weight,
        weight_uk(product),
        query.norm.found.gamma,
        key.norm.found.gamma,
        *rope.inputs,
        *key.caches.inputs,
        query.smooth,
    ]
    for projection in (query.norm.projection, query.up, key.projection):
        if projection.scales is not None:
            given.extend(t for t in projection.scales.numbers if isinstance(t, Term))
            given.extend(projection.scales.per_channel)
            if projection is not query.up:
                given.extend(projection.scales.per_token)
    return given


def weight_uk(product: HeadProduct) -> Term:
    """The innermost value that is [N, D, Hckv], without what einsum or matmul put around it."""
    best = term = product.weight
    at = unbroadcast(product.weight_at)
    want = tuple(coalesced(dim) for dim in at.dims)
    while term.op in ("view", "expand", "permute"):
        term = term.args[0]
        here = layout(term, product.sizes)
        if here is None or here.origin != at.origin or here.root is not at.root or not term.nodes:
            continue
        if tuple(coalesced(dim) for dim in here.dims) == want:
            best = term
    return best


def _call(
    e: Emitter, operator: str, query: Query, key: Key, rope: Angles, normed: bool, mode: int
) -> fx.Node:
    x, where, norm = key.projection.x, key.caches, query.norm
    cos, sin = rope.nodes(e)
    kv_cache, kr_cache = where.paged(e)
    slots = where.slots(e)
    w_uk = weight_uk(query.product)
    merged = norm.projection.root is key.projection.root
    tensors = [
        e.term(x),
        _columns_of(e, norm.projection.weight, norm.at, merged),
        e.term(query.up.weight),
        e.view(e.term(w_uk), (w_uk.shape[-3], *w_uk.shape[-2:])),
        _columns_of(e, key.projection.weight, key.norm.at, merged, to_end=True),
        vector(e, norm.found.gamma),
        vector(e, key.norm.found.gamma),
        sin,
        cos,
    ]
    options: dict[str, Any] = {
        "rmsnorm_epsilon_cq": norm.found.epsilon,
        "rmsnorm_epsilon_ckv": key.norm.found.epsilon,
        "cache_mode": where.mode,
    }
    if operator != V3:
        return e.call(getattr(npu, operator).default, *tensors, slots, kv_cache, kr_cache, **options)
    options |= {"cache_index": slots}
    if normed:
        options["query_norm_flag"] = True
    if mode:
        options |= {"weight_quant_mode": mode, **_scales(e, query, key, mode)}
    for name, value in (("qc_qr_scale", query.scale), ("kc_scale", key.scale)):
        if value != 1.0:
            options[name] = value
    return e.call(npu.npu_mla_prolog_v3_functional.default, *tensors, kv_cache, kr_cache, **options)


def _columns_of(e: Emitter, weight: Term, at: Layout, merged: bool, to_end: bool = False) -> fx.Node:
    node = e.term(weight)
    if not merged:
        return node
    first = at.origin[1]
    end = weight.shape[-1] if to_end else first + _width(at)
    return e.call(aten.slice.Tensor, node, 1, *e.sizes((first, end)))


def _scales(e: Emitter, query: Query, key: Key, mode: int) -> dict[str, fx.Node]:
    def row(projection: Projection) -> fx.Node:
        assert projection.scales is not None
        product = projection.scales.product
        assert product is not None
        width = projection.root.shape[-1]
        node = weight_scale(e, projection.scales, e.term(projection.weight), width)
        return e.view(node, (1, width))

    found = {"dequant_scale_w_uq_qr": row(query.up)}
    if query.smooth is not None:
        found["smooth_scales_cq"] = e.view(e.term(query.smooth, torch.float32), (1, query.smooth.shape[-1]))
    if mode == 2:
        assert key.projection.scales is not None
        token = token_scale(e, key.projection.scales.per_token)
        found["dequant_scale_x"] = e.call(aten.reshape.default, token, [-1, 1])
        found["dequant_scale_w_dq"] = row(query.norm.projection)
        found["dequant_scale_w_dkv_kr"] = row(key.projection)
    return found


def _drift(query: Query, key: Key, rope: Angles) -> list[Drift]:
    drift = [Drift(Numerics.ACCURATE, "norms and rotations are rounded once")]
    drift += [*query.norm.found.drift, *key.norm.found.drift, *query.turn.drift, *key.turn.drift, *rope.drift]
    drift += [d for p in (query.norm.projection, query.up, key.projection) for d in p.drift]
    if query.quantized is not None:
        drift += query.quantized.drift
    if query.scale != 1.0:
        drift.append(Drift(Numerics.ACCURATE, "the query is scaled before its up projection, in the norm"))
    if key.scale != 1.0:
        drift.append(Drift(Numerics.ACCURATE, "the latent is scaled before it is rounded"))
    return drift


def _shapes(query: Query, key: Key, tokens: Tokens, context: Context) -> list[Constraint] | Refused:
    """The hardware envelope of the target."""
    if context.config.target is None:
        return []
    target, sizes = TARGETS[context.config.target], context.sizes
    product = query.product
    plain, latent = product.weight.shape[-2:]
    heads = _heads(product, plain + query.turn.x.shape[-1])
    envelope: Sequence[tuple[str, Size | None, tuple[int, ...]]] = (
        ("He", key.projection.x.shape[-1], target.mla_hidden),
        ("Hcq", _width(query.norm.at), target.mla_query_rank),
        ("N", heads, target.mla_heads),
        ("D", plain, target.mla_nope),
        ("Dr", query.turn.x.shape[-1], (64,)),
        ("Hckv", latent, (512,)),
        ("BlockSize", key.caches.pages[1], target.mla_block),
    )
    for name, size, accepted in envelope:
        if size not in accepted:
            shown = f"{name} is {size}; accepted: {', '.join(map(str, accepted))}"
            return Refused(
                "a size is outside of what the operator takes on the target", shown, (product.term,)
            )
    constraints = []
    if target.mla_max_length is not None and len(tokens.shape) == 2:
        length, most = tokens.shape[1], target.mla_max_length
        relation = None if isinstance(length, int) else sympy.Le(length, most)
        reason = "the operator takes fewer tokens per sequence on the target"
        shown = f"S is {length}, at most {most}"
        constraints.append(Constraint(sizes.at_most(length, most), reason, shown, relation))
    return constraints
