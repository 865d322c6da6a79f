"""SwiGLU of the two halves of one tensor.

::

    %a, %b = chunk(%x, 2, -1)
    %g = silu(%a)                        ->     %y = npu_swiglu(%x, -1)
    %y = mul(%g, %b)

Conditions: both factors are halves of the last dimension of the same tensor, together all of it, one through
silu. ``npu_swiglu`` activates the first half; a model that activates the second keeps its aten form here (but
still composes into ``npu_dequant_swiglu_quant``, which has ``activate_left``). In 16 bits the operator rounds
once where the source rounds after silu and after the product.

Source: torch_npu documentation of npu_swiglu; the spellings are those that real models trace to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import Mod

from npu_fusion.passes.pattern import Constraint, Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Drift, Term
from npu_fusion.passes.walk import Walk, dtype_name, narrow, operands

_OTHER_ACTIVATIONS = ("gelu", "relu", "tanh", "hardswish", "mish", "sigmoid")


@dataclass(frozen=True)
class Gated:
    """``act(half of x) * other half of x`` in float32."""

    x: Term
    """The float32 value that is halved, with the rounding that the source gave it last."""
    left: bool
    """Whether the first half is activated."""
    drift: tuple[Drift, ...]


def gated(term: Term, context: Context) -> Gated | Refused | None:
    """Recognize a SwiGLU whose float32 result (before any rounding) is ``term``."""
    key = (gated, term)
    if key not in context.memo:
        context.memo[key] = _gated(term, context)
    return context.memo[key]


def _gated(term: Term, context: Context) -> Gated | Refused | None:
    if term.op == "swiglu":
        return Gated(term.args[0], term.args[1], term.drift)
    if term.op != "mul" or not isinstance(term.args[1], Term):
        return None
    near: Refused | None = None
    for first, second in operands(term):
        walk = Walk(context.sizes)
        activation, linear = walk.value(first), walk.value(second)
        if activation.op == "silu":
            walk.seen(activation)
            return _halves(walk, walk.value(activation.args[0]), linear, term)
        if activation.op in _OTHER_ACTIVATIONS:
            inner = walk.value(activation.args[0])
            if inner.op == linear.op == "half" and inner.args[0] is linear.args[0]:
                near = Refused(
                    "the activation is not silu", f"{activation.op}(gate) * up", (term, activation)
                )
        factor = _scaled_sigmoid(activation, walk)
        if factor is not None:
            near = Refused(
                "the sigmoid's argument is scaled, which swiglu_mode 0 does not do", f"by {factor:g}", (term,)
            )
    return near


def _scaled_sigmoid(activation: Term, walk: Walk) -> float | None:
    """``c`` for ``x * sigmoid(x * c)``."""
    if activation.op != "mul" or not isinstance(activation.args[1], Term):
        return None
    for x, gate in operands(activation):
        gate = walk.value(gate)
        if gate.op == "sigmoid":
            inner = walk.value(gate.args[0])
            if inner.op == "mul" and isinstance(inner.args[1], float) and inner.args[0] is x:
                return inner.args[1]
    return None


def _halves(walk: Walk, gate: Term, up: Term, term: Term) -> Gated | Refused | None:
    limited = [t for t in (gate, up) if _limited(t, walk)]
    if limited:
        return Refused("gate or up is clamped, which swiglu_mode 0 does not do", "", (term, *limited))
    if gate.op == "half" and up.op == "half":
        gate_base, up_base = walk.rows(gate.args[0]), walk.rows(up.args[0])
        if gate_base is not up_base:
            gate_base, up_base = walk.value(gate_base), walk.value(up_base)
        if gate_base is up_base:
            if gate.args[1] == up.args[1]:
                return Refused("gate and up are the same half", "", (term,))
            return Gated(gate_base, gate.args[1] == 0, tuple(walk.drift))
        return Refused("gate and up are halves of different tensors", "", (term, gate, up))
    gate, up = (t.args[0] if t.op == "cast" and t.args[0].op == "slice" else t for t in (gate, up))
    if {gate.op, up.op} <= {"half", "slice"} and gate.args[0] is up.args[0]:
        return Refused(
            "gate and up are not the two equal halves of the last dimension",
            f"{_extent(gate)} and {_extent(up)} of {list(gate.args[0].shape)}",
            (term,),
        )
    if _same_input(gate, up):
        return Refused(
            "gate and up are two separate matmuls of the same input",
            "npu_fusion.prepare(model) merges their weights once",
            (term,),
        )
    return None


def _limited(term: Term, walk: Walk) -> bool:
    """A clamped value, maybe plus a number."""
    if term.op == "add" and not isinstance(term.args[1], Term):
        term = walk.value(term.args[0])
    return term.op == "clamp"


def _extent(part: Term) -> str:
    if part.op == "half":
        return f"half {part.args[1]}"
    _, dim, start, length, step = part.args
    return f"[{start} : {start + length} : {step}] of dimension {dim}"


_ELEMENTWISE_OR_VIEW = ("cast", "view", "mul", "add", "expand")


def _same_input(gate: Term, up: Term) -> bool:
    first, second = _matmul(gate), _matmul(up)
    return (
        first is not None and second is not None and first is not second and first.args[0] is second.args[0]
    )


def _matmul(term: Term) -> Term | None:
    """The matrix product behind a dequantized or biased value."""
    while term.op in _ELEMENTWISE_OR_VIEW:
        terms = [a for a in term.args if isinstance(a, Term)]
        full = [t for t in terms if len(t.shape) >= 2 and t.shape[-1] == term.shape[-1]]
        if not full:
            return None
        term = full[0]
    return term if term.op in ("int_mm", "mm") else None


def even(context: Context, x: Term) -> Constraint:
    """The last dimension can be halved."""
    return Constraint(
        context.sizes.even(x.shape[-1]),
        "the last dimension is not even",
        f"it is {x.shape[-1]}",
        None if isinstance(x.shape[-1], int) else sympy.Eq(Mod(x.shape[-1], 2), 0),
    )


class SwiGLU(Fusion):
    name = "swiglu"
    operator = "npu_swiglu"
    anchors: ClassVar = ("mul",)
    priority = 40
    stage = "lift"

    def match(self, term: Term, context: Context) -> Match | Refused | None:
        outer = term
        if term.op == "cast":
            term = term.args[0]
        found = gated(term, context)
        if not isinstance(found, Gated):
            return found
        if not found.left:
            return Refused("npu_swiglu activates the first half, the model the second", "", (outer,))
        x, drift = found.x, list(found.drift)
        if outer.dtype in LOW_PRECISION:
            short = narrow(x, outer.dtype)
            if short is None:
                return Refused(
                    "the operator returns the dtype of its input",
                    f"{dtype_name(x.dtype)} in, {dtype_name(outer.dtype)} out",
                    (outer,),
                )
            x = short
        if x.dtype not in (torch.float32, *LOW_PRECISION):
            return Refused("npu_swiglu takes float16, bfloat16 and float32", dtype_name(x.dtype), (outer,))

        def build(e: Emitter) -> list[fx.Node]:
            return [e.call(torch.ops.npu.npu_swiglu.default, e.term(x), -1)]

        return Match([x], [[outer]], build, drift, [even(context, x)])
