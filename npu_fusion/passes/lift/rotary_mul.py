"""Rotary position embedding.

::

    %a, %b = chunk(%x, 2, -1)
    %r = cat(neg(%b), %a)                         ->     %y = npu_rotary_mul(%x, %cos, %sin)
    %y = add(mul(%x, %cos), mul(%r, %sin))

    %r = flatten(stack(neg(%x[1::2]), %x[::2]))   ->     %y = npu_rotary_mul(%x, %cos, %sin, "interleave")

    cat(sub(mul(%a, %c), mul(%b, %s)),            ->     %y = npu_rotary_mul(%x, cat(%c, %c), cat(%s, %s))
        add(mul(%b, %c), mul(%a, %s)))

:func:`rotation` recognizes all of them, for this fusion and for :mod:`.interleave_rope`.

Conditions: the halves (or alternating entries) are those of the tensor that is multiplied by the cosine; at
most four dimensions (leading ones are added); cosine and sine have one shape, as wide as the input, and one
or the input's size in the other dimensions; one dtype (float32 if they have two). On a target the documented
limits, and no "interleave": torchair lowers that call to an operator that knows "half" only. In 16 bits
``accurate``: the source rounds the products.

Source: torch_npu documentation of npu_rotary_mul; the spellings are those of real models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from npu_fusion.passes.checks import Sizes, Truth
from npu_fusion.passes.lift.swiglu import even
from npu_fusion.passes.pattern import Constraint, Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Drift, Size, Term, TermGraph, representable
from npu_fusion.passes.walk import Walk, buildable, dtype_name, operands, rounded, unexpanded
from npu_fusion.targets import resolve

RANK = 4
FLOATS = (torch.float32, *LOW_PRECISION)


@dataclass(frozen=True)
class Rotation:
    """``x * cos + turned(x) * sin`` in the widest dtype at hand, before any rounding."""

    x: Term
    cos: Term
    sin: Term
    mode: str
    """"half": turned is cat(-x2, x1). "interleave": (-x[1], x[0], -x[3], x[2], ..). "deinterleave": "half" of
    the even entries followed by the odd ones."""
    twice: bool
    """Cosine and sine have half the width and stand for both halves."""
    drift: tuple[Drift, ...]


def rotation(term: Term, context: Context) -> Rotation | Refused | None:
    """Recognize a rotation whose result is ``term`` (an unrounded sum, or a cat of two results)."""
    key = (rotation, term)
    if key not in context.memo:
        context.memo[key] = _by_halves(term, context) if term.op == "cat" else _by_sum(term, context)
    return context.memo[key]


def _by_sum(term: Term, context: Context) -> Rotation | Refused | None:
    if term.op != "add" or not isinstance(term.args[1], Term):
        return None
    near: Refused | None = None
    for first, second in operands(term):
        walk = Walk(context.sizes)
        straight, crossed = walk.value(first), walk.value(second)
        if not (_is_product(straight) and _is_product(crossed)):
            return None
        for turned, sin in operands(crossed):
            found = _turned(turned, context.view)
            if found is None:
                continue
            base, mode = found
            for x, cos in operands(straight):
                if x is not base:
                    continue
                if mode is None:
                    near = Refused("the rotation is the other way round", "cat(x2, -x1)", (term,))
                    continue
                if not all(walk.sizes.same_shape(t.shape, x.shape) for t in (straight, crossed, term)):
                    near = Refused("the cosine or sine has more entries than the input", "", (term,))
                    continue
                return Rotation(x, cos, sin, mode, False, tuple(walk.drift))
    return near


def _is_product(term: Any) -> bool:
    return isinstance(term, Term) and term.op == "mul" and isinstance(term.args[1], Term)


def widened(term: Term, view: TermGraph) -> Term:
    """A 16-bit value in float32, which conversions disappear in."""
    return view.cast(term, torch.float32) if term.dtype in LOW_PRECISION else term


def source(term: Term) -> Term:
    """The 16-bit tensor behind a widened one."""
    return term.args[0] if term.op == "cast" and term.args[0].dtype in LOW_PRECISION else term


def _turned(term: Term, view: TermGraph) -> tuple[Term, str | None] | None:
    """(x, mode) of a quarter turn of x; mode None: in the other direction."""
    inner = source(term)
    if inner.op == "cat":
        pieces, dim = inner.args
        if len(pieces) != 2 or dim != len(inner.shape) - 1:
            return None
        first, second = (widened(p, view) for p in pieces)
        for minus, plus, mode in ((first, second, "half"), (second, first, None)):
            found = minus.args[0] if minus.op == "neg" else None
            if found is None or found.op != "half" or plus.op != "half" or found.args[0] is not plus.args[0]:
                continue
            if (found.args[1], plus.args[1]) == ((1, 0) if mode else (0, 1)):
                return found.args[0], mode
        return None
    if inner.op == "view" and inner.args[0].op == "cat":
        return _turned_pairs(inner, view)
    return None


def _turned_pairs(term: Term, view: TermGraph) -> tuple[Term, str] | None:
    """``stack(-x[1::2], x[::2], -1)`` flattened."""
    stacked = term.args[0]
    pieces, dim = stacked.args
    if len(pieces) != 2 or dim != len(term.shape) or any(p.op != "view" for p in pieces):
        return None
    first, second = (widened(p.args[0], view) for p in pieces)
    if first.op != "neg":
        return None
    odd, even_ = alternating(first.args[0], view), alternating(second, view)
    if odd is None or even_ is None or odd[0] is not even_[0] or (odd[1], even_[1]) != (1, 0):
        return None
    x = odd[0]
    return (x, "interleave") if (*pieces[0].args[0].shape[:-1], x.shape[-1]) == term.shape else None


def alternating(term: Term, view: TermGraph) -> tuple[Term, int] | None:
    """(x, 0) for the even entries of the last dimension of x, (x, 1) for the odd ones."""
    part = source(term)
    if part.op != "slice":
        return None
    x, dim, start, length, step = part.args
    if step != 2 or dim != len(x.shape) - 1 or start not in (0, 1) or 2 * length != x.shape[-1]:
        return None
    return widened(x, view), start


def _by_halves(term: Term, context: Context) -> Rotation | Refused | None:
    """``cat(a * c - b * s, b * c + a * s)``: the halves are rotated one by one and put side by side."""
    pieces, dim = term.args
    if len(pieces) != 2 or dim != len(term.shape) - 1:
        return None
    walk = Walk(context.sizes)
    first, second = (p.args[0] if p.op == "cast" and p.dtype in LOW_PRECISION else p for p in pieces)
    if (
        first.op != "sub"
        or second.op != "add"
        or not all(isinstance(t, Term) for t in (*first.args, *second.args))
    ):
        return None
    products = [walk.value(t) for t in (*first.args, *second.args)]
    if not all(_is_product(p) for p in products):
        return None
    for a, cos in operands(products[0]):
        for b, sin in operands(products[1]):
            crossed = [{b, cos}, {a, sin}]
            if [set(products[2].args), set(products[3].args)] not in (crossed, crossed[::-1]):
                continue
            parts = _parts(a, b, context.view)
            if parts is not None and walk.sizes.same_shape(parts[0].shape, term.shape):
                return Rotation(parts[0], cos, sin, parts[1], True, tuple(walk.drift))
    return None


def _parts(a: Term, b: Term, view: TermGraph) -> tuple[Term, str] | None:
    """The tensor that ``a`` and ``b`` are the halves, or the even and odd entries of."""
    if a.op == b.op == "half" and a.args[0] is b.args[0] and (a.args[1], b.args[1]) == (0, 1):
        return a.args[0], "half"
    evens, odds = alternating(a, view), alternating(b, view)
    if evens is not None and odds is not None and evens[0] is odds[0] and (evens[1], odds[1]) == (0, 1):
        return evens[0], "deinterleave"
    return None


@dataclass(frozen=True)
class Arguments:
    """Input, cosine and sine in the dtype in which the operator is called."""

    x: Term
    cos: Term
    sin: Term
    output: Term
    twice: bool

    @property
    def inputs(self) -> tuple[Term, ...]:
        return (self.x, self.cos, self.sin)

    def cosine_and_sine(self, e: Emitter) -> list[fx.Node]:
        """Both with the input's rank and full width."""
        found = []
        for term in (self.cos, self.sin):
            node = e.view(e.term(term, self.x.dtype), padded(term.shape, RANK))
            found.append(e.call(torch.ops.aten.cat.default, [node, node], -1) if self.twice else node)
        return found


def arguments(found: Rotation, term: Term, context: Context) -> Arguments | Refused:
    """What the rotary operators are called with to give ``term`` (the rotation or its rounding)."""
    output = rounded(term, context)
    factors = [unexpanded(found.cos), unexpanded(found.sin)]
    given = [found.x, *factors]
    fit = all(representable(t, output.dtype) for t in given)
    x, cos, sin = (context.view.cast(t, output.dtype) for t in given) if fit else given
    if x.dtype not in FLOATS:
        return Refused("the operator takes float16, bfloat16 and float32", dtype_name(x.dtype), (term,))
    if len(x.shape) > RANK:
        return Refused("the input has more than four dimensions", f"{len(x.shape)}", (term,))
    if not all(buildable(t) for t in (x, cos, sin)):
        return Refused("no node holds the input, the cosine or the sine", "", (term,))
    sizes = context.sizes
    full, width = padded(x.shape, RANK), cos.shape[-1:]
    wide = (2 * width[0],) if found.twice and width else width
    shape = padded(cos.shape, RANK)
    if (
        not sizes.same_shape(shape, padded(sin.shape, RANK))
        or not sizes.same_shape(wide, full[-1:])
        or not all(
            s == 1 or sizes.equal(s, d) is Truth.YES for s, d in zip(shape[:-1], full[:-1], strict=True)
        )
    ):
        shown = f"{list(cos.shape)} and {list(sin.shape)} for {list(x.shape)}"
        return Refused(
            "cosine and sine do not broadcast over the input as the operator has it", shown, (term,)
        )
    return Arguments(x, cos, sin, output, found.twice)


def padded(shape: Sequence[Size], rank: int) -> tuple[Size, ...]:
    return (*(1 for _ in range(rank - len(shape))), *shape)


class RotaryMul(Fusion):
    name = "rotary_mul"
    operator = "npu_rotary_mul"
    anchors: ClassVar = ("add", "cat")
    priority = 43
    stage = "lift"

    def match(self, term: Term, context: Context) -> Match | Refused | None:
        found = rotation(term.args[0] if term.op == "cast" else term, context)
        if not isinstance(found, Rotation) or found.mode == "deinterleave":
            return found if isinstance(found, Refused) else None
        given = arguments(found, term, context)
        if isinstance(given, Refused):
            return given
        limits = _hardware(given, found.mode, context)
        if isinstance(limits, Refused):
            return limits

        def build(e: Emitter) -> list[fx.Node]:
            x = e.view(e.term(given.x), padded(given.x.shape, RANK))
            mode = () if found.mode == "half" else (found.mode,)
            return [e.call(torch.ops.npu.npu_rotary_mul.default, x, *given.cosine_and_sine(e), *mode)]

        constraints = [even(context, given.x), *limits]
        return Match(given.inputs, [[given.output]], build, found.drift, constraints)


def _hardware(given: Arguments, mode: str, context: Context) -> list[Constraint] | Refused:
    target, sizes = resolve(context.config), context.sizes
    if target is None:
        return []
    if mode != "half":
        return Refused(
            "torchair lowers npu_rotary_mul to 'half', whatever its mode", f"mode {mode!r}", (given.output,)
        )
    full, factor = padded(given.x.shape, RANK), padded(given.cos.shape, RANK)
    if factor[0] == 1 and full[0] != 1 and factor[1] != 1 and factor[2] != 1:
        shown = f"{list(factor)} for {list(full)}"
        return Refused("cosine and sine are broadcast over the first dimension alone", shown, (given.output,))
    broadcast = [d for d, s in zip(full[:-1], factor[:-1], strict=True) if s == 1]
    limits = [(full[-1], target.rotary_max_width, "the last dimension")]
    limits.extend(
        (d, target.rotary_max_broadcast, "a dimension that cosine and sine lack") for d in broadcast
    )
    return [_at_most(sizes, size, most, what) for size, most, what in limits]


def _at_most(sizes: Sizes, size: Size, most: int, what: str) -> Constraint:
    relation = None if isinstance(size, int) else sympy.Le(size, most)
    return Constraint(sizes.at_most(size, most), f"{what} is larger than {most}", f"it is {size}", relation)
