"""Layouts against the real entries: every root is a tensor that holds its own flat indices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from npu_fusion.passes import canonicalize
from npu_fusion.passes.axes import BROADCAST, Axis, Layout, coalesced, layout
from npu_fusion.passes.checks import Sizes
from npu_fusion.passes.terms import Term, TermGraph

assert canonicalize  # importing it is what registers the rules

Step = Callable[[Tensor], Tensor]

FEW = settings(max_examples=120, deadline=None, derandomize=True, phases=[Phase.generate, Phase.shrink])


def indices(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


def traced(fn: Callable[..., Any], *args: Tensor) -> tuple[list[Term], Sizes, list[Term]]:
    """The terms of a function's results, what is known of sizes, and the terms of its arguments."""
    graph: fx.Graph = make_fx(fn)(*args).graph
    view = TermGraph(graph)
    (results,) = next(n for n in graph.nodes if n.op == "output").args
    outs = results if isinstance(results, (list, tuple)) else [results]
    given_ = [view.of[n] for n in graph.nodes if n.op == "placeholder" and isinstance(view.of[n], Term)]
    return [view.of[r] for r in outs], Sizes(graph), given_


def predicted(at: Layout, root: Tensor, number: Callable[[Any], int] = int) -> Tensor:
    """The entries that a layout says the value has."""
    axes = [axis for dim in at.dims for axis in dim]
    index = [torch.tensor(number(start)) for start in at.origin]
    for place, axis in enumerate(axes):
        if axis.dim != BROADCAST:
            shape = [1] * len(axes)
            shape[place] = number(axis.size)
            steps = torch.arange(number(axis.size)) * number(axis.step)
            index[axis.dim] = index[axis.dim] + steps.view(shape)
    sizes = [number(axis.size) for axis in axes]
    dims = [math.prod(number(axis.size) for axis in dim) for dim in at.dims]
    entries = root[tuple(i.expand(sizes) for i in index)] if index else root.expand(sizes)
    return entries.reshape(dims)


def divisions(size: int) -> list[int]:
    return [d for d in range(1, size + 1) if size % d == 0]


@st.composite
def factored(draw: st.DrawFn, size: int) -> list[int]:
    """Some shape with ``size`` entries."""
    shape = []
    for _ in range(draw(st.integers(0, 3))):
        shape.append(draw(st.sampled_from(divisions(size))))
        size //= shape[-1]
    return [*shape, size]


@st.composite
def step(draw: st.DrawFn, x: Tensor) -> Step:
    """One operation that moves entries of ``x`` and computes nothing."""
    dim = draw(st.integers(0, x.dim() - 1))
    kind = draw(st.sampled_from(("view", "view", "permute", "slice", "slice", "expand", "select", "half")))
    if kind == "permute":
        order = draw(st.permutations(range(x.dim())))
        return lambda t: t.permute(order)
    if kind == "slice":
        start = draw(st.integers(0, x.shape[dim] - 1))
        end, by = draw(st.integers(start + 1, x.shape[dim])), draw(st.integers(1, 3))
        return lambda t: t[(slice(None),) * dim + (slice(start, end, by),)]
    if kind == "expand" and x.numel() <= 64:
        count = draw(st.integers(1, 3))
        if draw(st.booleans()):
            return lambda t: t.expand(count, *t.shape)
        return lambda t: t.unsqueeze(dim).expand(*t.shape[:dim], count, *t.shape[dim:])
    if kind == "select" and x.dim() > 1:
        place = draw(st.integers(0, x.shape[dim] - 1))
        return lambda t: t.select(dim, place)
    if kind == "half" and x.shape[-1] % 2 == 0:
        which = draw(st.integers(0, 1))
        return lambda t: t.chunk(2, -1)[which]
    shape = draw(factored(x.numel()))
    return lambda t: t.reshape(shape)


@st.composite
def chains(draw: st.DrawFn, x: Tensor) -> list[Step]:
    steps: list[Step] = []
    for _ in range(draw(st.integers(1, 7))):
        steps.append(draw(step(x)))
        x = steps[-1](x)
    return steps


def follow(steps: list[Step], x: Tensor) -> Tensor:
    for each in steps:
        x = each(x)
    return x


def moved(steps: list[Step], x: Tensor) -> bool:
    """Does a step copy? Strides then no longer say where the entries are."""
    for each in steps:
        y = each(x)
        if y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            return True
        x = y
    return False


ROOTS = st.lists(st.sampled_from((1, 2, 3, 4, 6)), min_size=1, max_size=3)


@FEW
@given(st.data())
def test_a_chain_has_the_entries_that_its_layout_says(data: st.DataObject) -> None:
    root = indices(*data.draw(ROOTS))
    steps = data.draw(chains(root))
    (term,), sizes, (argument,) = traced(lambda x: follow(steps, x), root)
    at = layout(term, sizes)
    if at is not None:
        assert at.root is argument
        assert torch.equal(predicted(at, root), follow(steps, root))
        assert tuple(math.prod(a.size for a in dim) for dim in at.dims) == term.shape


@FEW
@given(st.data())
def test_what_strides_can_say_of_one_dimension_a_layout_can(data: st.DataObject) -> None:
    root = indices(data.draw(st.sampled_from((4, 6, 12, 24))))
    steps = data.draw(chains(root))
    (term,), sizes, _ = traced(lambda x: follow(steps, x), root)
    at = layout(term, sizes)
    assert at is not None or moved(steps, root)


@FEW
@given(st.data())
def test_a_layout_goes_on_from_a_known_one(data: st.DataObject) -> None:
    root = indices(*data.draw(ROOTS))
    first = data.draw(chains(root))
    then = data.draw(chains(follow(first, root)))
    both = [*first, *then]
    (middle,), sizes, _ = traced(lambda x: follow(first, x), root)
    start = layout(middle, sizes)
    if start is None:
        return
    # What is computed between has the places of its operand.
    (turned,), later_sizes, _ = traced(lambda x: follow(then, follow(first, x).exp()), root)
    source = turned
    while source.op != "exp":
        source = source.args[0]
    here = layout(turned, later_sizes, known={source: start})
    through = layout(turned, later_sizes, through=lambda t: t.args[0] if t.op == "exp" else None)
    for found in (here, through):
        if found is not None:
            assert torch.equal(predicted(found, root), follow(both, root))


@FEW
@given(st.data())
def test_a_layout_looks_into_the_piece_that_has_everything(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.sampled_from((1, 2, 3, 4)), min_size=1, max_size=3))
    dim = data.draw(st.integers(0, len(shape) - 1))
    widths = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=3))
    roots, before = [], []
    for number, width in enumerate(widths):
        piece = [*shape[:dim], width, *shape[dim + 1 :]]
        order = data.draw(st.permutations(range(len(piece))))
        roots.append(1000 * number + indices(*(piece[d] for d in order)))
        before.append([order.index(d) for d in range(len(piece))])

    def joined(parts: Any) -> Tensor:
        return torch.cat([p.permute(b) for p, b in zip(parts, before, strict=True)], dim)

    real = joined(roots)
    start = data.draw(st.integers(0, real.shape[dim] - 1))
    end, by = data.draw(st.integers(start + 1, real.shape[dim])), data.draw(st.integers(1, 2))
    cut = (slice(None),) * dim + (slice(start, end, by),)
    steps = [lambda t: t[cut], *data.draw(chains(real[cut]))]
    (term, cat), sizes, arguments = traced(lambda *x: (follow(steps, joined(x)), joined(x)), *roots)
    at = layout(term, sizes)
    if at is None:
        return
    values = dict(zip(arguments, roots, strict=True)) | {cat: real}
    assert torch.equal(predicted(at, _value(at.root, values)), follow(steps, real))


def _value(term: Term, known: dict[Term, Tensor]) -> Tensor:
    """Also of a permuted argument, at which a layout may stop."""
    return known[term] if term in known else _value(term.args[0], known).permute(term.args[1])


AXES = st.builds(Axis, st.integers(-1, 1), st.integers(0, 6), st.sampled_from((1, 2, 3)))


@FEW
@given(st.lists(AXES, max_size=5))
def test_merged_axes_run_through_the_same_entries(drawn: list[Axis]) -> None:
    axes = [Axis(a.dim, 0 if a.dim == BROADCAST else a.step, a.size) for a in drawn]
    merged = coalesced(axes)
    root = indices(80, 80)

    def entries(of: Any) -> list[float]:
        return predicted(Layout(Term.__new__(Term), (tuple(of),), (0, 0)), root).flatten().tolist()

    assert entries(axes) == entries(merged)
    assert all(a.size != 1 for a in merged)
    assert coalesced(merged) == merged


HEADS, NOPE, ROPE = 3, 4, 2
WIDTH = HEADS * (NOPE + ROPE)

SYMBOLIC: dict[str, Callable[[Tensor], Tensor]] = {
    "heads": lambda x: x.view(*x.shape[:2], HEADS, NOPE + ROPE)[..., :NOPE].transpose(1, 2),
    "rotated part": lambda x: x.view(*x.shape[:2], HEADS, -1)[..., NOPE:].transpose(1, 2).unsqueeze(2),
    "even columns": lambda x: x.view(*x.shape[:2], HEADS, NOPE + ROPE)[..., 0::2].permute(2, 0, 1, 3),
    "flat tokens": lambda x: x.flatten(0, 1).view(-1, HEADS, NOPE + ROPE).transpose(0, 1),
    "flat and back": lambda x: x.flatten(0, 1).view(-1, HEADS, NOPE + ROPE).view(*x.shape[:2], -1)[..., 2:8],
    "expanded": lambda x: x[..., :ROPE].unsqueeze(1).expand(-1, HEADS, -1, -1).flatten(0, 1),
    "later rows": lambda x: x[:, 1:, :NOPE].transpose(0, 1),
    "all in one": lambda x: x.transpose(0, 1).reshape(-1),
}


def dynamic(x: Tensor, sizes: int) -> Tensor:
    """A fake of ``x`` whose first ``sizes`` sizes are symbols."""
    kinds = [DimDynamic.DYNAMIC] * sizes + [DimDynamic.STATIC] * (x.dim() - sizes)
    return FakeTensorMode(shape_env=ShapeEnv()).from_tensor(
        x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds)
    )


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes(name: str) -> None:
    root = indices(5, 7, WIDTH)
    (term,), sizes, (argument,) = traced(SYMBOLIC[name], dynamic(root, 2))
    assert sizes.shape_env is not None
    guards = list(sizes.shape_env.guards)
    at = layout(term, sizes)
    assert sizes.shape_env.guards == guards
    hints = dict(zip(argument.shape[:2], root.shape[:2], strict=True))
    assert at is not None and at.root is argument
    assert any(isinstance(s, sympy.Expr) for s in term.shape)
    have = predicted(at, root, lambda v: int(sympy.sympify(v).subs(hints)))
    assert torch.equal(have, SYMBOLIC[name](root))


def test_views_that_cut_through_have_no_layout() -> None:
    x = indices(4, 6)
    for cut in (
        lambda t: t.reshape(3, 8),  # rows of one and a third
        lambda t: t.t().reshape(4, 6),
        lambda t: t.reshape(24)[1:9],
        lambda t: t.unsqueeze(1).expand(4, 2, 6).reshape(12, 4),
    ):
        (term,), sizes, _ = traced(cut, x)
        assert layout(term, sizes) is None


def test_a_widening_cast_is_passed_and_a_rounding_is_not() -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.float()
        return wide.t()[1:], wide.exp().bfloat16().t()

    (widened, rounded), sizes, (argument,) = traced(both, indices(2, 3).bfloat16())
    at, other = layout(widened, sizes), layout(rounded, sizes)
    assert at is not None and at.root is argument and at.origin == (0, 1)
    assert other is not None and other.root.op == "cast" and other.root.dtype == torch.bfloat16


def test_over_and_flat() -> None:
    (term,), sizes, _ = traced(lambda x: x.view(2, 3, 4, 5).permute(2, 0, 1, 3), indices(6, 20))
    at = layout(term, sizes)
    assert at is not None
    assert at.flat() == (Axis(1, 5, 4), Axis(0, 1, 6), Axis(1, 1, 5))
    assert at.over(0) == (Axis(0, 1, 6),)
    assert at.over(1) == (Axis(1, 5, 4), Axis(1, 1, 5))
