"""The parts of multi-head latent attention in a graph: projections, norms, rotations, head products.

Everything is found once per graph and keyed by the product (``mm``, or a dequantized int32 product) whose
columns it reads. :mod:`.mla_prolog` puts the parts together.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from npu_fusion.passes.axes import BROADCAST, Axis, Layout, layout
from npu_fusion.passes.canonicalize.cache_writes import rows_of
from npu_fusion.passes.canonicalize.views import reshaped
from npu_fusion.passes.checks import Sizes
from npu_fusion.passes.lift.dequant import Dequantized, dequantized
from npu_fusion.passes.lift.dynamic_quant import Quantized, quantization
from npu_fusion.passes.lift.rms_norm import FLOATS, Normalized, normalized
from npu_fusion.passes.lift.rotary_mul import Rotation, rotation
from npu_fusion.passes.pattern import Context
from npu_fusion.passes.terms import Drift, Term
from npu_fusion.passes.walk import Walk

aten = torch.ops.aten

LAST = 2
"""The dimension that the columns of a head product count as, beside the two of the root."""

_ROPE, _ROTARY = "npu.npu_interleave_rope.default", "npu.npu_rotary_mul.default"


@dataclass(frozen=True, eq=False)
class Projection:
    """A product of the tokens with a weight."""

    root: Term
    """Its value [T, columns], which layouts refer to."""
    x: Term
    """Left operand as [.., K], views of rows undone."""
    weight: Term
    """[K, columns]"""
    scales: Dequantized | None = None
    biased: bool = False
    drift: tuple[Drift, ...] = ()


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMSNorm of columns of a projection."""

    term: Term
    """The float32 result."""
    found: Normalized
    at: Layout
    projection: Projection


@dataclass(frozen=True, eq=False)
class Turn:
    """A rotation of columns of a projection. ``mode`` as in :class:`Rotation`; "complex": ``cos`` is."""

    term: Term
    x: Term
    cos: Term
    sin: Term | None
    mode: str
    twice: bool
    at: Layout
    factor: float
    projection: Projection
    drift: tuple[Drift, ...]
    sorted: bool
    """The columns are sorted into even and odd ones before the halves are rotated."""


@dataclass(frozen=True, eq=False)
class HeadProduct:
    """A batched product of columns of a projection with a weight per head."""

    term: Term
    at: Layout
    """Of the result: dimension ``LAST`` of the root is that of the weight."""
    operand: Layout
    factor: float
    weight: Term
    weight_at: Layout
    projection: Projection
    sizes: Sizes


@dataclass
class Sites:
    norms: list[Norm] = field(default_factory=list)
    turns: dict[Term, list[Turn]] = field(default_factory=lambda: defaultdict(list))
    products: dict[Term, list[HeadProduct]] = field(default_factory=lambda: defaultdict(list))
    writes: dict[Term, list[Term]] = field(default_factory=lambda: defaultdict(list))
    """By what is written, all casts and views undone."""

    def whole_writes(self, rows: Term) -> list[Term]:
        """The writes of ``rows``, without those to a part of a cache that is itself written back."""
        found = self.writes.get(rows, [])
        caches = [w.args[0] for w in found]
        parts = [c for c in caches if c.op in ("slice", "half") and c.args[0] in caches]
        return [w for w in found if w.args[0] not in parts]


def sites(context: Context) -> Sites:
    key = (sites,)
    if key not in context.memo:
        context.memo[key] = _sites(context)
    return context.memo[key]


def _sites(context: Context) -> Sites:
    found = Sites()
    terms = context.view.by_operator()
    if not any(op in terms for op in ("bmm", "write", "filled")):
        return found
    for op in ("mul", "div", "rms_norm"):
        for term in terms.get(op, ()):
            norm = _norm(term, context)
            if norm is not None:
                found.norms.append(norm)
    for op in ("add", "cat", "turned_pairs", _ROPE, _ROTARY):
        for term in terms.get(op, ()):
            turn = _turn(term, context)
            if turn is not None:
                found.turns[turn.projection.root].append(turn)
    for term in terms.get("bmm", ()):
        product = _head_product(term, context)
        if product is not None:
            found.products[product.projection.root].append(product)
    for op in ("write", "filled"):
        for term in terms.get(op, ()):
            if term.nodes:
                found.writes[bare(rows_of(term))].append(term)
    return found


def bare(term: Term) -> Term:
    """What computes the value: views, broadcasts and roundings undone."""
    while term.op in ("view", "permute", "expand") or _rounds(term):
        term = term.args[0]
    return term


def same_rows(term: Term, context: Context) -> Term:
    """What computes the value, seen through what leaves the rows and their order alone."""
    walk = Walk(context.sizes)
    while True:
        inner = walk.rows(term)
        inner = inner.args[0] if _rounds(inner) else inner
        if inner is term:
            return term
        term = inner


def _rounds(term: Term) -> bool:
    return term.op == "cast" and term.dtype in FLOATS and term.args[0].dtype in FLOATS


def _norm(term: Term, context: Context) -> Norm | None:
    found = normalized(term, context)
    if not isinstance(found, Normalized):
        return None
    at = layout(reshaped(context.view, found.x, term.shape), context.sizes)
    projection = None if at is None else projected(at.root, context)
    if at is None or projection is None:
        return None
    return Norm(term, found, at, projection)


def projected(root: Term, context: Context) -> Projection | None:
    """The projection whose value is ``root``."""
    key = (projected, root)
    if key not in context.memo:
        context.memo[key] = _projected(root, context)
    return context.memo[key]


def _projected(root: Term, context: Context) -> Projection | None:
    walk = Walk(context.sizes)
    if root.op == "mm":
        return Projection(root, walk.rows(root.args[0]), root.args[1])
    bias = _biased(root, context)
    if bias is not None:
        return bias
    if root.dtype not in FLOATS or root.op not in ("mul", "cast"):
        return None
    wide = context.view.cast(root, torch.float32)
    found = dequantized(wide, walk, context)
    if not isinstance(found, Dequantized) or found.product is None or found.product.op != "int_mm":
        return None
    x, weight = found.product.args
    drift = tuple(walk.drift)
    return Projection(root, Walk(context.sizes).rows(x), weight, found, found.bias is not None, drift)


def _biased(root: Term, context: Context) -> Projection | None:
    """A floating product with something added per column."""
    if root.op == "input" and root.args[0].target is aten.addmm.default:
        _, x, weight = (context.view.term(a) for a in root.args[0].args[:3])
        return Projection(root, Walk(context.sizes).rows(x), weight, biased=True)
    total = root.args[0] if _rounds(root) else root
    if total.op == "add" and isinstance(total.args[1], Term):
        for part in total.args:
            product = bare(part)
            if product.op == "mm":
                x = Walk(context.sizes).rows(product.args[0])
                return Projection(root, x, product.args[1], biased=True)
    return None


class _Scaled:
    """Steps through roundings and factors of one number, which it multiplies."""

    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, term: Term) -> Term | None:
        if _rounds(term):
            inner = term.args[0]
            return inner if inner.op == "mul" and _is_number(inner.args[1]) else None
        if term.op == "mul" and _is_number(term.args[1]):
            self.factor *= term.args[1]
            return term.args[0]
        if term.op == "div" and _is_number(term.args[1]) and isinstance(term.args[0], Term):
            self.factor /= term.args[1]
            return term.args[0]
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value != 0


def _turn(term: Term, context: Context) -> Turn | None:
    parts = _parts(term, context)
    if parts is None:
        return None
    x, cos, sin, mode, twice, drift = parts
    scaled = _Scaled()
    at = layout(x, context.sizes, through=scaled)
    projection = None if at is None else projected(at.root, context)
    if at is None or projection is None:
        return None
    if mode == "complex":
        term = reshaped(context.view, term, x.shape)
    sorted_first = mode == "half" and _sorted_columns(at)
    mode = "deinterleave" if sorted_first else mode
    return Turn(term, x, cos, sin, mode, twice, at, scaled.factor, projection, drift, sorted_first)


def _parts(
    term: Term, context: Context
) -> tuple[Term, Term, Term | None, str, bool, tuple[Drift, ...]] | None:
    if term.op == _ROPE:
        x, cos, sin = term.args
        return x, cos, sin, "deinterleave", False, ()
    if term.op == _ROTARY:
        x, cos, sin, mode, rotate = term.args
        return (x, cos, sin, mode, False, ()) if rotate is None else None
    if term.op == "turned_pairs":
        pairs, turn = term.args
        x = reshaped(context.view, pairs, (*pairs.shape[:-2], 2 * pairs.shape[-2]))
        return x, turn, None, "complex", True, ()
    found = rotation(term, context)
    if not isinstance(found, Rotation):
        return None
    return found.x, found.cos, found.sin, found.mode, found.twice, found.drift


def _sorted_columns(at: Layout) -> bool:
    """Are the columns the even ones followed by the odd ones?"""
    last = at.dims[-1]
    return len(last) == 2 and last[0].size == 2 and last[0].step * 2 == last[1].step


def _head_product(term: Term, context: Context) -> HeadProduct | None:
    left, right = term.args
    scaled = _Scaled()
    operand = layout(left, context.sizes, through=scaled)
    projection = None if operand is None else projected(operand.root, context)
    weight = layout(right, context.sizes)
    if operand is None or projection is None or weight is None or not is_constant(weight.root):
        return None
    columns: tuple[Axis, ...] = () if term.shape[2] == 1 else (Axis(LAST, 1, term.shape[2]),)
    at = Layout(operand.root, (operand.dims[0], operand.dims[1], columns), (*operand.origin, 0))
    return HeadProduct(term, at, operand, scaled.factor, right, weight, projection, context.sizes)


def is_constant(term: Term) -> bool:
    """A parameter or buffer (any tensor that comes into the graph), not something computed."""
    return term.op == "input" and term.args[0].op in ("placeholder", "get_attr")


def unbroadcast(at: Layout) -> Layout:
    """Without the axes along which the value is repeated."""
    dims = tuple(tuple(a for a in dim if a.dim != BROADCAST) for dim in at.dims)
    return Layout(at.root, dims, at.origin)


def entries(term: Term, context: Context) -> tuple[object, ...]:
    """Which entries of what a value has, in their order; equal for two views that differ in shape only."""
    at = layout(term, context.sizes)
    return (term,) if at is None else (at.root, unbroadcast(at).flat(), at.origin)


def quantized_norm(y: Term, context: Context) -> tuple[Quantized, Term] | None:
    """A dynamic quantization to ``y`` and the value (casts and views undone) that it quantizes."""
    source = y.args[0] if y.op == "get" else y
    found = quantization(source, context)
    if not isinstance(found, Quantized) or not found.dynamic or found.y is not y:
        return None
    return found, found.x
