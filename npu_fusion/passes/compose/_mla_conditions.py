"""What npu_mla_prolog requires of the parts of latent attention: columns, types, weights, sizes."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from npu_fusion.passes.axes import Axis, coalesced, layout
from npu_fusion.passes.checks import row_major
from npu_fusion.passes.compose._mla_exits import Tokens
from npu_fusion.passes.compose._mla_key import Key, all_tokens
from npu_fusion.passes.compose._mla_query import Query, heads_of, is_weight_uk, weight_uk, width_of
from npu_fusion.passes.compose._mla_sites import (
    Projection,
    bare,
    entries,
    is_constant,
)
from npu_fusion.passes.lift.rms_norm import FLOATS
from npu_fusion.passes.pattern import Constraint, Context, Refused
from npu_fusion.passes.terms import LOW_PRECISION, Size
from npu_fusion.passes.walk import dtype_name
from npu_fusion.targets import resolve

PREPARE = "npu_fusion.prepare(model) lays them out once"


def columns(query: Query, key: Key, tokens: Tokens, context: Context) -> Refused | None:
    """That the parts are the columns that the operator takes."""
    for projection in (query.norm.projection, query.up, key.projection):
        if projection.biased:
            return Refused("a projection has a bias", "", (projection.root,))
    for norm in (query.norm, key.norm):
        if norm.found.gamma.op == "add" or bare(norm.found.gamma).op == "add":
            return Refused("the weight of a norm has an offset (1 + w)", "", (norm.term,))
    total, latent, turned = key.projection.root.shape[-1], width_of(key.norm.at), key.turn.x.shape[-1]
    merged = query.norm.projection.root is key.projection.root
    first = key.norm.at.origin[1]
    if (not merged and (first != 0 or latent + turned != total)) or (first + latent + turned != total):
        shown = f"{latent} and {turned} of {total} columns"
        reason = "the rotation covers only a part of the columns beside the latent"
        return Refused(reason, shown, (key.turn.term,))
    rank, before = width_of(query.norm.at), query.norm.at.origin[1]
    want = first if merged else query.norm.projection.root.shape[-1]
    if before != 0 or rank != want:
        return Refused("the norm of the query covers only a part of the columns", "", (query.norm.term,))
    normed = [a for a in query.norm.at.flat() if a.dim == 0]
    if query.norm.at.origin[0] != 0 or not all_tokens(normed, tokens, context):
        return Refused("the query is not of all tokens in their order", "", (query.norm.term,))
    product, turn = query.product, query.turn
    nope, rope = product.operand.origin[1], turn.at.origin[1]
    plain, turning = product.weight.shape[-2], turn.x.shape[-1]
    heads = heads_of(product, plain + turning)
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
    if not isinstance(heads, int) or not is_weight_uk(product, heads):
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


def types(query: Query, key: Key, context: Context) -> Refused | None:
    dtype = key.caches.kv.dtype
    mode = quant_mode(query, key)
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


def quant_mode(query: Query, key: Key) -> int | None:
    """``weight_quant_mode``, or None if the operator has none for the projections that are quantized."""
    down, up, latent = (p.scales is not None for p in (query.norm.projection, query.up, key.projection))
    return {(False, False, False): 0, (False, True, False): 1, (True, True, True): 2}.get((down, up, latent))


def weights(query: Query, key: Key, context: Context) -> Refused | None:
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


def envelope(
    operator: str, mode: int, query: Query, key: Key, tokens: Tokens, context: Context
) -> list[Constraint] | Refused:
    """The hardware envelope of this version of the operator on the target; ``mode``: of the weights."""
    target, sizes = resolve(context.config), context.sizes
    if target is None:
        return []
    limits = target.mla(operator)
    if mode not in limits.weight_modes:
        shown = f"{operator} in torch_npu {target.release}: weight_quant_mode {mode}"
        return Refused(
            "the operator does not take weights quantized so on the target", shown, (query.product.term,)
        )
    product = query.product
    plain, latent = product.weight.shape[-2:]
    heads = heads_of(product, plain + query.turn.x.shape[-1])
    envelope: Sequence[tuple[str, Size | None, tuple[int, ...]]] = (
        ("He", key.projection.x.shape[-1], limits.hidden),
        ("Hcq", width_of(query.norm.at), limits.query_rank),
        ("N", heads, limits.heads),
        ("D", plain, limits.nope),
        ("Dr", query.turn.x.shape[-1], (64,)),
        ("Hckv", latent, (512,)),
        ("BlockSize", key.caches.pages[1], limits.block),
    )
    for name, size, accepted in envelope:
        if size not in accepted:
            shown = f"{name} is {size}; accepted: {', '.join(map(str, accepted))}"
            return Refused(
                "a size is outside of what the operator takes on the target", shown, (product.term,)
            )
    constraints = []
    if limits.max_length is not None and len(tokens.shape) == 2:
        length, most = tokens.shape[1], limits.max_length
        relation = None if isinstance(length, int) else sympy.Le(length, most)
        reason = "the operator takes fewer tokens per sequence on the target"
        shown = f"S is {length}, at most {most}"
        constraints.append(Constraint(sizes.at_most(length, most), reason, shown, relation))
    return constraints
