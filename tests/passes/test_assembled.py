"""A tensor filled piece by piece is the cat of its pieces, if they are in order and cover it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from npu_fusion.passes import canonicalize
from npu_fusion.passes.terms import Term, TermGraph

assert canonicalize  # importing it is what registers the rules

Filled = Callable[[Tensor, Tensor], Tensor]


def term(fn: Filled, a: Tensor, b: Tensor) -> Term:
    graph = make_fx(functionalize(fn, remove="mutations"), tracing_mode="fake")(a, b).graph
    view = TermGraph(graph)
    (result,) = next(n for n in graph.nodes if n.op == "output").args
    return view.of[result]


def filled(*pieces: tuple[slice, str], base: str = "new_empty", dim: int = -1) -> Filled:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        whole = getattr(a, base)((2, 10) if dim == -1 else (10, 6))
        for where, name in pieces:
            (whole[..., where] if dim == -1 else whole[where]).copy_(a if name == "a" else b)
        return whole

    return fn


A, B = torch.randn(2, 6), torch.randn(2, 4)
FIRST, SECOND = (slice(None, 6), "a"), (slice(6, None), "b")


@pytest.mark.parametrize("base", ["new_empty", "new_zeros"])
def test_pieces_in_order_are_a_cat(base: str) -> None:
    result = term(filled(FIRST, SECOND, base=base), A, B)
    assert (result.op, result.args[1]) == ("cat", 1)
    assert [p.op for p in result.args[0]] == ["input"] * 2
    assert [p.shape for p in result.args[0]] == [(2, 6), (2, 4)]


def test_another_dimension() -> None:
    result = term(
        filled((slice(None, 6), "a"), (slice(6, 10), "b"), dim=0), A.new_ones(6, 6), B.new_ones(4, 6)
    )
    assert (result.op, result.args[1]) == ("cat", 0)


def test_all_at_once_is_the_piece() -> None:
    whole = torch.randn(2, 10)
    assert term(filled((slice(0, 10), "a")), whole, B).op == "input"


def test_a_piece_without_entries_changes_nothing() -> None:
    whole = torch.randn(2, 10)
    assert term(filled((slice(0, 10), "a"), (slice(10, None), "b")), whole, B[:, :0]).op == "input"


def test_a_copy_is_broadcast_and_converted() -> None:
    result = term(filled(FIRST, SECOND), A, B[:1].bfloat16())
    assert result.op == "cat"
    second = result.args[0][1]
    assert (second.shape, second.dtype) == ((2, 4), torch.float32)


@pytest.mark.parametrize(
    "pieces",
    [
        (FIRST,),
        (SECOND, FIRST),
        (FIRST, (slice(5, 9), "b")),
        ((slice(0, 4), "b"), SECOND),
        ((slice(None, None, 2), "five"),),
    ],
    ids=["one is missing", "out of order", "overlap", "gap", "step"],
)
def test_anything_else_is_not_looked_into(pieces: tuple[tuple[slice, str], ...]) -> None:
    b = torch.randn(2, 5) if pieces[0][1] == "five" else B
    assert term(filled(*pieces), A, b).op in ("filled", "input")
