"""Static int8 quantization by a given scale.

::

    %q = round(div(%x, %s))
    %y = clamp(%q, -128, 127) to int8        ->     %y = npu_quantize(%x, s, zero_points, int8, axis=-1, div_mode=..)

Also ``x * factor``, and a zero point added before rounding. :func:`given_scale` reads calls of ``npu_quantize``
for the fusions that end in a static quantization.

Conditions: int8 with the full range; half to even; one scale, or one per entry of the last dimension.

Source: torch_npu documentation of npu_quantize: ``div_mode=False`` multiplies by the scales and adds the zero
point before rounding; ``div_mode=True`` divides, rounds, then adds.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from npu_fusion.passes.lift.dynamic_quant import Quantized, channel, quantization
from npu_fusion.passes.pattern import Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Term
from npu_fusion.passes.walk import dtype_name

OPERATOR = "npu.npu_quantize.default"
_INT8 = (1, 12, torch.int8, torch.qint8)


def given_scale(term: Term, context: Context) -> Quantized | Refused | None:
    """The static quantization that a call of npu_quantize is."""
    if term.op != OPERATOR:
        return None
    x, scales, zero_points, dtype, axis, div_mode = term.args
    if dtype not in _INT8:
        return Refused("the quantized type is not int8", f"dtype={dtype}", (term,))
    if axis not in (-1, len(x.shape) - 1) and not _single(scales):
        return Refused("the scale is not along the last dimension", f"axis={axis}", (term,))
    value = context.view.cast(x, torch.float32)
    return Quantized(
        value, term, static_scale=scales, static_inverse=not div_mode, offset=zero_points, drift=()
    )


def _single(scales: Any) -> bool:
    return isinstance(scales, Term) and all(s == 1 for s in scales.shape)


def scale_along_last(scale: Any, size: Any, context: Context) -> bool:
    """One number, or one per entry of the last dimension."""
    if not isinstance(scale, Term):
        return True
    return _single(scale) or channel(scale, size, context) is not None


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
        scale, offset = found.static_scale, found.offset
        last = found.x.shape[-1]
        for which, value in (("scale", scale), ("zero point", offset)):
            if not scale_along_last(value, last, context):
                return Refused(f"the {which} is not along the last dimension", f"{list(value.shape)}", (term,))
        x = found.x
        if x.op == "cast" and x.args[0].dtype in LOW_PRECISION:
            x = x.args[0]
        if context.config.target is not None and x.dtype not in (torch.float32, *LOW_PRECISION):
            return Refused("npu_quantize takes float16, bfloat16 and float32", dtype_name(x.dtype), (term,))

        def build(e: Emitter) -> list[fx.Node]:
            scales = _vector(e, scale)
            if not found.static_inverse:
                scales = e.call(torch.ops.aten.reciprocal.default, scales)
            zero_points = None if offset is None else _vector(e, offset)
            return [
                e.call(torch.ops.npu.npu_quantize.default, e.term(x), scales, zero_points, 1, -1, False)
            ]

        inputs = [t for t in (x, scale, offset) if isinstance(t, Term)]
        return Match(inputs, [[found.y]], build, found.drift)


def _vector(e: Emitter, value: Any) -> fx.Node:
    if isinstance(value, Term):
        while value.op == "expand":
            value = value.args[0]
        return e.call(torch.ops.aten.reshape.default, e.term(value, torch.float32), [-1])
    return e.call(torch.ops.aten.full.default, [1], float(value), dtype=torch.float32)
