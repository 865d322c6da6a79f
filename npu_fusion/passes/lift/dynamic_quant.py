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
denominator is 127; round half to even; int8. :func:`quantization` recognizes the chain for all fusions that
end in one, also with a given scale (static).

Source: torch_npu documentation of npu_dynamic_quant (scale = amax / 127, a zero row gives 0 and 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from npu_fusion.config import Numerics
from npu_fusion.passes.checks import Truth
from npu_fusion.passes.pattern import Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Drift, Term, TermGraph
from npu_fusion.passes.walk import Walk, buildable, dtype_name, operands, unexpanded

OPERATOR = "npu.npu_dynamic_quant.default"
_OTHER_ROUNDINGS = ("floor", "ceil", "trunc")
_FLOATS = (torch.float32, *LOW_PRECISION)


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


@dataclass(frozen=True)
class Rounded:
    """``clamp(round(value [+ offset]), low, high)`` as int8."""

    value: Term
    """What is rounded, without the offset."""
    offset: Any
    low: Any
    high: Any
    drift: tuple[Drift, ...]

    @property
    def full_range(self) -> bool:
        return (self.low, self.high) == (-128, 127)


@dataclass
class _Chain:
    """What stands between the cast to int8 and the division, outermost first."""

    walk: Walk
    low: Any = None
    high: Any = None
    rounded: bool = False
    offset: Any = None


def rounded_to_int8(term: Term, context: Context) -> Rounded | Refused | None:
    """Recognize what is rounded half to even, clamped and cast to int8 by ``term``, whatever it is."""
    if term.op != "cast" or term.dtype not in (torch.int8, torch.uint8):
        return None
    chain = _Chain(Walk(context.sizes))
    inner = _strip(term, chain)
    if isinstance(inner, Refused) or inner is None:
        return inner
    if term.dtype == torch.uint8:
        return Refused("the quantized type is uint8, the operator's is int8", "", (term,))
    return Rounded(inner, chain.offset, chain.low, chain.high, tuple(chain.walk.drift))


def _chain(term: Term, context: Context) -> Quantized | Refused | None:
    rounded = rounded_to_int8(term, context)
    if not isinstance(rounded, Rounded):
        return rounded
    walk = Walk(context.sizes, rounded.drift)
    found = _division(rounded.value, walk)
    if found is None:
        return None
    x, divisor = found.x, found.divisor
    if x.dtype != torch.float32:
        return Refused("the values are not float32 or 16-bit floats", dtype_name(x.dtype), (term,))
    maximum = _row_maximum(found, walk, context)
    if isinstance(maximum, Refused):
        return maximum
    bounds = (rounded.low, rounded.high)
    range_refused = Refused(
        "the clamp is not to the range of int8", f"[{rounded.low}, {rounded.high}]", (term,)
    )
    if maximum is not None:
        if rounded.offset is not None:
            return Refused("the quantization is asymmetric: a zero point is added", "", (term,))
        if bounds not in ((None, None), (-128, 127), (-127, 127)):
            return range_refused
        return Quantized(
            maximum.x, term, _scales(maximum.maximum, walk, context.view), drift=tuple(walk.drift)
        )
    if isinstance(divisor, _Maximum):
        return None  # a quotient times 127, but of no maximum
    if not rounded.full_range:
        return range_refused
    return Quantized(
        walk.rows(x),
        term,
        static_scale=context.view.held(divisor),
        static_inverse=found.multiplied,
        offset=context.view.held(rounded.offset),
        drift=tuple(walk.drift),
    )


def _strip(term: Term, chain: _Chain) -> Term | Refused | None:
    """Through clamp, round and an added zero point down to the division."""
    walk = chain.walk
    cast, inner = term, walk.unwrapped(term.args[0])
    clamped = False
    while True:
        if inner.op == "clamp":
            if chain.offset is not None:
                return Refused("the values are clamped before the zero point is added", "", (cast,))
            _, low, high = inner.args
            if any(isinstance(bound, Term) for bound in (low, high)):
                return Refused("the clamp is not to the range of int8", "its bounds are tensors", (cast,))
            chain.low = _tighter(max, chain.low, low)
            chain.high = _tighter(min, chain.high, high)
            clamped = True
        elif inner.op == "round" and not chain.rounded and len(inner.args) == 1:
            if chain.offset is not None:
                return Refused(
                    "the zero point is added after rounding, the operator adds it before", "", (cast,)
                )
            chain.rounded = True
        elif inner.op in _OTHER_ROUNDINGS:
            return Refused(f"rounds by {inner.op}, the operator to the nearest, half to even", "", (cast,))
        elif inner.op == "add" and chain.offset is None and (clamped or chain.rounded):
            base, chain.offset = inner.args
            if isinstance(chain.offset, Term) and walk.value(chain.offset).op in ("div", "mul", "round"):
                base, chain.offset = _quotient_first(base, chain.offset, walk)
            inner = walk.value(base)
            continue
        else:
            break
        inner = walk.value(inner.args[0])
    if not chain.rounded:
        if not clamped:
            return None
        return Refused("the values are not rounded half to even before the cast to int8", "", (cast,))
    return inner


def _tighter(choose: Any, outer: Any, inner: Any) -> Any:
    """The narrower of two bounds, None being open."""
    if outer is None or inner is None:
        return inner if outer is None else outer
    return choose(outer, inner)


def _quotient_first(a: Term, b: Term, walk: Walk) -> tuple[Term, Term]:
    """Of a sum's operands, the scaled values (the one of full shape) and the zero point."""

    def extent(term: Term) -> tuple[int, int]:
        shape = unexpanded(term).shape
        return sum(size != 1 for size in shape), len(shape)

    return (a, b) if extent(a) >= extent(b) else (b, a)


@dataclass(frozen=True)
class _Division:
    """``x / divisor``, or ``x * divisor``."""

    x: Term
    divisor: Any
    applied: Any
    """The operand that stands beside ``x``: the divisor, or what is computed of it."""
    multiplied: bool = False


def _division(term: Term, walk: Walk) -> _Division | None:
    if term.op == "div" and isinstance(term.args[0], Term):
        x, divisor = term.args
        step = Walk(walk.sizes)
        inner = step.value(x)
        if isinstance(divisor, Term) and inner.op == "mul" and inner.args[1] == 127:
            walk.took(step, "x * 127 / amax is computed as x / (amax / 127)")
            return _Division(inner.args[0], _Maximum(divisor), divisor)
        return _Division(x, divisor, divisor)
    if term.op != "mul":
        return None
    if not isinstance(term.args[1], Term):
        step = Walk(walk.sizes)
        inner = step.value(term.args[0])
        if term.args[1] == 127 and inner.op == "div":
            walk.took(step, "x / amax * 127 is computed as x / (amax / 127)")
            return _Division(inner.args[0], _Maximum(inner.args[1]), inner.args[1])
        return _Division(term.args[0], term.args[1], term.args[1], True)
    for x, factor in operands(term):
        step = Walk(walk.sizes)
        inverse = _behind_views(factor, step)
        if inverse.op == "reciprocal":
            walk.took(step, "x * (1 / scale) is computed as x / scale")
            return _Division(x, inverse.args[0], factor)
        if inverse.op == "div" and inverse.args[0] == 127:
            walk.took(step, "x * (127 / amax) is computed as x / (amax / 127)")
            return _Division(x, _Maximum(inverse.args[1]), factor)
        if inverse.op == "mul" and inverse.args[1] == 127:
            reciprocal = _behind_views(inverse.args[0], step)
            if reciprocal.op == "reciprocal":
                walk.took(step, "x * (1 / amax * 127) is computed as x / (amax / 127)")
                return _Division(x, _Maximum(reciprocal.args[0]), factor)
    first, second = term.args
    if len(unexpanded(first).shape) < len(second.shape) or first.shape[-1:] == (1,):
        first, second = second, first
    return _Division(first, second, second, True)


def _behind_views(term: Term, walk: Walk) -> Term:
    """What a small factor is made of; where it is applied is checked on the factor as it stands."""
    while True:
        inner = walk.value(unexpanded(term))
        if inner.op != "view":
            return inner
        term = inner.args[0]


@dataclass(frozen=True)
class _Maximum:
    """Stands where a scale is expected and the row maximum itself is meant."""

    term: Any


@dataclass(frozen=True)
class _RowMaximum:
    x: Term
    """What is quantized and what the maximum is of."""
    maximum: Term


def _row_maximum(division: _Division, outer: Walk, context: Context) -> _RowMaximum | Refused | None:
    """Follow the divisor to ``amax(abs(x)) / 127``. None: it does not come from a maximum (static)."""
    walk = Walk(context.sizes)
    x = division.x
    denominator: float | None = None
    term = division.divisor
    if isinstance(term, _Maximum):
        denominator, term = 127.0, term.term
    if not isinstance(term, Term):
        return None
    while True:
        inner, number = _scale_step(term, walk)
        if inner is None:
            break
        term = inner
        if number is not None:
            if denominator is not None:
                walk.note(Numerics.ACCURATE, "the scale is divided by one number, not by two")
            denominator = number * (1.0 if denominator is None else denominator)
    if term.op in ("amax", "amin", "sub", "neg", "maximum") and denominator is not None:
        return Refused(
            "the quantization is asymmetric: the scale does not come from amax(abs(x))", "", (term,)
        )
    if term.op == "add" and isinstance(term.args[1], float) and _comes_from_maximum(term.args[0], walk):
        return Refused("eps is added to the scale, which changes every value", f"{term.args[1]:g}", (term,))
    if term.op != "absmax":
        return None
    source, dims = term.args
    if division.multiplied:
        return Refused("the values are multiplied by their scale", "", (term,))
    if denominator != 127.0:
        given = "1" if denominator is None else f"{denominator:g}"
        return Refused("the scale is not amax(abs(x)) / 127", f"the denominator is {given}", (term,))
    rank = len(source.shape)
    if dims != (rank - 1,):
        where = "the whole tensor" if len(dims) == rank else f"dimension {', '.join(map(str, dims))}"
        return Refused(
            "the scale is not per token: the maximum is not over the last dimension", where, (term,)
        )
    same = walk.rows(x)
    if walk.rows(source) is not same:
        same = outer.value(x)
        if walk.value(source) is not same:
            return Refused("the scale comes from another tensor than the one quantized", "", (term,))
    operand = unexpanded(division.applied)
    if not context.sizes.same_shape(operand.shape, (*x.shape[:-1], 1)):
        shown = f"{list(operand.shape)} for {list(x.shape)}"
        return Refused("the scale is not applied per token", shown, (term,))
    outer.drift.extend(walk.drift)
    return _RowMaximum(same, term)


def _comes_from_maximum(term: Term | None, walk: Walk) -> bool:
    while term is not None:
        if term.op == "absmax":
            return True
        term = _scale_step(term, walk)[0]
    return False


def _scale_step(term: Term, walk: Walk) -> tuple[Term | None, float | None]:
    """One step from a scale towards the maximum: (what is behind a guard, view or cast, None), or (what is
    divided by a number, that number); (None, None) where there is no such step."""
    if term.op in ("view", "expand"):
        return term.args[0], None
    if term.op == "cast" and term.dtype in _FLOATS and term.args[0].dtype in _FLOATS:
        if term.dtype in LOW_PRECISION:
            walk.note(Numerics.ACCURATE, f"the scale is not rounded to {dtype_name(term.dtype)}")
        return term.args[0], None
    guarded = _without_guard(term, walk)
    if guarded is not None:
        return guarded, None
    if (
        term.op in ("div", "mul")
        and isinstance(term.args[1], (int, float))
        and isinstance(term.args[0], Term)
    ):
        return term.args[0], _denominator(term, walk)
    return None, None


def _denominator(term: Term, walk: Walk) -> float:
    number = float(term.args[1])
    if term.op == "div":
        return number
    if number != 0 and abs(number * 127 - 1) < 1e-6:
        walk.note(Numerics.ACCURATE, "amax * (1 / 127) is computed as amax / 127")
        return 127.0
    return 1 / number if number else 0.0


def _without_guard(term: Term, walk: Walk) -> Term | None:
    """The value behind ``clamp_min(eps)`` or ``where(value == 0, c, value)``; a zero row then has scale 0."""
    if term.op == "clamp":
        value, low, high = term.args
        if high is None and isinstance(low, (int, float)) and 0 <= low <= 1e-2:
            walk.note(Numerics.ACCURATE, f"the scale has no lower bound of {low:g}")
            return value
    if term.op == "where":
        condition, a, b = term.args
        if (
            condition.op == "eq"
            and condition.args[1] == 0
            and isinstance(b, Term)
            and not isinstance(a, Term)
            and (walk.value(condition.args[0]) is walk.value(b) or _same_zero(condition.args[0], b))
        ):
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


def _scales(maximum: Term, walk: Walk, view: TermGraph) -> tuple[Term, ...]:
    """The float32 values that are ``maximum`` over 127, guarded or not, used to quantize or beside it.

    A scale that was rounded to 16 bits cannot be replaced by a rounded fused scale: the values would have
    been divided by the one and be multiplied by the other. It can be replaced where it is widened again.
    """
    found: dict[Term, None] = {}
    seen: set[tuple[Term, bool]] = set()
    pending = [(maximum, False)]
    while pending:
        term, divided = pending.pop()
        for user in view.users(term):
            step = Walk(walk.sizes)
            inner, number = _scale_step(user, step)
            if inner is not term or (number is not None and (divided or number != 127.0)):
                continue
            state = (user, divided or number is not None)
            if state in seen:
                continue
            seen.add(state)
            walk.drift.extend(step.drift)
            pending.append(state)
            if state[1] and user.dtype == torch.float32 and user.nodes and user.op not in ("view", "expand"):
                found[user] = None
    return tuple(found)


def channel(term: Any, size: Any, context: Context) -> Term | None:
    """The 1-D tensor behind a factor that broadcasts along the last dimension only, of that size."""
    if not isinstance(term, Term):
        return None
    shape = unexpanded(term).shape
    if not shape or any(s != 1 for s in shape[:-1]) or context.sizes.equal(shape[-1], size) is not Truth.YES:
        return None
    term = unexpanded(term)
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
        plain = _match(term, found, _narrowed(found.x), None, context)
        smoothed = _smoothed(found.x, context)
        if smoothed is None or isinstance(plain, Refused):
            return plain if smoothed is None else _match(term, found, *smoothed, context)
        match = _match(term, found, *smoothed, context)
        if isinstance(match, Match):
            match.otherwise = plain
        return match


def _match(term: Term, found: Quantized, x: Term, smooth: Term | None, context: Context) -> Match | Refused:
    if len(x.shape) < 2:
        return Refused("the operator takes two or more dimensions", f"{len(x.shape)}", (term,))
    if not buildable(x):
        return Refused("no node holds the value that is quantized", "", (term,))
    if context.config.target is not None and x.dtype not in LOW_PRECISION:
        return Refused("npu_dynamic_quant takes float16 and bfloat16", dtype_name(x.dtype), (term,))

    def build(e: Emitter) -> list[fx.Node]:
        node = e.term(x)
        scales = {} if smooth is None else {"smooth_scales": _vector(e, smooth, node.meta["val"].dtype)}
        call = e.call(torch.ops.npu.npu_dynamic_quant.default, node, **scales)
        return [e.item(call, 0), e.item(call, 1)]

    return Match([x, smooth], [[found.y], found.scales], build, found.drift)


def _narrowed(x: Term) -> Term:
    """The 16-bit tensor that a float32 value was widened from, or the value."""
    return x.args[0] if x.op == "cast" and x.args[0].dtype in LOW_PRECISION else x


def _smoothed(x: Term, context: Context) -> tuple[Term, Term] | None:
    """``x`` as input and smooth_scales, both in the dtype that they have in the graph.

    The operator takes one dtype for both; a float32 factor on 16-bit values stays a product outside.
    """
    if x.op != "mul" or not isinstance(x.args[1], Term):
        return None
    for value, factor in operands(x):
        smooth = channel(factor, x.shape[-1], context)
        if smooth is None or len(value.shape) < 2:
            continue
        narrow = (_narrowed(value), _narrowed(smooth))
        if narrow[0].dtype == narrow[1].dtype and all(t.nodes for t in narrow):
            return narrow
        if value.nodes and smooth.nodes:
            return value, smooth
    return None


def _vector(e: Emitter, term: Term, dtype: torch.dtype) -> fx.Node:
    node = e.term(term, dtype)
    return e.view(node, (term.shape[-1],))
