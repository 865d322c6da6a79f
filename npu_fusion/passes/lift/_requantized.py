"""An int32 product rounded to int8: what npu_quant_matmul with an int8 result computes.

::

    %f = to(add(%product, %bias), f32)
    %v = mul(mul(%f, %weight_scale), %input_scale)           ->   Requantized(product, factors, divisor,
    %r = round(add(div(%v, %output_scale), %zero_point))                      bias, offset)
    %y = clamp(%r, -128, 127) to int8

:func:`requantized` takes such a value apart, also where the last quantization is a call of ``npu_quantize``.
The operator computes ``sat(rint((product + bias) * scale + offset))``, so what it has no argument for is
refused: a scale per token, and a bias after the scales.

Trap: the offset is a float32 tensor by the operator's signature, but a device takes it in nine bits (packed
by ``npu_trans_quant_param``, which op-plugin calls): a bias in the steps of the result, ``b / output_scale``,
must not be hidden in it. On a target the zero point is therefore one that is an integer by how it was made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from npu_fusion.config import Numerics
from npu_fusion.passes.lift.dequant import Dequantized, channel_scale, kind_of, scaled_product
from npu_fusion.passes.lift.dynamic_quant import Quantized, Rounded, rounded_to_int8
from npu_fusion.passes.lift.quantize import OPERATOR, given_scale, vector
from npu_fusion.passes.pattern import Context, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import Size, Term
from npu_fusion.passes.walk import Walk, buildable, dtype_name, unexpanded

aten = torch.ops.aten


@dataclass(frozen=True)
class Requantized:
    """``sat(rint((product [+ int bias]) * factors / divisor + offset))``."""

    value: Term
    """``(product [+ int bias]) * factors``."""
    parts: Dequantized
    """Without scales per token, and with an int32 bias or none."""
    divisor: Any
    offset: Any
    """Both None, a number, or a term of one entry or one for each channel."""
    walk: Walk


def requantized(term: Term, context: Context) -> Requantized | Refused | None:
    """Take apart what ``term`` (an int8 cast, or a call of npu_quantize) rounds. None: no product of int8."""
    found = _static(term, context)
    if found is None:
        return None
    value, divisor, offset, walk = found
    parts = scaled_product(value, walk, context)
    if isinstance(parts, Refused):
        return None  # no int32 product, or for the fusions of 16-bit results to report
    full = value.shape
    vectors = [t for t in (divisor, offset) if isinstance(t, Term)]
    if not all(_along_channels(t, full, context) for t in vectors):
        return None  # reported by quantize
    # Of a single row, what has one entry can be read as a scale per token, too.
    tokens = [t for t in parts.per_token if not _single(t)]
    parts = replace(
        parts, per_token=[], numbers=[*parts.numbers, *(t for t in parts.per_token if _single(t))]
    )
    if tokens:
        shown = str(list(tokens[0].shape))
        return Refused("npu_quant_matmul takes no scale per token with an int8 result", shown, (term,))
    if parts.bias is not None and parts.bias.dtype != torch.int32:
        shown = dtype_name(parts.bias.dtype)
        return Refused("the bias of an int8 result is int32, added before the scales", shown, (term,))
    if context.config.target is not None and not _integer(offset):
        return Refused("the zero point is not known to be an integer", "", (term,))
    count = len(parts.per_channel) + len(parts.numbers)
    if count == 0 and divisor is None:
        return None
    if divisor is not None:
        walk.note(Numerics.ACCURATE, "x / scale is computed as x * (1 / scale)")
    if count > 1:
        walk.note(Numerics.ACCURATE, "the scales are multiplied with each other first: last bit of float32")
    return Requantized(value, parts, divisor, offset, walk)


def _static(term: Term, context: Context) -> tuple[Term, Any, Any, Walk] | None:
    """What is scaled and rounded, what it is divided by at last, the zero point, and the way there."""
    if term.op == OPERATOR:
        given = given_scale(term, context)
        if not isinstance(given, Quantized):
            return None
        walk = Walk(context.sizes, given.drift)
        if not given.static_inverse:
            return given.x, given.static_scale, given.offset, walk
        factor = context.view.cast(given.static_scale, torch.float32)
        scaled = context.view.make("mul", (given.x, factor), torch.float32)
        return scaled, None, given.offset, walk
    rounded = rounded_to_int8(term, context)
    if not isinstance(rounded, Rounded) or not rounded.full_range:
        return None  # reported by dynamic_quant
    walk, value = Walk(context.sizes, rounded.drift), rounded.value
    if value.op == "div" and isinstance(value.args[0], Term):
        return value.args[0], value.args[1], rounded.offset, walk
    return value, None, rounded.offset, walk


def _single(term: Term) -> bool:
    return all(size == 1 for size in unexpanded(term).shape)


def _along_channels(term: Term, full: tuple[Size, ...], context: Context) -> bool:
    """One entry, or one for each of the last dimension."""
    return _single(term) or kind_of(term, full, context.sizes) == "channel"


def _integer(offset: Any) -> bool:
    """Is this zero point an integer by how it was made?"""
    if not isinstance(offset, Term):
        return offset is None or float(offset).is_integer()
    offset = unexpanded(offset)
    while offset.op in ("view", "cast") and not _from_integers(offset):
        offset = offset.args[0]
    if offset.op == "const":
        return float(offset.args[0]).is_integer()
    return offset.op == "round" or _from_integers(offset)


def _from_integers(term: Term) -> bool:
    return term.dtype is not None and not (term.dtype.is_floating_point or term.dtype.is_complex)


def terms_of(found: Requantized) -> list[Term]:
    """Everything that the operator reads beside the two matrices."""
    parts = found.parts
    given = [parts.bias, *parts.per_channel, *parts.numbers, found.divisor, found.offset]
    return [t for t in given if isinstance(t, Term)]


def all_buildable(found: Requantized) -> bool:
    return all(buildable(unexpanded(t)) for t in terms_of(found))


def scale_node(e: Emitter, found: Requantized) -> fx.Node:
    """float32 [n] or [1]: what the sums are multiplied by."""
    parts, divisor = found.parts, found.divisor
    scaled = bool(parts.per_channel or parts.numbers)
    if divisor is None:
        return channel_scale(e, parts)
    below = vector(e, divisor) if isinstance(divisor, Term) or not scaled else divisor
    if not scaled:
        return e.call(aten.reciprocal.default, below)
    return e.call(aten.div.Tensor, channel_scale(e, parts), below)


def offset_node(e: Emitter, found: Requantized) -> fx.Node | None:
    """float32 [n] or [1], or None."""
    return None if found.offset is None else vector(e, found.offset)
