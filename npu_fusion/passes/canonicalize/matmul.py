"""Matrix products.

::

    _int_mm(a, b) · mm(a, b): int32 of widened int8 · out_dtype(mm, int32, a, b)   ->  int_mm(a, b)
    mm · bmm · matmul · linear of floats                                           ->  mm(a, b), bmm(a, b)

An int32 product of int8 operands is exact, however it is spelled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from npu_fusion.passes.terms import Term, TermGraph, rule

aten = torch.ops.aten


@rule(aten._int_mm.default)
def _int_mm(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return view.make("int_mm", (args[0], args[1]), torch.int32)


@rule(aten.mm.default)
def _mm(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    a, b = args[:2]
    dtype = node.meta["val"].dtype
    if dtype == torch.int32:
        return view.make("int_mm", (_narrow(a), _narrow(b)), torch.int32)
    return view.make("mm", (a, b), dtype)


def _narrow(term: Term) -> Term:
    """The int8 tensor behind ``cast(x, int32)``."""
    return term.args[0] if term.op == "cast" and term.args[0].dtype == torch.int8 else term


@rule(aten.bmm.default)
def _bmm(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return view.make("bmm", (args[0], args[1]), node.meta["val"].dtype)


@rule(torch.ops.higher_order.out_dtype)
def _out_dtype(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    target, dtype, a, b = node.args
    if target is not aten.mm.default or dtype != torch.int32:
        return NotImplemented
    return view.make("int_mm", (view.term(a), view.term(b)), torch.int32)
