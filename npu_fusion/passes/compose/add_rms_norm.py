"""A residual addition and the norm of the sum.

::

    %x = add(%x1, %x2)
    %v = mean(pow(%x, 2), [-1], True)        ->     %y, %rstd, %x = npu_add_rms_norm(%x1, %x2, %g, eps)
    %y = mul(mul(%x, rsqrt(add(%v, eps))), %g)

    npu_rms_norm(add(%x1, %x2), %g, eps)     ->     the same

The sum stays available: the operator returns it. The norm is what :func:`..lift.rms_norm.normalized` reads.

Conditions: both addends have the shape of the sum and one dtype, in which the weight is given too (a
bfloat16 model with a float32 weight keeps the smaller ``npu_rms_norm``, which takes both); the norm has the
dtype of the addends, or they are float32. In 16 bits ``accurate``: the operator normalizes the sum before it
is rounded.

Source: torch_npu documentation of npu_add_rms_norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from npu_fusion.passes.lift.dynamic_quant import channel
from npu_fusion.passes.lift.rms_norm import (
    FLOATS,
    MAX_RANK,
    Normalized,
    called,
    normalized,
    vector,
    with_dtype,
)
from npu_fusion.passes.pattern import Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Drift, Term
from npu_fusion.passes.walk import Walk, buildable, dtype_name, narrow, rounded


@dataclass(frozen=True)
class Residual:
    """The norm of a sum, as arguments of the operators that begin with both."""

    x1: Term
    x2: Term
    gamma: Term
    epsilon: float
    sums: tuple[Term, ...]
    """What the operator's sum stands for."""
    drift: tuple[Drift, ...]

    @property
    def inputs(self) -> tuple[Term, ...]:
        return (self.x1, self.x2, self.gamma)

    def arguments(self, e: Emitter) -> tuple[fx.Node, fx.Node, fx.Node]:
        x1, x2 = e.term(self.x1), e.term(self.x2)
        return x1, x2, vector(e, self.gamma, x1.meta["val"].dtype)


def residual(norm: Normalized, context: Context) -> Residual | Refused | None:
    """Recognize the addition under a norm."""
    walk = Walk(context.sizes, norm.drift)
    total = walk.value(norm.x)
    if total.op != "add" or not all(isinstance(t, Term) for t in total.args):
        return None
    x1, x2 = total.args
    if not all(context.sizes.same_shape(t.shape, total.shape) for t in (x1, x2)):
        if any(channel(t, total.shape[-1], context) is not None for t in (x1, x2)):
            return None  # a bias
        shown = f"{list(x1.shape)} and {list(x2.shape)}"
        return Refused("the addends have different shapes", shown, (total,))
    if total.dtype not in FLOATS:
        return None
    dtype = _common(total, norm, context)
    view = context.view
    sums = [total] if dtype == torch.float32 else []
    sums.extend(view.cast(total, d) for d in (LOW_PRECISION if dtype == torch.float32 else (dtype,)))
    held = tuple(t for t in sums if t.nodes)
    if held and all(n in context.rewriter.made for t in held for n in t.nodes):
        return None  # another norm of the same sum already gives it
    if not with_dtype(norm.gamma, dtype):
        shown = f"{dtype_name(norm.gamma.dtype)}, not {dtype_name(dtype)}"
        return Refused("the weight does not have the dtype of the addends", shown, (total, norm.gamma))
    if len(total.shape) > MAX_RANK:
        return Refused("the operator takes at most 8 dimensions", f"{len(total.shape)}", (total,))
    addends = [narrow(t, dtype) or t for t in (x1, x2)]
    if not all(buildable(t) for t in (*addends, norm.gamma)):
        return Refused("no node holds an addend or the weight", "", (total,))
    return Residual(addends[0], addends[1], norm.gamma, norm.epsilon, held, tuple(walk.drift))


def _common(total: Term, norm: Normalized, context: Context) -> torch.dtype:
    """The dtype of both addends; float32 where they differ, or where others read the float32 sum."""
    for dtype in LOW_PRECISION:
        if all(narrow(t, dtype) is not None for t in total.args):
            inside = {*norm.inside, context.view.cast(total, dtype), total}
            users = {
                context.view.of.get(u) for n in total.nodes for u in n.users if u not in context.rewriter.dead
            }
            return dtype if users <= inside else torch.float32
    return torch.float32


class AddRMSNorm(Fusion):
    name = "add_rms_norm"
    operator = "npu_add_rms_norm"
    anchors: ClassVar = ("mul", "rms_norm")
    priority = 30
    stage = "compose"

    def match(self, term: Term, context: Context) -> Match | Refused | None:
        if called(term, "npu_add_rms_norm"):
            return None
        norm = normalized(term.args[0] if term.op == "cast" else term, context)
        if not isinstance(norm, Normalized):
            return None  # reported by rms_norm
        found = residual(norm, context)
        if not isinstance(found, Residual):
            return found
        output = rounded(term, context)
        dtype = found.x1.dtype
        if dtype != torch.float32 and output.dtype != dtype:
            shown = f"{dtype_name(dtype)} in, {dtype_name(output.dtype)} out"
            return Refused("the operator returns the dtype of its inputs", shown, (term,))

        def build(e: Emitter) -> list[fx.Node]:
            call = e.call(torch.ops.npu.npu_add_rms_norm.default, *found.arguments(e), found.epsilon)
            return [e.item(call, 0), e.item(call, 2)]

        return Match(found.inputs, [[output], found.sums], build, found.drift)
