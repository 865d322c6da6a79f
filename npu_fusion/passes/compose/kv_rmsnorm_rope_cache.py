"""The keys of multi-head latent attention: latent normalized, key rotated, both written to their caches.

::

    %c = rms_norm(%kv[.., :Dv], %g)               %k_embed, %y, %kr_cache, %kv_cache =
    %k = rotate(%kv[.., Dv:])               ->        npu_kv_rmsnorm_rope_cache_v2_functional(
    write(%kv_cache, %c, slots)                           view(%kv, [B, 1, S, Dv+Dr]), %g, cos, sin, slots,
    write(%kr_cache, %k, slots)                           %kr_cache, %kv_cache, cache_mode=..)

For models whose query keeps :mod:`.mla_prolog` from taking everything: no low-rank query (DeepSeek-V2-Lite),
keys and values that are expanded, other angles for the query, a bias. %kv is what a projection gives or a
range of its columns, whatever else is in the product. The spellings are those of :mod:`.mla_prolog`.

``cache_mode``: "PA", an index for every row, in any cache that can be seen as pages; "Norm", an index within
its own sequence, where the cache is [B, 1, L, C] with one sequence for each of the tokens'. Where the new
rows are read elsewhere too (``is_output_kv``), the operator returns them: not in "Norm", so those caches are
then seen as pages.

Conditions: adjacent pairs are rotated and stored as halves, by the model too (who reads the cache is not
rewritten); the stored norm weight, cache and kv have one dtype; nothing is scaled; (target) Dv is 512, Dr 64,
16 bits. A call of the operator is left as it is. Trap: the cache of the rotated key comes first.

A target before torch_npu 7.2 has npu_kv_rmsnorm_rope_cache only: it gives the caches before the rows, and
writes into the caches that it is given, so nothing else may read these.

Always ``accurate``: norm and rotation are rounded once. ``relaxed`` where cosine and sine are rounded.

Source: torch_npu documentation of npu_kv_rmsnorm_rope_cache; the spellings are those of real models.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import ClassVar

import torch
from torch import fx

from npu_fusion.config import Numerics
from npu_fusion.passes.axes import coalesced, layout, whole
from npu_fusion.passes.checks import Truth
from npu_fusion.passes.compose._mla_cache import Caches, later_reader
from npu_fusion.passes.compose._mla_exits import Exit, Tokens, exits
from npu_fusion.passes.compose._mla_key import Key, key_side, keyed
from npu_fusion.passes.compose._mla_pairs import other_rotation
from npu_fusion.passes.compose._mla_rope import Angles, angles
from npu_fusion.passes.compose._mla_sites import Norm, bare, sites
from npu_fusion.passes.lift.rms_norm import FLOATS, vector
from npu_fusion.passes.pattern import Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Drift, Size, Term
from npu_fusion.passes.walk import buildable, dtype_name, stored
from npu_fusion.targets import choose, resolve

aten = torch.ops.aten

NAME = "npu_kv_rmsnorm_rope_cache"
FUNCTIONAL = f"{NAME}_v2_functional"
LATENT, ROTATED = 512, 64
"""The one Dv and Dr that devices take."""


class KvRmsnormRopeCache(Fusion):
    name = "kv_rmsnorm_rope_cache"
    operator = FUNCTIONAL
    anchors: ClassVar = ("mul", "div", "rms_norm")
    priority = 9
    stage = "compose"

    def match(self, term: Term, context: Context) -> Match | Refused | None:
        inner = term.args[0] if term.op == "cast" else term
        norm = _norms(context).get(inner)
        turn = None if norm is None else keyed(norm, sites(context), context)
        if norm is None or turn is None:
            return None
        lead = norm.projection.x.shape[:-1]
        if len(lead) not in (1, 2):
            return Refused("the hidden states are neither [B, S, He] nor [T, He]", f"{[*lead]}", (term,))
        key = key_side(norm, turn, Tokens(lead), sites(context), context)
        if isinstance(key, Refused):
            return key
        if _is_called(key.caches.kv_out):
            return None
        return (
            other_rotation(key.turn)
            or _parts(key, context)
            or _sizes(key, context)
            or later_reader(key.caches, context, overwritten=_operator(context) != FUNCTIONAL)
            or _match(key, context)
        )


def _operator(context: Context) -> str:
    """The latest version that the target has."""
    return choose(resolve(context.config), FUNCTIONAL, NAME)


def _norms(context: Context) -> dict[Term, Norm]:
    key = (_norms,)
    if key not in context.memo:
        context.memo[key] = {norm.term: norm for norm in sites(context).norms}
    return context.memo[key]


def _is_called(write: Term) -> bool:
    """Does the model call the operator itself (in place: wrapped by functionalization)?"""
    node = write.node
    if node is None or node.target is not operator.getitem:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    called = source.args[0] if isinstance(source.target, torch._ops.HigherOrderOperator) else source.target
    return getattr(called, "_opname", "").startswith(NAME)


def _parts(key: Key, context: Context) -> Refused | None:
    """That each part is what the operator takes, of one dtype."""
    norm, turn, where = key.norm, key.turn, key.caches
    if bare(norm.found.gamma).op == "add":
        return Refused("the weight of a norm has an offset (1 + w)", "", (norm.term,))
    for what, factor, term in (("latent", key.scale, norm.term), ("key", turn.factor, turn.term)):
        if factor != 1.0:
            return Refused("the latent or the rotated key is scaled", f"{what} by {factor}", (term,))
    dtype = where.kv.dtype
    accepted = FLOATS if context.config.target is None else LOW_PRECISION
    if dtype not in accepted:
        return Refused("the operator does not take caches of this type", dtype_name(dtype), (where.kv_out,))
    others = (
        norm.projection.root,
        norm.found.gamma,
        where.kr,
        stored(norm.term, context),
        stored(turn.term, context),
    )
    for other in others:
        if other.dtype != dtype:
            shown = f"{dtype_name(other.dtype)}, the cache {dtype_name(dtype)}"
            return Refused("the operator takes one type throughout", shown, (norm.term,))
    if not buildable(norm.found.gamma):
        return Refused("no node holds what is normalized, or its weight", "", (norm.term,))
    return None


def _sizes(key: Key, context: Context) -> Refused | None:
    latent, rotated = key.norm.found.x.shape[-1], key.turn.x.shape[-1]
    if context.config.target is not None and (latent, rotated) != (LATENT, ROTATED):
        shown = f"Dv is {latent}, Dr {rotated}; accepted: {LATENT} and {ROTATED}"
        return Refused("a size is outside of what the operator takes on the target", shown, (key.norm.term,))
    return None


def _source(key: Key, context: Context) -> tuple[Term, Size] | None:
    """The last value that has both latent and key in its rows, one row per token, and where they begin."""
    both = _made_of(key.turn.x)
    for term in _made_of(key.norm.found.x):
        if term not in both or not term.nodes:
            continue
        at = layout(term, context.sizes, known={key.norm.projection.root: whole(key.norm.projection.root)})
        if at is None:
            continue
        *rows, last = at.dims
        in_order = len(coalesced(axis for dim in rows for axis in dim)) <= 1
        if in_order and len(last) == 1 and (last[0].dim, last[0].step) == (1, 1):
            return term, key.norm.at.origin[1] - at.origin[1]
    return None


def _made_of(term: Term) -> list[Term]:
    """A value and what it is a part or another shape of, innermost last."""
    found = [term]
    while found[-1].op in ("view", "permute", "slice", "half", "cast"):
        found.append(found[-1].args[0])
    return found


def _match(key: Key, context: Context) -> Match | Refused:
    where, tokens = key.caches, key.caches.tokens
    rope = angles(key.turn, key.turn, tokens, where.kv.dtype, context)
    if isinstance(rope, Refused):
        return rope
    source = _source(key, context)
    if source is None:
        return Refused("no node holds latent and key before norm and rotation", "", (key.norm.term,))
    drift = [Drift(Numerics.ACCURATE, "norm and rotation are rounded once")]
    drift += [*key.norm.found.drift, *key.turn.drift, *rope.drift]
    inputs = [source[0], key.norm.found.gamma, *rope.inputs, *where.inputs]
    caches = [[where.kr_out], [where.kv_out]]
    operator = _operator(context)
    updated, new_rows = ((2, 3), (0, 1)) if operator == FUNCTIONAL else ((0, 1), (2, 3))

    def stores(e: Emitter) -> list[fx.Node]:
        call = _call(e, operator, source, key, rope, context)
        return [e.item(call, i) for i in updated]

    match = Match(inputs, caches, stores, drift, operator=operator)
    rows = [
        (key.turn.term, key.turn.at, key.turn.x.shape[-1]),
        (key.norm.term, key.norm.at, key.norm.found.x.shape[-1]),
    ]
    found: list[tuple[int, Size, Exit]] = []
    for index, (term, at, width) in zip(new_rows, rows, strict=True):
        read = exits(stored(term, context), at, tokens, context, None)
        if read is None:
            return match
        found += [(index, width, exit_) for exit_ in read]

    def returns(e: Emitter) -> list[fx.Node]:
        call = _call(e, operator, source, key, rope, context, is_output_kv=True)
        natural = [
            exit_.of(e, e.view(e.item(call, index), (*tokens.shape, width))) for index, width, exit_ in found
        ]
        return [*(e.item(call, i) for i in updated), *natural]

    outputs = [*caches, *([exit_.term] for _, _, exit_ in found)]
    match.otherwise = Match(inputs, outputs, returns, drift, operator=operator)
    return match


def _call(
    e: Emitter,
    operator: str,
    source: tuple[Term, Size],
    key: Key,
    rope: Angles,
    context: Context,
    is_output_kv: bool = False,
) -> fx.Node:
    where = key.caches
    tokens = where.tokens.shape
    batch, length = tokens if len(tokens) == 2 else (tokens[0], 1)
    lead = (batch, 1, length)
    kv = _columns(e, *source, key)
    cos, sin = (e.view(node, (*lead, key.turn.x.shape[-1])) for node in rope.nodes(e))
    if not is_output_kv and _by_sequence(where, context):
        mode, caches, index = "Norm", (e.term(where.kv), e.term(where.kr)), _positions(e, where)
    else:
        mode, caches = "PA", where.paged(e)
        index = e.view(where.slots(e), (where.tokens.total,))
    kv_cache, kr_cache = caches
    return e.call(
        getattr(torch.ops.npu, operator).default,
        e.view(kv, (*lead, kv.meta["val"].shape[-1])),
        vector(e, key.norm.found.gamma),
        cos,
        sin,
        index,
        kr_cache,
        kv_cache,
        epsilon=key.norm.found.epsilon,
        cache_mode=mode,
        is_output_kv=is_output_kv,
    )


def _columns(e: Emitter, source: Term, first: Size, key: Key) -> fx.Node:
    """The columns of latent and key side by side."""
    width = key.norm.found.x.shape[-1] + key.turn.x.shape[-1]
    node, last = e.term(source), len(source.shape) - 1
    if width == source.shape[last]:
        return node
    return e.call(aten.slice.Tensor, node, last, *e.sizes((first, first + width)))


def _by_sequence(where: Caches, context: Context) -> bool:
    """Is the cache [B, 1, L, C], with a sequence for each of the tokens'?"""
    same = context.sizes.equal
    return where.dim == 2 and same(where.kv.shape[0], where.tokens.shape[0]) is Truth.YES


def _positions(e: Emitter, where: Caches) -> fx.Node:
    """[B, S], the row within each sequence."""
    batch, length = where.tokens.shape
    slots = replace(where, tokens=Tokens((1, length))).slots(e)
    return e.call(aten.expand.default, slots, e.sizes((batch, length)))
