"""The query side of multi-head latent attention: low rank, norm, up projection, W_UK and the rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from npu_fusion.passes.axes import BROADCAST, Layout, coalesced, layout
from npu_fusion.passes.compose._mla_sites import (
    HeadProduct,
    Norm,
    Projection,
    Sites,
    Turn,
    bare,
    quantized_norm,
    same_rows,
    unbroadcast,
)
from npu_fusion.passes.lift.dynamic_quant import Quantized, channel
from npu_fusion.passes.pattern import Context, Refused
from npu_fusion.passes.terms import Size, Term


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


def query_side(latent: Norm, found: Sites, context: Context) -> Query | Refused:
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


def width_of(at: Layout) -> Size:
    return at.dims[-1][0].size if at.dims[-1] else 1


def heads_of(product: HeadProduct, width: Size) -> Size | None:
    columns = [a for a in product.operand.flat() if a.dim == 1]
    if len(columns) == 1:
        return 1
    if len(columns) != 2 or columns[0].step != width:
        return None
    return columns[0].size


def is_weight_uk(product: HeadProduct, heads: int) -> bool:
    """Are the batches of both operands the heads (and sequences, for which the weight is repeated)?"""
    ours, theirs = coalesced(product.operand.dims[0]), coalesced(product.weight_at.dims[0])
    aligned = len(ours) == len(theirs) and all(
        a.size == w.size and (a.dim == 0) == (w.dim == BROADCAST) for a, w in zip(ours, theirs, strict=True)
    )
    counted = [a.size for a in ours if a.dim == 1]
    w_uk = weight_uk(product)
    return aligned and counted == ([heads] if heads > 1 else []) and w_uk.shape[0] == heads


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
