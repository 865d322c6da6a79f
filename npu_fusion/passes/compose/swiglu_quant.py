"""SwiGLU of a floating tensor, quantized to int8.

::

    %a, %b = chunk(%x, 2, -1)                        %y, %f = npu_swiglu_quant(%x, smooth_scales=%m,
    %h = mul(silu(%a), %b)                   ->                   activate_left=True, quant_mode=1)
    %y, %s = quantize %h to int8 per token           %s = reciprocal(%f)

    %q = round(mul(%h, %factor) + %offset)           %y, _ = npu_swiglu_quant(%x, smooth_scales=%factor,
    %y = clamp(%q, -128, 127) to int8        ->                   offsets=%offset, activate_left=True,
                                                                  quant_mode=0)

For what :mod:`..compose.dequant_swiglu_quant` does not take: a floating matrix product, an int32 one with
another reader or too large for the memory limit. Either half activated; smooth scales per channel (dynamic).

Conditions: as there, without the int32 product; 16-bit or float32 values of two or more dimensions; the
target's largest width. Dynamic is ``accurate``: the operator gives 127 / amax, whose reciprocal is the scale
that the graph wants up to the last bit (for a zero row the operator gives infinity, hence 0), and multiplies
by it. Static is ``strict`` where the source multiplies by the scale.

npu_dequant_swiglu_quant takes 16-bit floats as well and returns the scale itself, but it takes no float32, it
divides by a static scale, and a report that counts it would no longer say how many int32 products it read.

Source: torch_npu documentation of npu_swiglu_quant. Its defaults are the right half and static quantization;
both arguments are always passed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from npu_fusion.config import Numerics
from npu_fusion.passes.compose._swiglu_quantized import Activated, activated
from npu_fusion.passes.lift.dynamic_quant import OPERATOR, Quantized
from npu_fusion.passes.lift.quantize import along_last, scale_and_offset
from npu_fusion.passes.lift.swiglu import even
from npu_fusion.passes.pattern import Constraint, Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Term, sizes_of
from npu_fusion.passes.walk import buildable
from npu_fusion.targets import resolve

aten = torch.ops.aten


class SwiGLUQuant(Fusion):
    name = "swiglu_quant"
    operator = "npu_swiglu_quant"
    anchors: ClassVar = ("cast", OPERATOR, "npu.npu_quantize.default")
    priority = 12
    stage = "compose"

    def match(self, term: Term, context: Context) -> Match | Refused | None:
        found = activated(term, context)
        if not isinstance(found, Activated):
            return None  # refusals of the parts are reported by dynamic_quant and swiglu
        quantized, walk = found.quantized, found.walk
        x = found.glu.x
        if x.op == "cast" and x.args[0].dtype in LOW_PRECISION:
            x = x.args[0]
        if not buildable(x):
            return Refused("no node holds the value before swiglu", "", (term,))
        if len(x.shape) < 2:
            return Refused("the operator takes two or more dimensions", str(len(x.shape)), (term,))
        if quantized.dynamic:
            walk.note(
                Numerics.ACCURATE, "the scale is computed as 1 / (127 / amax), x / scale as x * (127 / amax)"
            )
        else:
            refused = along_last(quantized, context)
            if refused is not None:
                return refused
            if found.smooth is not None:
                return Refused("static quantization has no smooth scales", "", (term,))
            if not quantized.static_inverse:
                walk.note(Numerics.ACCURATE, "x / scale is computed as x * (1 / scale)")
        return _replacement(x, found, context)


def _replacement(x: Term, found: Activated, context: Context) -> Match:
    quantized, smooth = found.quantized, found.smooth
    constraints = [even(context, x)]
    target = resolve(context.config)
    if target is not None:
        most = target.swiglu_quant_width
        constraints.append(
            Constraint(
                context.sizes.at_most(x.shape[-1], most),
                f"the last dimension is larger than {most}",
                f"it is {x.shape[-1]}",
            )
        )

    def build(e: Emitter) -> list[fx.Node]:
        node = e.term(x)
        arguments: dict[str, Any] = {}
        if not quantized.dynamic:
            arguments |= _static(e, quantized)
        elif smooth is not None:
            arguments["smooth_scales"] = e.view(e.term(smooth, torch.float32), (1, smooth.shape[-1]))
        call = e.call(
            torch.ops.npu.npu_swiglu_quant.default,
            node,
            **arguments,
            activate_left=found.glu.left,
            quant_mode=1 if quantized.dynamic else 0,
        )
        y = e.item(call, 0)
        return [y, e.call(aten.reciprocal.default, e.item(call, 1))] if quantized.dynamic else [y]

    given = [x, smooth, quantized.static_scale, quantized.offset]
    outputs = [[quantized.y], quantized.scales] if quantized.dynamic else [[quantized.y]]
    inputs = [t for t in given if isinstance(t, Term)]
    return Match(inputs, outputs, build, found.walk.drift, constraints)


def _static(e: Emitter, quantized: Quantized) -> dict[str, Any]:
    """The operator multiplies, and takes factor and offset or neither: [1], or [1, H] for one group."""
    factor, offset = scale_and_offset(e, quantized)
    if not quantized.static_inverse:
        factor = e.call(aten.reciprocal.default, factor)
    if offset is None:
        offset = e.call(aten.zeros_like.default, factor)
    return {"smooth_scales": _one_group(e, factor), "offsets": _one_group(e, offset)}


def _one_group(e: Emitter, vector: fx.Node) -> fx.Node:
    single = sizes_of(vector.meta["val"].shape) == (1,)
    return vector if single else e.call(aten.unsqueeze.default, vector, 0)
