"""Static int8 quantization by a given scale.

::

    %q = round(div(%x, %s))
    %y = clamp(%q, -128, 127) to int8        ->    %y = npu_quantize(%x, s, zero_points, int8, -1, div_mode)

Also ``x * factor``, and a zero point added before rounding. :func:`given_scale` reads calls of
``npu_quantize`` for the fusions that end in a static quantization.

Conditions: int8 with the full range; half to even; one scale, or one per entry of the last dimension.

Source: torch_npu documentation of npu_quantize: ``div_mode=False`` multiplies by the scales and
``div_mode=True`` divides; both add the zero point before rounding.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from npu_fusion.meta_impls._dtypes import enum_value
from npu_fusion.passes.checks import product
from npu_fusion.passes.lift.dynamic_quant import Quantized, channel, quantization
from npu_fusion.passes.pattern import Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Term
from npu_fusion.passes.walk import buildable, dtype_name, unexpanded
from npu_fusion.targets import resolve, takes_dtype

OPERATOR = "npu.npu_quantize.default"
_QUANTIZE = torch.ops.npu.npu_quantize.default
_INT8 = (1, 12, torch.int8, torch.qint8)


def given_scale(term: Term, context: Context) -> Quantized | Refused | None:
    """The static quantization that a call of npu_quantize is."""
    if term.op != OPERATOR:
        return None
    x, scales, zero_points, dtype, axis, div_mode = term.args
    if dtype not in _INT8:
        return Refused("the quantized type is not int8", f"dtype={dtype}", (term,))
    last = axis in (-1, len(x.shape) - 1) if div_mode else axis != -2
    if not last and not _single(scales):
        return Refused("the scale is not along the last dimension", f"axis={axis}", (term,))
    value = context.view.cast(x, torch.float32)
    return Quantized(
        value, term, static_scale=scales, static_inverse=not div_mode, offset=zero_points, drift=term.drift
    )


def _single(scales: Any) -> bool:
    return isinstance(scales, Term) and all(s == 1 for s in scales.shape)


def along_last(found: Quantized, context: Context) -> Refused | None:
    """Refuse a given scale or zero point that is not one number, or one per entry of the last dimension."""
    if not found.x.shape:
        return Refused("a single number is quantized", "", (found.y,))
    last = found.x.shape[-1]
    for which, value in (("scale", found.static_scale), ("zero point", found.offset)):
        if isinstance(value, Term) and not _single(value) and channel(value, last, context) is None:
            return Refused(f"the {which} is not along the last dimension", f"{list(value.shape)}", (found.y,))
    return None


class Quantize(Fusion):
    name = "quantize"
    operator = "npu_quantize"
    anchors: ClassVar = ("cast",)
    priority = 51
    stage = "lift"

    def match(self, term: Term, context: Context) -> Match | Refused | None:
        found = quantization(term, context)
        if not isinstance(found, Quantized) or found.dynamic:
            return None  # refusals of quantization are reported by dynamic_quant
        refused = along_last(found, context)
        if refused is not None:
            return refused
        x = found.x
        if x.op == "cast" and x.args[0].dtype in LOW_PRECISION:
            x = x.args[0]
        if not buildable(x):
            return Refused("no node holds the value that is quantized", "", (term,))
        if x.dtype not in (torch.float32, *LOW_PRECISION):
            return Refused("npu_quantize takes float16, bfloat16 and float32", dtype_name(x.dtype), (term,))

        def build(e: Emitter) -> list[fx.Node]:
            node = e.term(x)
            scales, zero_points = scale_and_offset(e, found, node.meta["val"].dtype)
            divides = not found.static_inverse
            older = takes_dtype(resolve(context.config), _QUANTIZE, "dtype")
            dtype = torch.qint8 if older else enum_value(torch.int8)
            return [e.call(_QUANTIZE, node, scales, zero_points, dtype, -1, divides)]

        inputs = [t for t in (x, found.static_scale, found.offset) if isinstance(t, Term)]
        return Match(inputs, [[found.y]], build, found.drift)


def scale_and_offset(
    e: Emitter, found: Quantized, narrow: torch.dtype = torch.float32
) -> tuple[fx.Node, fx.Node | None]:
    """The given scale and zero point as vectors of one length and dtype, which is what the operators take.

    They are float32, or ``narrow`` where both are stored so.
    """
    given = [found.static_scale] if found.offset is None else [found.static_scale, found.offset]
    stored = all(isinstance(v, Term) and _stored(v).dtype == narrow for v in given)
    dtype = narrow if stored else torch.float32
    scale = vector(e, found.static_scale, dtype)
    if found.offset is None:
        return scale, None
    offset = vector(e, found.offset, dtype)
    single = [not isinstance(v, Term) or _single(v) for v in (found.static_scale, found.offset)]
    if single[0] != single[1]:
        if single[0]:
            scale = e.call(torch.ops.aten.expand.default, scale, [e.size(offset, 0)])
        else:
            offset = e.call(torch.ops.aten.expand.default, offset, [e.size(scale, 0)])
    return scale, offset


def _stored(value: Term) -> Term:
    """The 16-bit tensor that a scale or zero point was widened from, where nothing holds the widened one."""
    value = unexpanded(value)
    narrow = value.op == "cast" and not value.nodes and value.args[0].dtype in LOW_PRECISION
    return value.args[0] if narrow else value


def vector(e: Emitter, value: Any, dtype: torch.dtype = torch.float32) -> fx.Node:
    """A scale or zero point (a term, or a number) as a vector."""
    if isinstance(value, Term):
        value = _stored(value)
        return e.view(e.term(value, dtype), (product(value.shape),))
    return e.full([1], value)
