"""An int8 matrix product, dequantized and rounded to 16 bits, or requantized to int8.

::

    %p = _int_mm(%q, %w)                             %y = npu_quant_matmul(%q, %w, %weight_scale,
    %f = to(%p, f32)                                          pertoken_scale=%token_scale, bias=%b,
    %d = mul(mul(%f, %weight_scale), %token_scale)   ->       output_dtype=bf16)
    %y = to(add(%d, %b), bf16)

    %f = to(add(_int_mm(%q, %w), %b), f32)
    %r = round(add(mul(%f, %scale), %z))             ->   %y = npu_quant_matmul(%q, %w, %scale, offset=%z,
    %y = clamp(%r, -128, 127) to int8                              bias=%b, output_dtype=int8)

Also ``mm`` of widened operands, ``out_dtype(mm)``, any order of the scales, one number in their place, an
int32 bias before them, roundings in between. The last 16-bit value of such a chain is what is replaced.

Conditions: int8 operands; a scale per output channel or for all; a 16-bit result (the operator returns no
float32); nobody else reads what is in between. ``strict`` where the source is the operator's own arithmetic,
``((product [+ int bias]) * channel * token [+ float bias])`` in float32 with one rounding.

A result in int8 (:mod:`._requantized`): one scale per output channel or for all, an int32 bias, a zero
point; also with several scales, ``/ output_scale``, roundings to 16 bits in between, or ``npu_quantize`` at
the end. ``strict`` where the source multiplies by one scale. It is looked for first: what is refused still
becomes a 16-bit result and an ``npu_quantize``. On a device the operator keeps ten bits of this scale's
mantissa, so that a value next to a half may go to the other side.

A product that is used as int32 stays as it is: the operator demands a scale even where it ignores it. Unless
the host cannot run ``_int_mm``; torch_npu has no kernel for it and torchair no GE converter::

    %p = _int_mm(%q, %w)      ->      %p = npu_quant_matmul(%q, %w, full([1], 1), output_dtype=int32)

(and the other spellings of the product, which it has no use for either).

For float16 and int8 results without a scale per token the operator takes float32 scales in no graph mode,
only packed ones with ten bits of mantissa. For float16 a scale of one per token avoids both and changes
nothing; an int8 result is refused there (``npu_fusion.hosts._ge_limits``).

Source: torch_npu documentation of npu_quant_matmul (table of dtype combinations).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from npu_fusion.meta_impls._dtypes import enum_value
from npu_fusion.passes.checks import Truth
from npu_fusion.passes.lift import quantize
from npu_fusion.passes.lift._requantized import (
    Requantized,
    all_buildable,
    offset_node,
    requantized,
    scale_node,
    terms_of,
)
from npu_fusion.passes.lift.dequant import (
    Dequantized,
    channel_scale,
    dequantized,
    raw,
    token_scale,
)
from npu_fusion.passes.pattern import Constraint, Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Term
from npu_fusion.passes.walk import Walk, buildable
from npu_fusion.targets import resolve, takes_dtype

aten = torch.ops.aten
_QUANT_MATMUL = torch.ops.npu.npu_quant_matmul.default
_INT_MM = aten._int_mm.default


class QuantMatmul(Fusion):
    name = "quant_matmul"
    operator = "npu_quant_matmul"
    # int8 results first, whatever the order in the graph, and products last: what is left of them
    anchors: ClassVar = (quantize.OPERATOR, "clamp", "round", "cast", "mul", "add", "int_mm")
    priority = 45
    stage = "lift"

    def match(self, term: Term, context: Context) -> Match | Refused | None:
        if term.op == "int_mm":
            return _int32(term, context)
        if term.op == quantize.OPERATOR or _is_rounding(term):
            result = _int8_of(term, context)
            return None if result is None else _int8(result, context)
        if term.dtype == torch.float32 and term.op != "cast":
            return _float32(term, context)
        if term.dtype not in LOW_PRECISION or term.op != "cast":
            return None
        recognized = _recognized(term, context)
        if recognized is None or _goes_on(term, context):
            return None
        found, walk = recognized
        if found.bias is not None and not buildable(raw(found.bias)):
            return Refused("no node holds the bias", "", (term,))
        return _replacement(term, found, walk, context)


def _recognized(term: Term, context: Context) -> tuple[Dequantized, Walk] | None:
    """The parts of a dequantized product, where ``term`` is one (before its last rounding or after it)."""
    key = (_recognized, term)
    if key not in context.memo:
        context.memo[key] = _take_apart(term, context)
    recognized = context.memo[key]
    return None if recognized is None or _has_operator(term, recognized[0], context) else recognized


def _take_apart(term: Term, context: Context) -> tuple[Dequantized, Walk] | None:
    walk = Walk(context.sizes)
    value = walk.rows(term.args[0]) if term.op == "cast" else term
    if value.op not in ("mul", "add") or value.dtype != torch.float32:
        return None
    found = dequantized(value, walk, context)
    if isinstance(found, Refused):
        return None
    product = found.product
    assert product is not None
    if product.op != "int_mm" or any(t.dtype != torch.int8 or not buildable(t) for t in product.args):
        return None
    return found, walk


def _has_operator(term: Term, found: Dequantized, context: Context) -> bool:
    """Is a part of the chain above the product already an npu_quant_matmul, the model's or ours?"""
    pending = [term]
    seen = {found.product, found.bias, *found.per_channel, *found.per_token, *found.numbers}
    while pending:
        term = pending.pop()
        if term in seen:
            continue
        seen.add(term)
        if any(n.target is _QUANT_MATMUL or n in context.rewriter.made for n in term.nodes):
            return True
        if term.op in ("cast", "view", "mul", "add"):
            pending.extend(a for a in term.args if isinstance(a, Term))
    return False


def _readers(term: Term, context: Context) -> set[Any]:
    """The terms that are computed from a value directly; None or a tuple for a reader that has no term."""
    dead, of = context.rewriter.dead, context.view.of
    readers = {of.get(u) for n in term.nodes for u in n.users if u not in dead}
    readers.discard(term)  # copies
    return readers


def _goes_on(term: Term, context: Context) -> bool:
    """Is this 16-bit value only a step to another one that the operator can give as well?"""
    current = term
    while True:
        readers = _readers(current, context)
        if len(readers) != 1:
            return False
        (current,) = readers
        if not isinstance(current, Term):
            return False
        if current.op == "cast" and current.dtype in LOW_PRECISION:
            recognized = _recognized(current, context)
            return recognized is not None and _allowed(recognized[1], context)
        if current.op not in ("view", "cast", "mul", "add"):
            return False


def _allowed(walk: Walk, context: Context) -> bool:
    return all(drift.level <= context.config.level for drift in walk.drift)


def _float32(term: Term, context: Context) -> Refused | None:
    """A dequantized product that is used in float32, reported at its last operation."""
    if not term.nodes or _recognized(term, context) is None:
        return None
    pending, seen = [term], {term}
    while pending:
        for reader in _readers(pending.pop(), context):
            if not isinstance(reader, Term) or reader in seen:
                continue
            seen.add(reader)
            if reader.op == "cast" and reader.dtype in LOW_PRECISION:
                return None  # judged there
            if reader.op in ("mul", "add") and _recognized(reader, context) is not None:
                return None
            if reader.op == "view":
                pending.append(reader)
    return Refused("npu_quant_matmul returns 16-bit floats", "the product is used in float32", (term,))


def _replacement(term: Term, found: Dequantized, walk: Walk, context: Context) -> Match:
    product, bias, dtype = found.product, found.bias, term.dtype
    assert product is not None
    assert dtype is not None
    x1, x2 = product.args
    given = [x1, x2, bias, *found.per_channel, *found.per_token, *found.numbers]

    def build(e: Emitter) -> list[fx.Node]:
        rows = e.term(x1)
        arguments: dict[str, Any] = {}
        if found.per_token:
            arguments["pertoken_scale"] = token_scale(e, found.per_token)
        elif dtype == torch.float16:
            arguments["pertoken_scale"] = e.full([e.size(rows, 0)], 1.0)
        if bias is not None:
            arguments["bias"] = e.view(_bias(e, bias, dtype), (product.shape[-1],))
        scale = _scale(e, found, dtype)
        arguments["output_dtype"] = output_dtype(dtype, context)
        return [e.call(_QUANT_MATMUL, rows, e.term(x2), scale, **arguments)]

    inputs = [t for t in given if isinstance(t, Term)]
    return Match(inputs, [[term]], build, walk.drift, _widths(product, context))


def _is_rounding(term: Term) -> bool:
    """``clamp`` or ``round``, maybe of 16-bit values."""
    inner = term.args[0] if term.op == "cast" and not term.args[0].nodes else term
    return inner.op in ("clamp", "round")


def _int8_of(term: Term, context: Context) -> Term | None:
    """The int8 values that a rounding is the last step to, or that npu_quantize returns."""
    if term.op == quantize.OPERATOR:
        return term
    casts = (u for u in context.view.users(term) if u.op == "cast" and u.dtype == torch.int8 and u.nodes)
    return next(casts, None)


def _int8(term: Term, context: Context) -> Match | Refused | None:
    found = requantized(term, context)
    if not isinstance(found, Requantized):
        return found
    parts = found.parts
    product, bias = parts.product, parts.bias
    assert product is not None
    if product.op != "int_mm" or any(t.dtype != torch.int8 or not buildable(t) for t in product.args):
        return None
    if _has_operator(found.value, parts, context):
        return None
    if not all_buildable(found):
        return Refused("no node holds a scale, the bias or the zero point", "", (term,))
    x1, x2 = product.args

    def build(e: Emitter) -> list[fx.Node]:
        arguments: dict[str, Any] = {"output_dtype": output_dtype(torch.int8, context)}
        if bias is not None:
            arguments["bias"] = e.view(e.term(bias), (product.shape[-1],))
        offset = offset_node(e, found)
        if offset is not None:
            arguments["offset"] = offset
        return [e.call(_QUANT_MATMUL, e.term(x1), e.term(x2), scale_node(e, found), **arguments)]

    return Match([x1, x2, *terms_of(found)], [[term]], build, found.walk.drift, _widths(product, context))


def _widths(product: Term, context: Context) -> list[Constraint]:
    target = resolve(context.config)
    if target is None:
        return []
    most = target.quant_matmul_width
    reason = f"the last dimension of an operand is larger than {most}"
    sizes = [operand.shape[-1] for operand in product.args]
    return [Constraint(context.sizes.at_most(size, most), reason, f"it is {size}") for size in sizes]


def _int32(product: Term, context: Context) -> Match | None:
    """A product that is used as int32, where the host does not take it as it is."""
    admission = context.rewriter.admission
    if admission is None or admission(_INT_MM, (), {}) is None:
        return None
    known = product.dtype == torch.int32 and all(a.dtype == torch.int8 and buildable(a) for a in product.args)
    if not known or any(node.target is _QUANT_MATMUL for node in product.nodes):
        return None

    def build(e: Emitter) -> list[fx.Node]:
        one = e.shared("a scale of one", lambda: e.full([1], 1.0))
        return [accumulator(e, product, one, context)]

    refuted = [c for c in _widths(product, context) if c.truth is Truth.NO]  # the product cannot stay
    return Match(product.args, [[product]], build, constraints=refuted)


def output_dtype(dtype: torch.dtype, context: Context) -> int | torch.dtype:
    """The argument of npu_quant_matmul, as the release of the target spells it."""
    spelled = takes_dtype(resolve(context.config), _QUANT_MATMUL, "output_dtype")
    return dtype if spelled else enum_value(dtype)


def accumulator(e: Emitter, product: Term, scale: fx.Node, context: Context) -> fx.Node:
    """npu_quant_matmul asked for its int32 accumulator. It demands ``scale`` but does not use it then."""
    x1, x2 = product.args
    dtype = output_dtype(torch.int32, context)
    return e.call(_QUANT_MATMUL, e.term(x1), e.term(x2), scale, output_dtype=dtype)


def _scale(e: Emitter, found: Dequantized, dtype: torch.dtype) -> fx.Node:
    """float32, or bfloat16 as it is stored where the result is bfloat16."""
    factors = [*found.per_channel, *found.numbers]
    if len(factors) == 1 and isinstance(factors[0], Term):
        narrow = raw(factors[0])
        if narrow.dtype == dtype == torch.bfloat16:
            last = narrow.shape[-1] if found.per_channel else 1
            return e.view(e.term(narrow), (last,))
    return channel_scale(e, found)


def _bias(e: Emitter, bias: Term, dtype: torch.dtype) -> fx.Node:
    """int32, float32, or the dtype of the result."""
    narrow = raw(bias)
    if narrow.dtype in (torch.int32, dtype):
        return e.term(narrow)
    return e.term(bias, torch.float32)
