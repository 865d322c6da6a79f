"""Symmetric int8 quantization: per token with a scale from the data, or with a given scale.

::

    %m = amax(abs(%x), [-1], True)
    %s = div(%m, 127)                    ->     %y, %s = npu_dynamic_quant(%x)
    %q = round(div(%x, %s))                     %y, %s = npu_dynamic_quant(%x, smooth_scales=%f)   for x * f
    %y = clamp(%q, -128, 127) to int8

Also read: ``max(x.abs()).values``, ``amin``/``amax``/``maximum`` pairs, ``x * (1/s)``, ``x * (127/m)``,
``m * (1/127)``, clamp before round, a lower bound of -127, ``clamp_min(eps)`` or ``where(m == 0, ..)`` as a
guard, scales kept in 16 bits where every reader widens them again.

Conditions: the maximum is over the last dimension only and over the very tensor that is quantized; the
denominator is 127; round half to even; int8. :func:`quantization` recognizes the chain for all fusions that end
in one, also with a given scale (static).

Source: torch_npu documentation of npu_dynamic_quant (scale = amax / 127, a zero row gives 0 and 0).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from npu_fusion.config import Numerics
from npu_fusion.passes.checks import Truth
from npu_fusion.passes.pattern import Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Drift, Term, TermGraph
from npu_fusion.passes.walk import Walk, dtype_name, operands

OPERATOR = "npu.npu_dynamic_quant.default"
_OTHER_ROUNDINGS = ("floor", "ceil", "trunc")


@dataclass(frozen=True)
class Quantized:
    """An int8 quantization of the float32 value ``x``."""

    x: Term
    """What is quantized, in float32, smoothing included."""
    y: Term
    scales: tuple[Term, ...] = ()
    """Dynamic: the terms that hold the scale (guarded or not); a replacement stands for all of them."""
    static_scale: Any = None
    """Static: the given divisor (a term or number), or None for a dynamic scale."""
    static_inverse: bool = False
    """Static: the given scale is multiplied, not divided by."""
    offset: Any = None
    smooth: Term | None = None
    """Smoothing that came as an argument of the operator (it is part of ``x`` as well)."""
    drift: tuple[Drift, ...] = ()

    @property
    def dynamic(self) -> bool:
        return self.static_scale is None


def quantization(term: Term, context: Context) -> Quantized | Refused | None:
    """Recognize the quantization that gives ``term`` (an int8 cast, or a call of npu_dynamic_quant)."""
    key = (quantization, term)
    if key not in context.memo:
        context.memo[key] = _operator(term, context) if term.op == OPERATOR else _chain(term, context)
    return context.memo[key]


def _operator(term: Term, context: Context) -> Quantized | Refused:
    x, smooth, group_index, dst_type, quant_mode, dst_type_max = term.args
    if group_index is not None:
        return Refused(
            "group_index of npu_dynamic_quant is a running sum, the fused operator takes counts", "", (term,)
        )
    if dst_type not in (None, 1, torch.int8):
        return Refused("the quantized type is not int8", f"dst_type={dst_type}", (term,))
    if quant_mode != "pertoken" or dst_type_max != 0:
        return Refused(
            "npu_dynamic_quant is called in another mode",
            f"quant_mode={quant_mode!r}, dst_type_max={dst_type_max}",
            (term,),
        )
    view = context.view
    value = view.cast(x, torch.float32)
    if smooth is not None:
        value = view.make("mul", (value, view.cast(smooth, torch.float32)), torch.float32)
    return Quantized(
        value,
        view.make("get", (term, 0), torch.int8),
        (view.make("get", (term, 1), torch.float32),),
        smooth=smooth,
    )


@dataclass
class _Chain:
    """What stands between the cast to int8 and the division, outermost first."""

    walk: Walk
    low: Any = None
    high: Any = None
    rounded: bool = False
    offset: Any = None
    scales: list[Term] = field(default_factory=list)


def _chain(term: Term, context: Context) -> Quantized | Refused | None:
    if term.op != "cast" or term.dtype not in (torch.int8, torch.uint8):
        return None
    chain = _Chain(Walk(context.sizes))
    inner = _strip(term.args[0], chain)
    if isinstance(inner, Refused) or inner is None:
        return inner
    if term.dtype == torch.uint8:
        return Refused("the quantized type is uint8, the operator's is int8", "", (term,))
    walk = chain.walk
    found = _division(inner, walk)
    if found is None:
        return None
    x, divisor, multiplied = found
    dynamic = _dynamic_scale(x, divisor, multiplied, chain, context)
    if isinstance(dynamic, Refused):
        return dynamic
    if dynamic is not None:
        if chain.offset is not None:
            return Refused("the quantization is asymmetric: a zero point is added", "", (term,))
        if (chain.low, chain.high) not in ((None, None), (-128, 127), (-127, 127)):
            return Refused(
                "the clamp is not to the range of int8", f"[{chain.low}, {chain.high}]", (term,)
            )
        scales = _scale_outputs(dynamic, context)
        if isinstance(scales, Refused):
            return scales
        return Quantized(walk.value(x), term, scales, drift=tuple(walk.drift))
    if (chain.low, chain.high) != (-128, 127):
        return Refused(
            "the clamp is not to the range of int8", f"[{chain.low}, {chain.high}]", (term,)
        )
    return Quantized(
        walk.value(x),
        term,
        static_scale=divisor,
        static_inverse=multiplied,
        offset=chain.offset,
        drift=tuple(walk.drift),
    )


def _strip(term: Any, chain: _Chain) -> Term | Refused | None:
    """Through clamp, round and an added zero point down to the division."""
    walk = chain.walk
    while True:
        term = walk.value(term)
        if not isinstance(term, Term):
            return None
        if term.op == "clamp":
            _, low, high = term.args
            chain.low = low if chain.low is None else chain.low
            chain.high = high if chain.high is None else chain.high
        elif term.op == "round" and not chain.rounded and len(term.args) == 1:
            chain.rounded = True
        elif term.op in _OTHER_ROUNDINGS:
            return Refused(f"rounds by {term.op}, the operator to the nearest, half to even", "", (term,))
        elif term.op == "add" and chain.offset is None and (chain.low is not None or chain.rounded):
            base, offset = term.args
            if isinstance(offset, Term) and offset.op in ("div", "mul", "round"):
                base, offset = offset, base
            chain.offset = offset
            if not chain.rounded:
                if offset == 0.5:
                    return Refused("rounds half up, the operator half to even", "", (term,))
            else:
                return Refused("the offset is added before rounding in another order", "", (term,))
            term = base
            continue
        else:
            break
        term = term.args[0]
    if not chain.rounded:
        if chain.low is None:
            return None
        return Refused("nothing is rounded before the cast to int8, which truncates", "", (term,))
    return term


def _division(term: Term, walk: Walk) -> tuple[Term, Any, bool] | None:
    """(x, scale, False) for ``x / scale``; (x, factor, True) for ``x * factor``."""
    if term.op == "div" and isinstance(term.args[0], Term):
        return term.args[0], term.args[1], False
    if term.op != "mul":
        return None
    if not isinstance(term.args[1], Term):
        inner = walk.value(term.args[0])
        if term.args[1] == 127 and inner.op == "div":  # x / amax * 127
            walk.note(Numerics.ACCURATE, "x / amax * 127 is computed as x / (amax / 127)")
            return inner.args[0], _Maximum(inner.args[1]), False
        return term.args[0], term.args[1], True
    for x, factor in operands(term):
        inverse = walk.value(_unexpanded(factor))
        if inverse.op == "reciprocal":
            walk.note(Numerics.ACCURATE, "x * (1 / scale) is computed as x / scale")
            return x, inverse.args[0], False
        if inverse.op == "div" and inverse.args[0] == 127:
            walk.note(Numerics.ACCURATE, "x * (127 / amax) is computed as x / (amax / 127)")
            return x, _Maximum(inverse.args[1]), False
        if inverse.op == "mul" and inverse.args[1] == 127:
            reciprocal = walk.value(inverse.args[0])
            if reciprocal.op == "reciprocal":
                walk.note(Numerics.ACCURATE, "x * (1 / amax * 127) is computed as x / (amax / 127)")
                return x, _Maximum(reciprocal.args[0]), False
    first, second = term.args
    if len(_unexpanded(first).shape) < len(second.shape) or first.shape[-1:] == (1,):
        first, second = second, first
    return first, second, True


@dataclass(frozen=True)
class _Maximum:
    """Stands where a scale is expected and the row maximum itself is meant."""

    term: Term


def _unexpanded(term: Term) -> Term:
    while term.op == "expand":
        term = term.args[0]
    return term


@dataclass
class _Dynamic:
    scales: list[Term]


def _dynamic_scale(
    x: Term, divisor: Any, multiplied: bool, chain: _Chain, context: Context
) -> _Dynamic | Refused | None:
    """Follow the divisor to ``amax(abs(x)) / 127``. None: it does not come from a maximum (static)."""
    walk = Walk(context.sizes)
    direct = isinstance(divisor, _Maximum)
    term = divisor.term if isinstance(divisor, _Maximum) else divisor
    if not isinstance(term, Term):
        return None
    operand = _unexpanded(term)
    scales: list[Term] = []
    denominator: float | None = 127.0 if direct else None
    while True:
        if denominator is None:
            scales.append(term)
        term = _unexpanded(term)
        guarded = _without_guard(term, walk)
        if guarded is not None:
            term = guarded
            continue
        if term.op == "view":
            term = term.args[0]
            continue
        if term.op == "cast" and term.args[0].dtype in (torch.float32, *LOW_PRECISION):
            inner = term.args[0]
            if term.dtype in LOW_PRECISION:
                walk.note(Numerics.ACCURATE, f"the scale is not rounded to {dtype_name(term.dtype)}")
            term = inner
            continue
        if denominator is None and term.op in ("div", "mul") and isinstance(term.args[1], (int, float)):
            denominator = _denominator(term, walk)
            term = term.args[0]
            continue
        break
    if term.op in ("amax", "amin", "sub", "neg", "maximum") and denominator is not None:
        return Refused("the quantization is asymmetric: the scale does not come from amax(abs(x))", "", (term,))
    if term.op == "add" and denominator is None and isinstance(term.args[1], float):
        if 0 < term.args[1] < 1e-3:
            return Refused("eps is added to the scale, which changes every value", f"{term.args[1]}", (term,))
    if term.op != "absmax":
        return None
    source, dims = term.args
    if multiplied:
        return Refused("the values are multiplied by their scale", "", (term,))
    if denominator != 127.0:
        given = "1" if denominator is None else f"{denominator:g}"
        return Refused("the scale is not amax(abs(x)) / 127", f"the denominator is {given}", (term,))
    rank = len(source.shape)
    if dims != (rank - 1,):
        where = "the whole tensor" if len(dims) == rank else f"dimension {', '.join(map(str, dims))}"
        return Refused("the scale is not per token: the maximum is not over the last dimension", where, (term,))
    if walk.value(source) is not chain.walk.value(x):
        return Refused("the scale comes from another tensor than the one quantized", "", (term,))
    aligned = (*x.shape[:-1], 1)
    if not context.sizes.same_shape(operand.shape, aligned):
        shown = f"{list(operand.shape)} for {list(x.shape)}"
        return Refused("the scale is not applied per token", shown, (term,))
    chain.walk.drift.extend(walk.drift)
    return _Dynamic(scales)


def _denominator(term: Term, walk: Walk) -> float:
    number = float(term.args[1])
    if term.op == "div":
        return number
    if number != 0 and abs(number * 127 - 1) < 1e-6:
        walk.note(Numerics.ACCURATE, "amax * (1 / 127) is computed as amax / 127")
        return 127.0
    return 1 / number if number else 0.0


def _without_guard(term: Term, walk: Walk) -> Term | None:
    """The value behind ``clamp_min(eps)`` or ``where(value == 0, c, value)``; a zero row then gives scale 0."""
    if term.op == "clamp":
        value, low, high = term.args
        if high is None and isinstance(low, (int, float)) and 0 <= low <= 1e-2:
            walk.note(Numerics.ACCURATE, f"the scale has no lower bound of {low:g}")
            return value
    if term.op == "where":
        condition, a, b = term.args
        if condition.op == "eq" and condition.args[1] == 0 and isinstance(b, Term) and not isinstance(a, Term):
            if walk.value(condition.args[0]) is walk.value(b) or _same_zero(condition.args[0], b):
                walk.note(Numerics.ACCURATE, f"the scale of a zero row is 0, not {a:g}")
                return b
    return None


def _same_zero(tested: Term, value: Term) -> bool:
    """Is ``value`` zero exactly where ``tested`` is: one is the other over or times a number?"""
    while value.op in ("div", "mul") and isinstance(value.args[1], (int, float)):
        value = value.args[0]
        if value is tested:
            return True
    return False


def _scale_outputs(dynamic: _Dynamic, context: Context) -> tuple[Term, ...] | Refused:
    """The float32 terms that a fused scale may stand for.

    A scale that was rounded to 16 bits cannot be replaced by a rounded fused scale: the values would have been
    divided by the one and be multiplied by the other. It can be replaced where it is widened again.
    """
    outputs: list[Term] = []
    for term in dynamic.scales:
        if term.dtype == torch.float32:
            outputs.append(term)
        else:
            outputs.extend(_widened(term, context.view))
    return tuple(dict.fromkeys(t for t in outputs if t.nodes))


def _widened(term: Term, view: TermGraph) -> list[Term]:
    """The float32 terms made of a 16-bit one by a cast, through views."""
    found: list[Term] = []
    pending = list(term.nodes)
    while pending:
        for user in pending.pop().users:
            held = view.of.get(user)
            if not isinstance(held, Term):
                continue
            if held.dtype == torch.float32 and held.op == "cast":
                found.append(held)
            elif held.op in ("view", "expand"):
                pending.append(user)
    return found


def channel(term: Any, size: Any, context: Context) -> Term | None:
    """The 1-D tensor behind a factor that broadcasts along the last dimension only, of that size."""
    if not isinstance(term, Term):
        return None
    shape = _unexpanded(term).shape
    if not shape or any(s != 1 for s in shape[:-1]) or context.sizes.equal(shape[-1], size) is not Truth.YES:
        return None
    term = _unexpanded(term)
    if term.op == "view" and len(term.args[0].shape) == 1:
        term = term.args[0]
    return term


class DynamicQuant(Fusion):
    name = "dynamic_quant"
    operator = "npu_dynamic_quant"
    anchors: ClassVar = ("cast",)
    priority = 50
    stage = "lift"

    def match(self, term: Term, context: Context) -> Match | Refused | None:
        found = quantization(term, context)
        if not isinstance(found, Quantized):
            return found
        if not found.dynamic:
            return None
        x, smooth = _smoothed(found.x, context)
        if context.config.target is not None and x.dtype not in LOW_PRECISION:
            return Refused("npu_dynamic_quant takes float16 and bfloat16", dtype_name(x.dtype), (term,))

        def build(e: Emitter) -> list[fx.Node]:
            node = e.term(x)
            scales = {} if smooth is None else {"smooth_scales": _vector(e, smooth, node.meta["val"].dtype)}
            call = e.call(torch.ops.npu.npu_dynamic_quant.default, node, **scales)
            return [e.item(call, 0), e.item(call, 1)]

        return Match([x, smooth], [[found.y], found.scales], build, found.drift)


def _smoothed(x: Term, context: Context) -> tuple[Term, Term | None]:
    """``x`` as input and smooth_scales, both in the dtype that they have in the graph.

    The operator takes one dtype for both; a float32 factor on 16-bit values stays a product outside.
    """
    if x.op == "cast" and x.args[0].dtype in LOW_PRECISION:
        return x.args[0], None
    if x.op == "mul" and isinstance(x.args[1], Term):
        for value, factor in operands(x):
            smooth = channel(factor, x.shape[-1], context)
            if smooth is None or len(value.shape) < 2:
                continue
            narrow = [t.args[0] if t.op == "cast" else t for t in (value, smooth)]
            if narrow[0].dtype == narrow[1].dtype and all(t.nodes for t in narrow):
                return narrow[0], narrow[1]
            if value.nodes and smooth.nodes:
                return value, smooth
    return x, None


def _vector(e: Emitter, term: Term, dtype: torch.dtype) -> fx.Node:
    node = e.term(term, dtype)
    return e.view(node, (term.shape[-1],))
