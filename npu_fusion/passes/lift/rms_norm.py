"""Root mean square normalization of the last dimension.

::

    %v = mean(pow(%x, 2), [-1], True)
    %r = rsqrt(add(%v, eps))                 ->     %y, %rstd = npu_rms_norm(%x, %g, eps)
    %y = mul(mul(%x, %r), %g)

Also read: the weight first or last, or folded into the factor; ``x / sqrt(..)``, ``x * (1 / sqrt(..))``;
``x * x``, ``square``; ``sum / H``; ``F.rms_norm`` and its ATen operators; x widened to float32 and rounded
again before the weight (Hugging Face), after it, or never widened; a weight that is computed (``1 + w``).

Conditions: the mean is over the last dimension alone and of the tensor that is scaled; one weight per entry
of that dimension; epsilon is a number and added to the mean. A subtracted mean is a LayerNorm. The operator
rounds once: ``accurate`` where the source rounds before that, takes the root otherwise than by ``rsqrt``,
multiplies in another order, or sums rows that are not contiguous. :func:`normalized`
recognizes the norm for all fusions that contain one.

Source: torch_npu documentation of npu_rms_norm; the spellings are those of real models.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from npu_fusion.config import Numerics
from npu_fusion.passes.checks import Sizes, Truth
from npu_fusion.passes.lift.dynamic_quant import channel
from npu_fusion.passes.pattern import Context, Fusion, Match, Refused, held_by
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Drift, Size, Term, sizes_of
from npu_fusion.passes.walk import Walk, buildable, dtype_name, narrow, operands, rounded, unexpanded

FLOATS = (torch.float32, *LOW_PRECISION)
MAX_RANK = 8


@dataclass(frozen=True)
class Normalized:
    """``x / sqrt(mean(x^2) + epsilon) * gamma`` in float32."""

    x: Term
    """What is normalized, in float32."""
    gamma: Term
    """The weight [H] (or a view of it with leading ones) in the dtype that it has in the graph."""
    epsilon: float
    inside: tuple[Term, ...]
    """What the norm itself makes of ``x``: its square and its scaled value."""
    drift: tuple[Drift, ...]


@dataclass(frozen=True)
class _Scaled:
    """``x / sqrt(mean(x^2) + epsilon)``, no weight yet."""

    x: Term
    epsilon: float
    inside: tuple[Term, ...]


def normalized(term: Term, context: Context) -> Normalized | Refused | None:
    """Recognize an RMSNorm whose float32 result (before any rounding) is ``term``."""
    key = (normalized, term)
    if key not in context.memo:
        found = _operator(term) if term.op == "rms_norm" else _product(term, context)
        if isinstance(found, Normalized) and found.x.shape[-1:] in ((), (0,)):
            found = Refused("the last dimension is empty", "", (term,))
        if isinstance(found, Normalized) and not _rows_are_contiguous(found.x):
            what = "the squares of a row that is not contiguous are added in another order"
            note = Drift(Numerics.ACCURATE, what)
            found = Normalized(found.x, found.gamma, found.epsilon, found.inside, (*found.drift, note))
        context.memo[key] = found
    return context.memo[key]


def called(term: Term, *operators: str) -> bool:
    """Is the value the output of a call of one of these torch_npu operators already?"""
    node = term.node
    if node is None or node.target is not operator.getitem:
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and getattr(source.target, "_opname", None) in operators


def _rows_are_contiguous(x: Term) -> bool:
    return all(sizes_of(n.meta["val"].stride())[-1:] == (1,) for n in held_by(x))


def _operator(term: Term) -> Normalized | Refused:
    x, gamma, epsilon = term.args
    if gamma is None:
        return Refused("there is no weight", "", (term,))
    if not isinstance(epsilon, float):
        return Refused(*_EPSILON_IS_A_TENSOR, (term,))
    return Normalized(x, _narrowest(gamma), epsilon, (term,), term.drift)


def _product(term: Term, context: Context) -> Normalized | Refused | None:
    if term.op != "mul" or not isinstance(term.args[1], Term):
        return None
    near: Refused | None = None
    for first, second in operands(term):
        walk = Walk(context.sizes)
        scaled = _scaled(walk.value(first), walk)
        if isinstance(scaled, _Scaled):
            return _weighted(scaled, second, walk, context)
        near = near or scaled
    for x, second in operands(term):
        walk = Walk(context.sizes)
        factor = walk.value(second)
        if factor.op != "mul" or not isinstance(factor.args[1], Term):
            continue
        for root, gamma in operands(factor):
            scaled = _by_root(x, root, term, walk)
            if isinstance(scaled, _Scaled):
                walk.note(Numerics.ACCURATE, "x * (rstd * gamma) is computed as (x * rstd) * gamma")
                return _weighted(scaled, gamma, walk, context)
            near = near or scaled
    return near


def _weighted(scaled: _Scaled, factor: Term, walk: Walk, context: Context) -> Normalized | Refused:
    while factor.op == "cast" and factor.args[0].op == "expand":
        factor = context.view.cast(factor.args[0].args[0], factor.dtype)
    gamma = channel(factor, scaled.x.shape[-1], context)
    if gamma is None:
        shown = f"{list(factor.shape)} for {list(scaled.x.shape)}"
        return Refused("the weight is not one value per entry of the last dimension", shown, scaled.inside)
    return Normalized(scaled.x, _narrowest(gamma), scaled.epsilon, scaled.inside, tuple(walk.drift))


def _narrowest(gamma: Term) -> Term:
    """The tensor that the float32 weight was widened from, if it was."""
    if gamma.op == "cast" and gamma.args[0].dtype in FLOATS:
        return gamma.args[0]
    return gamma


def _scaled(term: Term, walk: Walk) -> _Scaled | Refused | None:
    """``x * rsqrt(..)``, ``x / sqrt(..)``."""
    if term.op not in ("mul", "div"):
        return None
    pairs: Iterator[tuple[Any, Any]] = operands(term) if term.op == "mul" else iter([term.args])
    for x, root in pairs:
        if isinstance(x, Term) and isinstance(root, Term):
            found = _by_root(x, root, term, walk)
            if found is not None:
                return found
    return None


def _by_root(x: Term, root: Term, term: Term, walk: Walk) -> _Scaled | Refused | None:
    """``x`` and what it is multiplied (in a ``div``: divided) by."""
    attempt = Walk(walk.sizes)
    inner = _per_row(root, attempt)
    if term.op == "div" and inner.op == "sqrt":
        attempt.note(Numerics.ACCURATE, "x / sqrt(..) is computed as x * rsqrt(..)")
    elif term.op == "mul" and inner.op == "reciprocal":
        inner = _per_row(inner.args[0], attempt)
        if inner.op != "sqrt":
            return _epsilon_outside(inner, term, attempt)
        attempt.note(Numerics.ACCURATE, "1 / sqrt(..) is computed as rsqrt(..)")
    elif term.op != "mul" or inner.op != "rsqrt":
        return _epsilon_outside(inner, term, attempt) if term.op == "div" else None
    found = _root_mean_square(inner.args[0], x, root, term, attempt)
    if isinstance(found, _Scaled):
        walk.drift.extend(attempt.drift)
    return found


def _epsilon_outside(inner: Term, term: Term, walk: Walk) -> Refused | None:
    if inner.op == "add":
        root = _per_row(inner.args[0], walk)
        if root.op == "sqrt" and _mean_of_squares(_per_row(root.args[0], walk), walk) is not None:
            return Refused("epsilon is added to the root, not to the mean", "", (term,))
    return None


def _per_row(term: Any, walk: Walk) -> Any:
    """Through views, broadcasts and roundings of a value per row."""
    while isinstance(term, Term):
        inner = walk.value(term)
        if inner.op in ("view", "expand"):
            inner = inner.args[0]
        if inner is term:
            break
        term = inner
    return term


_EPSILON_IS_A_TENSOR = (
    "epsilon is a tensor, the operator takes a number",
    "set torch._dynamo.config.specialize_float=True, or compile with npu_fusion's backend",
)


def _root_mean_square(value: Term, x: Term, root: Term, term: Term, walk: Walk) -> _Scaled | Refused | None:
    """``mean(x^2) + epsilon`` of the very ``x`` that is scaled."""
    value = _per_row(value, walk)
    epsilon: Any = 0.0
    if value.op == "add":
        value, epsilon = value.args
        if isinstance(epsilon, Term) and _mean_of_squares(_per_row(value, walk), walk) is None:
            value, epsilon = epsilon, value
        value = _per_row(value, walk)
    found = _mean_of_squares(value, walk)
    if found is None:
        return None
    square, dims = found
    rank = len(square.shape)
    if dims != (rank - 1,):
        where = "all dimensions" if len(dims) == rank else f"dimension {', '.join(map(str, dims))} of {rank}"
        return Refused("the mean is not over the last dimension alone", where, (term,))
    if isinstance(epsilon, Term):
        return Refused(*_EPSILON_IS_A_TENSOR, (term,))
    source, same = walk.rows(square.args[0]), walk.rows(x)
    if source is not same:
        source, same = walk.value(source), walk.value(same)
        if source is not same:
            return Refused("the mean square is of another tensor than the one scaled", "", (term,))
    if _centered(same, walk.sizes):
        return Refused("the mean is subtracted: this is a LayerNorm", "", (term,))
    root = unexpanded(root)
    if not walk.sizes.same_shape(root.shape, (*x.shape[:-1], 1)):
        return Refused("the root is not applied per row", f"{list(root.shape)} for {list(x.shape)}", (term,))
    return _Scaled(same, float(epsilon), (square, term))


def _mean_of_squares(term: Any, walk: Walk) -> tuple[Term, tuple[int, ...]] | None:
    """The square and the dimensions of ``mean(x * x)``, also spelled ``sum(x * x) / H``."""
    if not isinstance(term, Term):
        return None
    count: Size | float | None = None
    if term.op in ("div", "mul") and not isinstance(term.args[1], Term):
        term, count = _count(term, walk)
    if term.op != ("mean" if count is None else "sum"):
        return None
    source, dims = term.args
    square = walk.value(source)
    if square.op != "mul" or square.args[0] is not square.args[1]:
        return None
    if count is not None and walk.sizes.equal(count, square.shape[-1]) is not Truth.YES:
        return None
    return square, dims


def _count(term: Term, walk: Walk) -> tuple[Term, Any]:
    """The sum behind ``sum / n`` or ``sum * (1 / n)``, and n."""
    total, number = _per_row(term.args[0], walk), term.args[1]
    if term.op == "div":
        return total, int(number) if isinstance(number, float) and number.is_integer() else number
    count = round(1 / number) if isinstance(number, float) and number > 0 else 0
    if count and abs(number * count - 1) < 1e-6:
        walk.note(Numerics.ACCURATE, "sum * (1 / n) is computed as sum / n")
    else:
        count = 0
    return total, count


def _centered(x: Term, sizes: Sizes) -> bool:
    """``t - mean(t)``, whatever it is rounded to."""
    value = Walk(sizes).value(x)
    return (
        value.op == "sub"
        and isinstance(value.args[1], Term)
        and _per_row(value.args[1], Walk(sizes)).op == "mean"
    )


def with_dtype(gamma: Term, dtype: torch.dtype) -> bool:
    """Can the weight be given in ``dtype`` without rounding it?"""
    return gamma.dtype == dtype or (dtype == torch.float32 and gamma.dtype in LOW_PRECISION)


def vector(e: Emitter, term: Term, dtype: torch.dtype | None = None) -> fx.Node:
    """A value per channel as [H]."""
    return e.view(e.term(term, dtype), (term.shape[-1],))


class RMSNorm(Fusion):
    name = "rms_norm"
    operator = "npu_rms_norm"
    anchors: ClassVar = ("mul", "div", "rms_norm")
    priority = 41
    stage = "lift"

    def match(self, term: Term, context: Context) -> Match | Refused | None:
        inner = term.args[0] if term.op == "cast" else term
        if called(term, "npu_rms_norm", "npu_add_rms_norm"):
            return None
        found = normalized(inner, context)
        if not isinstance(found, Normalized):
            return found or _unweighted(inner, context)
        output = rounded(term, context)
        x = narrow(found.x, output.dtype) or found.x
        if x.dtype not in FLOATS or not with_dtype(found.gamma, torch.float32):
            shown = f"x {dtype_name(x.dtype)}, weight {dtype_name(found.gamma.dtype)}"
            return Refused("npu_rms_norm takes float16, bfloat16 and float32", shown, (term,))
        if len(x.shape) > MAX_RANK:
            return Refused("npu_rms_norm takes at most 8 dimensions", f"{len(x.shape)}", (term,))
        if not buildable(x) or not buildable(found.gamma):
            return Refused("no node holds what is normalized, or its weight", "", (term,))
        gamma_dtype = x.dtype if found.gamma.dtype == x.dtype else torch.float32

        def build(e: Emitter) -> list[fx.Node]:
            gamma = vector(e, found.gamma, gamma_dtype)
            call = e.call(torch.ops.npu.npu_rms_norm.default, e.term(x), gamma, found.epsilon)
            return [e.item(call, 0)]

        return Match([x, found.gamma], [[output]], build, found.drift)


def _unweighted(term: Term, context: Context) -> Refused | None:
    """A value divided by its root mean square that is not multiplied by a weight."""
    scaled = _scaled(term, Walk(context.sizes))
    if scaled is None:
        return None
    pending = [term]
    while pending:
        for user in context.view.users(pending.pop()):
            if user.op == "mul" and normalized(user, context) is not None:
                return None  # reported there
            if user.op in ("cast", "view"):
                pending.append(user)
    return scaled if isinstance(scaled, Refused) else Refused("there is no weight", "", (term,))
