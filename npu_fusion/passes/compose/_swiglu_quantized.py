"""SwiGLU followed by a quantization to int8: what the fusions that end in both recognize first."""

from __future__ import annotations

from dataclasses import dataclass

from npu_fusion.passes.lift.dynamic_quant import Quantized, channel, quantization
from npu_fusion.passes.lift.quantize import given_scale
from npu_fusion.passes.lift.swiglu import Gated, gated
from npu_fusion.passes.pattern import Context, Refused
from npu_fusion.passes.terms import Term
from npu_fusion.passes.walk import Walk, operands


@dataclass(frozen=True)
class Activated:
    """``quantize(swiglu(x) [* smooth])``, dynamic or static."""

    quantized: Quantized
    glu: Gated
    smooth: Term | None
    """A factor per channel between the two."""
    walk: Walk
    """With the drift of everything stepped over so far."""


def activated(term: Term, context: Context) -> Activated | Refused | None:
    """Recognize the SwiGLU and quantization that give ``term`` (an int8 cast, or the call of an operator)."""
    quantized = _quantized(term, context)
    if quantized is None:
        return None
    if isinstance(quantized, Refused):
        return quantized if swiglu_inside(term, context) else None
    walk = Walk(context.sizes, quantized.drift)
    value, smooth = _smoothing(quantized.x, walk, context)
    glu = gated(value, context)
    if not isinstance(glu, Gated):
        return glu
    walk.drift.extend(glu.drift)
    return Activated(quantized, glu, smooth, walk)


def _quantized(term: Term, context: Context) -> Quantized | Refused | None:
    if term.op == "npu.npu_quantize.default":
        return given_scale(term, context)
    return quantization(term, context)


def _smoothing(x: Term, walk: Walk, context: Context) -> tuple[Term, Term | None]:
    """``x`` without a factor per channel on top of the SwiGLU, and that factor."""
    x = walk.value(x)
    if x.op == "mul" and isinstance(x.args[1], Term) and gated(x, context) is None:
        for value, factor in operands(x):
            smooth = channel(factor, x.shape[-1], context)
            if smooth is not None:
                return walk.value(value), smooth
    return x, None


def swiglu_inside(term: Term, context: Context) -> bool:
    """Does a refused quantization quantize a SwiGLU? (Otherwise the refusal is not this fusion's.)"""
    pending: list[Term] = [term]
    seen: set[Term] = set()
    while pending and len(seen) < 40:
        found = pending.pop()
        if found in seen:
            continue
        seen.add(found)
        if isinstance(gated(found, context), Gated):
            return True
        if found.op not in ("int_mm", "mm", "bmm", "input"):
            pending.extend(a for a in found.args if isinstance(a, Term))
    return False
