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

from typing import Any, ClassVar

import torch
from torch import fx

from npu_fusion.config import Numerics
from npu_fusion.passes.axes import Axis, Layout, viewed
from npu_fusion.passes.canonicalize.cache_writes import rows_of
from npu_fusion.passes.compose._mla_cache import later_reader
from npu_fusion.passes.compose._mla_conditions import columns, envelope, quant_mode, types, weights
from npu_fusion.passes.compose._mla_exits import Exit, Tokens, exits
from npu_fusion.passes.compose._mla_key import Key, key_side, keyed, unscaled
from npu_fusion.passes.compose._mla_pairs import other_rotation
from npu_fusion.passes.compose._mla_query import Query, heads_of, query_side, weight_uk, width_of
from npu_fusion.passes.compose._mla_rope import Angles, angles
from npu_fusion.passes.compose._mla_sites import (
    Norm,
    Projection,
    Sites,
    Turn,
    bare,
    sites,
)
from npu_fusion.passes.lift.dequant import token_scale, weight_scale
from npu_fusion.passes.lift.rms_norm import vector
from npu_fusion.passes.pattern import Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import Drift, Term
from npu_fusion.passes.walk import dtype_name, stored
from npu_fusion.targets import choose, resolve

aten = torch.ops.aten
npu = torch.ops.npu

V3 = "npu_mla_prolog_v3_functional"


def _pairs(context: Context) -> bool:
    return context.config.cache_layout == "npu"


def _is_latent(norm: Norm, found: Sites) -> bool:
    """Is the norm of the first columns of a wider product, stored or beside a norm of the rest?"""
    heads = any(a.dim == 1 for dim in norm.at.dims[:-1] for a in dim)
    total, end = norm.projection.root.shape[-1], width_of(norm.at)
    part = total != end and norm.at.origin[1] == 0 and not heads
    beside = any(
        n.projection.root is norm.projection.root and (n.at.origin[1], width_of(n.at)) == (end, total - end)
        for n in found.norms
    )
    return part and (beside or bool(found.whole_writes(norm.term)))


class MlaProlog(Fusion):
    name = "mla_prolog"
    operator = V3
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
                reason = "the columns beside the latent are not rotated, or not as they are"
                return Refused(reason, "", (norm.term,))
        return None


def _latents(term: Term, found: Sites, context: Context) -> list[Norm]:
    """The norms that belong to an anchor: its own, or (once) the one whose result it writes."""
    key = (MlaProlog, "tried")
    tried = context.memo.setdefault(key, set())
    inner = term.args[0] if term.op == "cast" else term
    if term.op in ("write", "filled"):
        inner = unscaled(bare(rows_of(term)))[0]
    fresh = [n for n in found.norms if n.term is inner and n not in tried]
    tried.update(fresh)
    return fresh


def _prolog(norm: Norm, turn: Turn, found: Sites, context: Context) -> Match | Refused:
    query = query_side(norm, found, context)
    if isinstance(query, Refused):
        return query
    x = norm.projection.x
    if len(x.shape) not in (2, 3):
        return Refused("the hidden states are neither [B, S, He] nor [T, He]", f"{list(x.shape)}", (x,))
    tokens = Tokens(x.shape[:-1])
    key = key_side(norm, turn, tokens, found, context)
    if isinstance(key, Refused):
        return key
    tokens = key.caches.tokens
    return (
        columns(query, key, tokens, context)
        or other_rotation(query.turn, pairs=_pairs(context))
        or other_rotation(key.turn, pairs=_pairs(context))
        or types(query, key, context)
        or weights(query, key, context)
        or later_reader(key.caches, context, overwritten=_operator(context) != V3)
        or _match(query, key, tokens, context)
    )


def _match(query: Query, key: Key, tokens: Tokens, context: Context) -> Match | Refused:
    product, turn, where = query.product, query.turn, key.caches
    width = product.weight.shape[-2] + turn.x.shape[-1]
    rope = angles(turn, key.turn, tokens, where.kv.dtype, context)
    if isinstance(rope, Refused):
        return rope

    heads = Axis(1, width, heads_of(product, width))
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
    mode = quant_mode(query, key)
    assert mode is not None
    normed = _normed(query, mode, tokens, context)
    if normed is None:
        return Refused("the normed query is read in another order", "", (query.norm.term,))
    if normed and query.scale != 1.0:
        return Refused(
            "the normed query is read elsewhere, unscaled", f"by {query.scale}", (query.norm.term,)
        )
    operator = _operator(context)
    if operator != V3 and (normed or query.scale != 1.0 or key.scale != 1.0):
        shown = f"query_norm or a scale; {operator} has none"
        return Refused(
            "the operator of the target has no argument for a part of this", shown, (product.term,)
        )
    shapes = envelope(operator, mode, query, key, tokens, context)
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


def _operator(context: Context) -> str:
    """The latest version that the target has."""
    return choose(resolve(context.config), V3, "npu_mla_prolog_v2", "npu_mla_prolog")


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
    ours = set(query.up.root.nodes)
    if query.up.scales is not None and query.up.scales.product is not None:
        ours |= set(query.up.scales.product.nodes)
    return None if at is None else exits(value, at, tokens, context, None, ignoring=ours)


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
        e.view(e.term(x), (*where.tokens.shape, x.shape[-1])),
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
    if mode:
        options |= _scales(e, query, key, mode)
    if operator != V3:  # which goes by the types of what it is given
        return e.call(getattr(npu, operator).default, *tensors, slots, kv_cache, kr_cache, **options)
    options |= {"cache_index": slots}
    if normed:
        options["query_norm_flag"] = True
    if mode:
        options["weight_quant_mode"] = mode
    for name, value in (("qc_qr_scale", query.scale), ("kc_scale", key.scale)):
        if value != 1.0:
            options[name] = value
    return e.call(npu.npu_mla_prolog_v3_functional.default, *tensors, kv_cache, kr_cache, **options)


def _columns_of(e: Emitter, weight: Term, at: Layout, merged: bool, to_end: bool = False) -> fx.Node:
    node = e.term(weight)
    if not merged:
        return node
    first = at.origin[1]
    end = weight.shape[-1] if to_end else first + width_of(at)
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
