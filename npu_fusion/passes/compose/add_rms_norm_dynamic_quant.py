"""A residual addition, the norm of the sum, and its quantization to int8 per token.

::

    %y, _, %x = npu_add_rms_norm(%x1, %x2, %g, eps)
    %q, %s = npu_dynamic_quant(%y, smooth_scales=%f)
                             ↓
    %q, _, %x, %s, _ = npu_add_rms_norm_dynamic_quant(%x1, %x2, %g, smooth_scale1=%f, epsilon=eps,
                                                      output_mask=[True, False])

:mod:`.add_rms_norm` reads the addition and the norm, :mod:`..lift.dynamic_quant` the quantization, each
spelled out or called. Equal quantizations of one value (each of the q, k and v projections quantizes its own
input) are one and are replaced together.

Conditions: those of the parts; nobody else reads the normalized value, which the operator does not return;
float16 or bfloat16, the smooth scales in the same dtype. ``accurate``: the value is quantized before it is
rounded to 16 bits.

Source: torch_npu documentation of npu_add_rms_norm_dynamic_quant.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from npu_fusion.passes.compose.add_rms_norm import Residual, residual
from npu_fusion.passes.lift.dynamic_quant import OPERATOR, Quantized, channel, quantization
from npu_fusion.passes.lift.rms_norm import Normalized, normalized, vector
from npu_fusion.passes.pattern import Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Term
from npu_fusion.passes.walk import Walk, buildable, dtype_name, narrow, operands


class AddRMSNormDynamicQuant(Fusion):
    name = "add_rms_norm_dynamic_quant"
    operator = "npu_add_rms_norm_dynamic_quant"
    anchors: ClassVar = ("cast", OPERATOR)
    priority = 21
    stage = "compose"

    def match(self, term: Term, context: Context) -> Match | Refused | None:
        quantized = quantization(term, context)
        if not isinstance(quantized, Quantized) or not quantized.dynamic:
            return None  # reported by dynamic_quant, or for the other fusion
        walk = Walk(context.sizes, quantized.drift)
        norm, smooth = _smoothed(walk.value(quantized.x), walk, context)
        if norm is None:
            return None
        found = residual(norm, context)
        if not isinstance(found, Residual):
            return None  # reported by add_rms_norm
        dtype = found.x1.dtype
        if dtype not in LOW_PRECISION or len(norm.x.shape) < 2:
            shown = f"{dtype_name(dtype)}, {len(norm.x.shape)} dimensions"
            return Refused("the operator takes float16 and bfloat16 of 2 to 8 dimensions", shown, (term,))
        if smooth is not None:
            smooth = narrow(smooth, dtype) or smooth
            if smooth.dtype != dtype or not buildable(smooth):
                shown = f"{dtype_name(smooth.dtype)}, not {dtype_name(dtype)}"
                return Refused(
                    "the smooth scales do not have the dtype of the addends", shown, (term, smooth)
                )

        def build(e: Emitter) -> list[fx.Node]:
            call = e.call(
                torch.ops.npu.npu_add_rms_norm_dynamic_quant.default,
                *found.arguments(e),
                **({} if smooth is None else {"smooth_scale1": vector(e, smooth)}),
                epsilon=found.epsilon,
                output_mask=[True, False],
            )
            return [e.item(call, 0), e.item(call, 3), e.item(call, 2)]

        return Match(
            [*found.inputs, smooth],
            [[quantized.y], quantized.scales, found.sums],
            build,
            tuple(dict.fromkeys((*walk.drift, *found.drift))),
        )


def _smoothed(x: Term, walk: Walk, context: Context) -> tuple[Normalized | None, Term | None]:
    """The norm in ``x``, and a factor per channel on top of it."""
    found = normalized(x, context)
    if isinstance(found, Normalized):
        return found, None
    if x.op == "mul" and isinstance(x.args[1], Term):
        for value, factor in operands(x):
            inner = walk.value(value)
            found = normalized(inner, context)
            smooth = channel(factor, x.shape[-1], context)
            if isinstance(found, Normalized) and smooth is not None:
                return found, smooth
    return None, None
