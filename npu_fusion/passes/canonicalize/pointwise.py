"""Elementwise arithmetic: float32 inside, one rounding outside, and one spelling each.

::

    mul(a, b): bf16                              ->  cast(mul(cast(a, f32), cast(b, f32)), bf16)
    x * sigmoid(x) · x / (1 + exp(-x)) · silu(x) ->  silu(x)
    clamp_min + clamp_max · maximum + minimum    ->  clamp(x, lo, hi)
    pow(x, 2) · square(x)                        ->  mul(x, x)
    x * 1 · x + 0 · x / 1                        ->  x

An integer operand of a floating result is cast first, as type promotion does. Numbers stand last. Operands of
commutative operators are ordered, so that ``a * b`` and ``b * a`` are one term. Dropping ``+ 0`` ignores the
sign of a zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from npu_fusion.config import Numerics
from npu_fusion.passes.terms import (
    LOW_PRECISION,
    Drift,
    Size,
    Term,
    TermGraph,
    broadcast,
    pointwise,
    rule,
    sizes_of,
)

aten = torch.ops.aten

_UNARY = {
    "neg": (aten.neg.default,),
    "exp": (aten.exp.default,),
    "abs": (aten.abs.default,),
    "round": (aten.round.default, aten.round.decimals),
    "floor": (aten.floor.default,),
    "ceil": (aten.ceil.default,),
    "trunc": (aten.trunc.default,),
    "rsqrt": (aten.rsqrt.default,),
    "sqrt": (aten.sqrt.default,),
    "reciprocal": (aten.reciprocal.default,),
    "sigmoid": (aten.sigmoid.default,),
    "silu": (aten.silu.default,),
    "tanh": (aten.tanh.default,),
    "relu": (aten.relu.default,),
    "gelu": (aten.gelu.default,),
    "hardswish": (aten.hardswish.default,),
    "mish": (aten.mish.default,),
    "erf": (aten.erf.default,),
    "cos": (aten.cos.default,),
    "sin": (aten.sin.default,),
}

pointwise(
    "add", "sub", "mul", "div", "maximum", "minimum", "clamp", "where", "eq", "ne", "pow", *_UNARY
)  # fmt: skip


def _compute_dtype(result: torch.dtype) -> torch.dtype:
    return torch.float32 if result in LOW_PRECISION else result


def _operand(view: TermGraph, arg: Any, dtype: torch.dtype) -> Any:
    """An operand in the dtype of the computation; a constant tensor is its number."""
    if isinstance(arg, Term):
        if arg.op == "const":
            return arg.args[0]
        return view.cast(arg, dtype)
    return arg


_WIDE_INTEGERS = (torch.int16, torch.int32, torch.int64)


_SILU_WRITTEN_OUT = "silu in one operator rather than exp, add and div: last bit of float32"


def _grown_by_constant(node: fx.Node, *operands: Any) -> bool:
    """Is the result larger than its operands because of a constant's shape, which a number would not have?"""
    terms = [t for t in operands if isinstance(t, Term)]
    if not any(t.op == "const" and t.args[1] for t in terms):
        return False
    shape: tuple[Size, ...] = ()
    for t in terms:
        if t.op != "const":
            shape = broadcast(shape, t.shape)
    return shape != sizes_of(node.meta["val"].shape)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def rounding_removed(term: Any) -> tuple[Any, tuple[Drift, ...]]:
    """``cast(cast(t, bf16), f32)`` -> ``t`` and the drift of leaving the rounding out; else the term."""
    if isinstance(term, Term) and term.op == "cast" and isinstance(term.args[0], Term):
        inner = term.args[0]
        if inner.op == "cast" and inner.dtype in LOW_PRECISION and inner.args[0].dtype == term.dtype:
            what = f"{inner.args[0].op} is not rounded to {str(inner.dtype).removeprefix('torch.')}"
            return inner.args[0], (Drift(Numerics.ACCURATE, what),)
    return term, ()


for _name, _targets in _UNARY.items():

    def _unary(view: TermGraph, node: fx.Node, args: list[Any], _name: str = _name) -> Any:
        if not isinstance(args[0], Term):
            return NotImplemented
        result = node.meta["val"].dtype
        compute = _compute_dtype(result)
        x = view.cast(args[0], compute)
        return view.cast(unary(view, _name, x, tuple(args[1:])), result)

    rule(*_targets)(_unary)


def unary(view: TermGraph, name: str, x: Term, rest: tuple[Any, ...] = ()) -> Term:
    if name == "reciprocal":
        denominator = _one_plus_exp_neg(x)
        if denominator is not None:
            inner, drift = denominator
            return view.make("sigmoid", (inner,), x.dtype, drift)
    return view.make(name, (x, *rest), x.dtype)


def _one_plus_exp_neg(term: Term) -> tuple[Term, tuple[Drift, ...]] | None:
    """``1 + exp(-t)`` -> ``t`` and the drift of leaving roundings in between out."""
    total, drift = rounding_removed(term)
    if total.op == "add" and total.args[1] == 1:
        power, more = rounding_removed(total.args[0])
        if power.op == "exp" and power.args[0].op == "neg":
            return power.args[0].args[0], drift + more
    return None


def _result(view: TermGraph, node: fx.Node, name: str, a: Any, b: Any) -> Any:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or _grown_by_constant(node, a, b):
        return NotImplemented
    result = value.dtype
    compute = _compute_dtype(result)
    a, b = (_operand(view, _promoted(view, arg, result), compute) for arg in (a, b))
    return view.cast(binary(view, name, a, b, compute), result)


def _promoted(view: TermGraph, arg: Any, result: torch.dtype) -> Any:
    """An integer operand of a 16-bit floating result is rounded to it before anything is computed."""
    if (
        isinstance(arg, Term)
        and arg.op != "const"
        and result in LOW_PRECISION
        and arg.dtype in _WIDE_INTEGERS
    ):
        return view.cast(arg, result)
    return arg


def binary(view: TermGraph, name: str, a: Any, b: Any, dtype: torch.dtype) -> Any:
    """The canonical ``name(a, b)`` of two operands (terms or numbers) in ``dtype``."""
    if name in ("add", "mul", "maximum", "minimum"):
        if not isinstance(a, Term):
            a, b = b, a
        if isinstance(b, Term) and isinstance(a, Term) and b.serial < a.serial:
            a, b = b, a
    if not isinstance(a, Term) and not isinstance(b, Term):
        return NotImplemented
    if not isinstance(b, Term) and not _is_number(b):
        return view.make(name, (a, b), dtype)
    if (name in ("mul", "div") and b == 1) or (name in ("add", "sub") and b == 0):
        return a
    if name == "sub" and _is_number(b):
        return binary(view, "add", a, -b, dtype)
    if name == "maximum" and _is_number(b):
        return clamp(view, a, b, None)
    if name == "minimum" and _is_number(b):
        return clamp(view, a, None, b)
    if name == "maximum" and isinstance(b, Term):
        largest = _absolute_maximum(view, a, b)
        if largest is not None:
            return largest
    if name == "mul" and isinstance(b, Term):
        gated = _silu_from_sigmoid(view, a, b)
        if gated is not None:
            return gated
    if name == "div" and isinstance(b, Term) and isinstance(a, Term):
        denominator = _one_plus_exp_neg(b)
        if denominator is not None and denominator[0] is a:
            drift = (*denominator[1], Drift(Numerics.ACCURATE, _SILU_WRITTEN_OUT))
            return view.make("silu", (a,), dtype, drift)
    if name == "div" and a == 1 and isinstance(b, Term):
        return unary(view, "reciprocal", b)
    return view.make(name, (a, b), dtype)


def _silu_from_sigmoid(view: TermGraph, a: Term, b: Term) -> Term | None:
    for x, gate in ((a, b), (b, a)):
        inner, drift = rounding_removed(gate)
        if inner.op == "sigmoid" and inner.args[0] is x:
            drift += inner.drift
            drift += (Drift(Numerics.ACCURATE, "silu(x) for x * sigmoid(x): last bit of float32"),)
            return view.make("silu", (x,), x.dtype, drift)
    return None


def _absolute_maximum(view: TermGraph, a: Term, b: Term) -> Term | None:
    """``max(-min(x), max(x))``, also with both ends clamped to zero -> ``absmax(x)``."""
    for low, high in ((a, b), (b, a)):
        if low.op == "neg":
            smallest, largest = low.args[0], high
        elif low.op == high.op == "abs":
            smallest, largest = low.args[0], high.args[0]
        else:
            continue
        smallest, shape = _extremum(smallest, (None, 0))
        largest, other = _extremum(largest, (0, None))
        if (smallest.op, largest.op) == ("amin", "amax") and smallest.args == largest.args and shape == other:
            found = view.make("absmax", smallest.args, smallest.dtype)
            return found if shape is None else view.make("view", (found, shape), found.dtype)
    return None


def _extremum(term: Term, bounds: tuple[Any, Any]) -> tuple[Term, Any]:
    """What is behind a clamp to ``bounds`` and a view, and the shape it is viewed as."""
    shape = None
    while term.op == "view" or (term.op == "clamp" and term.args[1:] == bounds):
        if term.op == "view" and shape is None:
            shape = term.args[1]
        term = term.args[0]
    return term, shape


def clamp(view: TermGraph, x: Term, low: Any, high: Any) -> Term:
    """``clamp`` with None for an open end; nested one-sided clamps become one."""
    if x.op == "clamp":
        inner, inner_low, inner_high = x.args
        if low is None and inner_high is None and inner_low is not None and _ordered(inner_low, high):
            return view.make("clamp", (inner, inner_low, high), x.dtype)
        if high is None and inner_low is None and inner_high is not None and _ordered(low, inner_high):
            return view.make("clamp", (inner, low, inner_high), x.dtype)
    return view.make("clamp", (x, low, high), x.dtype)


def _ordered(low: Any, high: Any) -> bool:
    return _is_number(low) and _is_number(high) and low <= high


@rule(aten.mul.Tensor, aten.mul.Scalar)
def _mul(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return _result(view, node, "mul", args[0], args[1])


@rule(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor)
def _div(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return _result(view, node, "div", args[0], args[1])


@rule(aten.add.Tensor, aten.add.Scalar)
def _add(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return NotImplemented if args[2] != 1 else _result(view, node, "add", args[0], args[1])


@rule(aten.sub.Tensor, aten.sub.Scalar)
def _sub(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return NotImplemented if args[2] != 1 else _result(view, node, "sub", args[0], args[1])


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return NotImplemented if args[2] != 1 else _result(view, node, "sub", args[1], args[0])


@rule(aten.maximum.default)
def _maximum(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return _result(view, node, "maximum", args[0], args[1])


@rule(aten.minimum.default)
def _minimum(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return _result(view, node, "minimum", args[0], args[1])


@rule(aten.clamp.default, aten.clamp.Tensor, aten.hardtanh.default)
def _clamp(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return _clamped(view, node, args[0], args[1], args[2])


@rule(aten.clamp_min.default, aten.clamp_min.Tensor)
def _clamp_min(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return _clamped(view, node, args[0], args[1], None)


@rule(aten.clamp_max.default, aten.clamp_max.Tensor)
def _clamp_max(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return _clamped(view, node, args[0], None, args[1])


def _clamped(view: TermGraph, node: fx.Node, x: Any, low: Any, high: Any) -> Any:
    result = node.meta["val"].dtype
    compute = _compute_dtype(result)
    if _grown_by_constant(node, x, low, high):
        return NotImplemented
    low, high = _operand(view, low, compute), _operand(view, high, compute)
    return view.cast(clamp(view, view.cast(x, compute), low, high), result)


@rule(aten.pow.Tensor_Scalar, aten.square.default)
def _pow(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    exponent = args[1] if len(args) > 1 else 2
    result = node.meta["val"].dtype
    compute = _compute_dtype(result)
    x = view.cast(args[0], compute)
    if exponent == 2:
        value = view.make("mul", (x, x), compute)
    elif exponent == 0.5:
        value = view.make("sqrt", (x,), compute)
    elif exponent == -0.5:
        value = view.make("rsqrt", (x,), compute)
    else:
        value = view.make("pow", (x, exponent), compute)
    return view.cast(value, result)


@rule(aten.eq.Scalar, aten.eq.Tensor)
def _eq(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x, y = args
    if not isinstance(x, Term) or _grown_by_constant(node, x, y):
        return NotImplemented
    return view.make("eq", (x, y.args[0] if isinstance(y, Term) and y.op == "const" else y), torch.bool)


@rule(aten.ne.Scalar, aten.ne.Tensor)
def _ne(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x, y = args
    if not isinstance(x, Term) or _grown_by_constant(node, x, y):
        return NotImplemented
    return view.make("ne", (x, y.args[0] if isinstance(y, Term) and y.op == "const" else y), torch.bool)


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def _where(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    result = node.meta["val"].dtype
    condition, a, b = args
    if not isinstance(condition, Term) or _grown_by_constant(node, condition, a, b):
        return NotImplemented
    if condition.op == "ne":
        condition, a, b = view.make("eq", condition.args, torch.bool), b, a
    return view.make("where", (condition, _operand(view, a, result), _operand(view, b, result)), result)
