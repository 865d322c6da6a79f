"""An int32 matrix product times its scales, in every way that models multiply them.

::

    %f = to(%product, f32)
    %d = mul(mul(%f, %weight_scale), %token_scale)   ->   Dequantized(product, per_channel, per_token, bias)
    %e = add(%d, %bias)

:func:`dequantized` takes such a value apart for the fusions that have arguments for its parts: one scale per
output channel, one per token, numbers, in any order or multiplied with each other first, and a bias added
before the scales (int32) or after them (floating).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from npu_fusion.config import Numerics
from npu_fusion.passes.checks import Sizes, Truth
from npu_fusion.passes.lift.dynamic_quant import channel
from npu_fusion.passes.pattern import Context, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Size, Term, TermGraph, sizes_of
from npu_fusion.passes.walk import Walk, dtype_name, operands, unexpanded

aten = torch.ops.aten

_EXACT_ORDERS = (["channel", "token"], ["channel"], ["number", "token"], ["number"])
"""The operator's own orders of scales. One number stands for the channels' scales."""


@dataclass
class Dequantized:
    """``(product [+ int bias]) * factors [+ float bias]``."""

    product: Term | None = None
    per_channel: list[Term] = field(default_factory=list)
    per_token: list[Term] = field(default_factory=list)
    numbers: list[Any] = field(default_factory=list)
    """Factors of one element: Python numbers and one-element tensors."""
    order: list[str] = field(default_factory=list)
    bias: Term | None = None


def dequantized(x: Term, walk: Walk, context: Context) -> Dequantized | Refused:
    """Take ``x`` apart into an int32 product and its scales."""
    found = scaled_product(x, walk, context)
    if isinstance(found, Refused):
        return found
    if not found.per_channel and not found.numbers:
        return Refused("the int32 product has no weight scale", "", (x,))
    if found.order not in _EXACT_ORDERS:
        walk.note(Numerics.ACCURATE, "the scales are multiplied in another order: last bit of float32")
    return found


def scaled_product(x: Term, walk: Walk, context: Context) -> Dequantized | Refused:
    """:func:`dequantized` for any scales, also none, whose order is not yet accounted for."""
    found = Dequantized()
    value = walk.value(x)
    if len(value.shape) < 2:
        return Refused("there is no int32 product: the value has less than two dimensions", "", (x,))
    if value.op == "add" and isinstance(value.args[1], Term):
        for rest, bias in _product_first(*value.args):
            vector = channel(bias, value.shape[-1], context)
            if vector is not None and len(_broadcasting(rest)) >= 2:
                found.bias, value = vector, walk.value(rest)
                break
    refused = _factors(value, found, walk, context)
    if refused is not None:
        return refused
    product = found.product
    if product is None:
        return Refused("there is no int32 product: the matmul is done in floating point", "", (x,))
    if product.op == "add" and isinstance(product.args[1], Term) and found.bias is None:
        for rest, bias in sorted(operands(product), key=lambda pair: walk.rows(pair[0]).op != "int_mm"):
            vector = channel(bias, product.shape[-1], context)
            if vector is not None and vector.dtype == torch.int32 and available(walk.rows(rest)):
                found.product, found.bias = walk.rows(rest), vector
                break
    return found


def _product_first(a: Term, b: Term) -> list[tuple[Term, Term]]:
    """Both orders of two operands, first the one that starts with what the int32 product is in.

    Shapes do not always tell: of a single row, everything broadcasts like a bias or a scale per channel.
    """
    return sorted(((a, b), (b, a)), key=lambda pair: not _holds_product(pair[0]))


def _holds_product(term: Term) -> bool:
    pending = [term]
    while pending:
        inner = pending.pop()
        if inner.dtype == torch.int32:
            return True
        if inner.op in ("cast", "view", "mul"):
            pending.extend(a for a in inner.args if isinstance(a, Term))
    return False


def _broadcasting(term: Any) -> tuple[Size, ...]:
    return term.shape if isinstance(term, Term) else ()


def available(product: Term) -> bool:
    """A product that a node holds, or that npu_quant_matmul can be asked for."""
    return bool(product.nodes) or product.op == "int_mm"


def _factors(term: Term, found: Dequantized, walk: Walk, context: Context) -> Refused | None:
    """Collect the factors of a product tree, inner ones first."""
    term = walk.value(term)
    product = _converted(term, walk)
    if product is not None:
        found.product = product
        return None
    if term.op != "mul":
        source = walk.rows(term.args[0]) if term.op == "cast" else term
        if source.op in ("mm", "bmm", "input"):
            return Refused(
                "there is no int32 product: the matmul is done in floating point",
                f"{source.op} gives the value",
                (term,),
            )
        return Refused("the value before swiglu is no scaled int32 product", f"it is {term.op}", (term,))
    a, b = term.args
    if not isinstance(b, Term):
        refused = _factors(a, found, walk, context)
        found.numbers.append(b)
        found.order.append("number")
        return refused
    a, b = (_expanded_last(t, context.view) for t in (a, b))
    # Without one of the two the other alone has the full shape; when both have, scales were premultiplied.
    for full, factor in _product_first(a, b):
        kind = kind_of(factor, term.shape, context.sizes)
        if kind is not None:
            refused = _factors(full, found, walk, context)
            _add(kind, factor, found)
            return refused
    for full, scales in _product_first(a, b):
        inner = walk.value(scales)
        if inner.op == "mul" and isinstance(inner.args[1], Term):
            factors = [_expanded_last(t, context.view) for t in inner.args]
            kinds = [kind_of(t, term.shape, context.sizes) for t in factors]
            if None not in kinds:
                refused = _factors(full, found, walk, context)
                for kind, factor in zip(kinds, factors, strict=True):
                    _add(str(kind), factor, found)
                found.order.append("premultiplied")
                return refused
    if all(_converted(walk.value(t), walk) is not None for t in (a, b)):
        return Refused("two int32 products are multiplied with each other", "", (term,))
    return Refused(
        "a scale is neither per output channel nor per token",
        f"{list(unexpanded(a).shape)} times {list(unexpanded(b).shape)}",
        (term,),
    )


def _converted(term: Term, walk: Walk) -> Term | None:
    """The int32 tensor that a float32 value is converted from, maybe by way of a 16-bit one."""
    if term.op != "cast":
        return None
    inner = walk.rows(term.args[0])
    if inner.op == "cast" and inner.dtype in LOW_PRECISION and inner.args[0].dtype == torch.int32:
        walk.note(Numerics.ACCURATE, f"the int32 product is not rounded to {dtype_name(inner.dtype)}")
        inner = walk.rows(inner.args[0])
    return inner if inner.dtype == torch.int32 else None


def _expanded_last(term: Term, view: TermGraph) -> Term:
    """``expand(to(x, d), shape)`` for ``to(expand(x, shape), d)``."""
    if term.op == "cast" and term.args[0].op == "expand":
        base, shape = term.args[0].args
        return view.make("expand", (view.cast(base, term.dtype), shape), term.dtype)
    return term


def kind_of(factor: Term, full: tuple[Size, ...], sizes: Sizes) -> str | None:
    """How a factor broadcasts against the full shape: "channel", "token", "number", or None."""
    shape = unexpanded(factor).shape
    shape = (1,) * (len(full) - len(shape)) + shape
    lead, last = shape[:-1], shape[-1]
    if all(s == 1 for s in lead):
        if last == 1:
            return "token" if all(s == 1 for s in full[:-1]) else "number"
        return "channel" if sizes.equal(last, full[-1]) is Truth.YES else None
    if last == 1 and sizes.same_shape(lead, full[:-1]):
        return "token"
    return None


def _add(kind: str, factor: Term, found: Dequantized) -> None:
    factor = unexpanded(factor)
    {"channel": found.per_channel, "token": found.per_token, "number": found.numbers}[kind].append(factor)
    found.order.append(kind)


def raw(term: Term) -> Term:
    """The 16-bit tensor that a widened value was widened from, where nothing holds the widened one."""
    narrow = term.op == "cast" and not term.nodes and term.args[0].dtype in LOW_PRECISION
    return term.args[0] if narrow else term


def channel_scale(e: Emitter, found: Dequantized) -> fx.Node:
    """One float32 factor per channel, or one for all, out of all factors that are not per token."""
    parts = [e.view(e.term(t, torch.float32), (t.shape[-1],)) for t in found.per_channel]
    parts += [e.view(e.term(n, torch.float32), (1,)) for n in found.numbers if isinstance(n, Term)]
    literals = [float(n) for n in found.numbers if not isinstance(n, Term)]
    if not parts:
        parts.append(e.full([1], literals.pop(0)))
    total = parts[0]
    for part in (*parts[1:], *literals):
        total = e.call(aten.mul.Tensor, total, part)
    return total


def weight_scale(e: Emitter, found: Dequantized, x: fx.Node, size: Size) -> fx.Node:
    """:func:`channel_scale`, one factor for each of the ``size`` channels in any case."""
    total = channel_scale(e, found)
    if sizes_of(total.meta["val"].shape) == (1,) and size != 1:
        total = e.call(aten.expand.default, total, [e.size(x, len(x.meta["val"].shape) - 1)])
    return total


def token_scale(e: Emitter, factors: list[Term]) -> fx.Node:
    nodes = [e.call(aten.reshape.default, e.term(t, torch.float32), [-1]) for t in factors]
    total = nodes[0]
    for node in nodes[1:]:
        total = e.call(aten.mul.Tensor, total, node)
    return total
