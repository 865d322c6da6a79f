"""A residual addition, the norm of the sum, and its quantization to int8 by a given scale.

::

    %y, _, %x = npu_add_rms_norm(%x1, %x2, %g, eps)
    %q = clamp(round(%y / %s + %z), -128, 127) to int8         (or %y * %s: div_mode=False)
                             ↓
    %q, _, %x = npu_add_rms_norm_quant(%x1, %x2, %g, scales1=%s, zero_points1=%z, epsilon=eps, div_mode=True)

:mod:`.add_rms_norm` reads the addition and the norm, :mod:`..lift.quantize` the quantization, each spelled
out or called. Equal quantizations of one value (each of the q, k and v projections quantizes its own
input) are one and are replaced together.

Conditions: those of the parts; nobody else reads the normalized value, which the operator does not return;
one scale, or one per channel. On a target the dtypes that are documented together: float16 with float32
scales and int32 zero points, or all in bfloat16. ``accurate`` where the source rounds to 16 bits in between.

Source: torch_npu documentation of npu_add_rms_norm_quant. Everything after the weight is passed by keyword:
its position changed between versions.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from npu_fusion.passes.compose.add_rms_norm import Residual, residual
from npu_fusion.passes.lift.dynamic_quant import Quantized, quantization
from npu_fusion.passes.lift.quantize import OPERATOR, along_last, given_scale
from npu_fusion.passes.lift.rms_norm import Normalized, normalized
from npu_fusion.passes.pattern import Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Size, Term
from npu_fusion.passes.walk import Walk, buildable, dtype_name

_DOCUMENTED = {torch.float16: (torch.float32, torch.int32), torch.bfloat16: (torch.bfloat16, torch.bfloat16)}
"""Dtype of the addends -> dtypes of the scale and the zero point."""


class AddRMSNormQuant(Fusion):
    name = "add_rms_norm_quant"
    operator = "npu_add_rms_norm_quant"
    anchors: ClassVar = ("cast", OPERATOR)
    priority = 20
    stage = "compose"

    def match(self, term: Term, context: Context) -> Match | Refused | None:
        quantized = given_scale(term, context) if term.op == OPERATOR else quantization(term, context)
        if not isinstance(quantized, Quantized) or quantized.dynamic:
            return None  # reported by dynamic_quant, or for the other fusion
        walk = Walk(context.sizes, quantized.drift)
        norm = normalized(walk.value(quantized.x), context)
        if not isinstance(norm, Normalized):
            return None
        found = residual(norm, context)
        if not isinstance(found, Residual):
            return None  # reported by add_rms_norm
        refused = along_last(quantized, context)
        if refused is not None:
            return refused
        given = [t for t in (quantized.static_scale, quantized.offset) if isinstance(t, Term)]
        if not all(buildable(_source(t)) for t in given):
            return Refused("no node holds the scale or the zero point", "", (term,))
        values = (quantized.static_scale, quantized.offset)
        dtypes = [_stored(value, found.x1.dtype) for value in values]
        if context.config.target is not None:
            if found.x1.dtype not in LOW_PRECISION:
                shown = dtype_name(found.x1.dtype)
                return Refused("npu_add_rms_norm_quant takes float16 and bfloat16", shown, (term,))
            dtypes = [*_DOCUMENTED[found.x1.dtype]]
            for value, dtype in zip(values, dtypes, strict=True):
                if not _exact(value, dtype):
                    shown = f"{dtype_name(_source(value).dtype)}" if isinstance(value, Term) else f"{value}"
                    reason = "the scale and zero point do not have the dtypes that go with the addends"
                    return Refused(reason, f"{shown} instead of {dtype_name(dtype)}", (term,))

        def build(e: Emitter) -> list[fx.Node]:
            size = norm.x.shape[-1]
            offset = quantized.offset
            call = e.call(
                torch.ops.npu.npu_add_rms_norm_quant.default,
                *found.arguments(e),
                scales1=_per_channel(e, quantized.static_scale, size, dtypes[0]),
                zero_points1=None if offset is None else _per_channel(e, offset, size, dtypes[1]),
                epsilon=found.epsilon,
                div_mode=not quantized.static_inverse,
            )
            return [e.item(call, 0), e.item(call, 2)]

        return Match(
            [*found.inputs, *given],
            [[quantized.y], found.sums],
            build,
            tuple(dict.fromkeys((*walk.drift, *found.drift))),
        )


def _source(value: Term) -> Term:
    """What a scale or zero point was before it was broadcast and widened, which the operator does itself."""
    while value.op in ("expand", "view") or (value.op == "cast" and value.dtype == torch.float32):
        if value.op == "view" and any(s != 1 for s in value.args[0].shape[:-1]):
            break  # [H, 1] viewed as [H], say: the view is what is meant
        if value.op == "cast" and value.args[0].dtype not in (torch.int8, torch.int32, *LOW_PRECISION):
            break
        value = value.args[0]
    return value


def _stored(value: Any, dtype: torch.dtype | None) -> torch.dtype:
    """``dtype`` where the value is stored in it, else float32: the operator widens it itself."""
    stored = isinstance(value, Term) and _source(value).dtype == dtype
    return dtype if stored and dtype is not None else torch.float32


def _exact(value: Any, dtype: torch.dtype) -> bool:
    """Does ``dtype`` hold the value unchanged?"""
    if value is None:
        return True
    if isinstance(value, Term):
        have = _source(value).dtype
        return have == dtype or (dtype == torch.float32 and have in LOW_PRECISION)
    return float(torch.tensor(value, dtype=dtype)) == float(torch.tensor(value, dtype=torch.float32))


def _per_channel(e: Emitter, value: Any, size: Size, dtype: torch.dtype) -> fx.Node:
    """``value`` as [H], as the operator wants it also where it is one number."""
    if not isinstance(value, Term):
        return e.full(e.sizes((size,)), value, dtype)
    source = _source(value)
    node = e.term(source, dtype)
    last = source.shape[-1] if source.shape else 1
    node = e.view(node, (last,))
    return node if last == size else e.call(torch.ops.aten.expand.default, node, e.sizes((size,)))
