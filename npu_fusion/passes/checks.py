"""Conditions on sizes by three-valued logic: proven, refuted, unknown. Nothing here installs a guard.

Sizes are ints or sympy expressions (:data:`npu_fusion.passes.terms.Size`). What a ShapeEnv knows (ranges,
divisibility, earlier guards) is asked through :class:`Sizes`; only :meth:`Sizes.guard`, which the config's
``symbolic="guard"`` allows, adds to it.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Max, Mod

from npu_fusion.passes.terms import Size, sizes_of


class Truth(Enum):
    YES = "proven"
    NO = "refuted"
    UNKNOWN = "unknown"


def _truth(value: Any) -> Truth:
    if value is None:
        return Truth.UNKNOWN
    return Truth.YES if value else Truth.NO


class Sizes:
    """What is known about the symbolic sizes of one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.shape_env = _find_shape_env(graph)

    def decide(self, condition: Any) -> Truth:
        """Truth of a bool or sympy relation."""
        if isinstance(condition, bool):
            return _truth(condition)
        if condition in (sympy.true, sympy.false):
            return _truth(condition == sympy.true)
        if self.shape_env is None:
            return Truth.UNKNOWN
        known = self.shape_env._maybe_evaluate_static(condition)
        return Truth.UNKNOWN if known is None else _truth(bool(known))

    def equal(self, a: Size, b: Size) -> Truth:
        if a is b or a == b:
            return Truth.YES
        if isinstance(a, int) and isinstance(b, int):
            return Truth.NO
        return self.decide(sympy.Eq(a, b))

    def same_shape(self, a: tuple[Size, ...], b: tuple[Size, ...]) -> bool:
        return len(a) == len(b) and all(self.equal(x, y) is Truth.YES for x, y in zip(a, b, strict=True))

    def multiple(self, size: Size, of: int) -> Truth:
        if isinstance(size, int):
            return _truth(size % of == 0)
        if (size / of).is_integer or self._divisible(Mod(size, of)):
            return Truth.YES
        return self.decide(sympy.Eq(Mod(size, of), 0))

    def _divisible(self, remainder: Any) -> bool:
        """Has an operator of the graph already required this (an earlier guard)?"""
        return self.shape_env is not None and self.shape_env.replace(remainder) in self.shape_env.divisible

    def even(self, size: Size) -> Truth:
        """Divisible by two; known, or implied by two ``chunk`` halves having met in a product."""
        known = self.multiple(size, 2)
        if known is Truth.UNKNOWN and not isinstance(size, int):
            for half in (FloorDiv(size + 1, 2), FloorDiv(size, 2)):
                if self.decide(sympy.Eq(half, size - half)) is Truth.YES:
                    return Truth.YES
        return known

    def at_most(self, size: Size, bound: int) -> Truth:
        return self.decide(size <= bound)

    def upper_bound(self, size: Size) -> int | None:
        """Largest value that the ranges allow, or None if there is no bound."""
        if isinstance(size, int):
            return size
        if self.shape_env is None:
            return None
        upper = self.shape_env.bound_sympy(size).upper
        unbounded = upper in (sympy.oo,) or not getattr(upper, "is_Integer", False) or upper >= 2**62
        return None if unbounded else int(upper)

    def guard(self, condition: Any) -> bool:
        """Decide ``condition`` on the sizes at hand and make the compiled graph depend on it."""
        if self.shape_env is None:
            return False
        return bool(self.shape_env.evaluate_expr(condition))


def _find_shape_env(graph: fx.Graph) -> Any:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            return value.node.shape_env
        if isinstance(value, torch.Tensor):
            for size in value.shape:
                if isinstance(size, torch.SymInt):
                    return size.node.shape_env
        if node.op not in ("placeholder", "get_attr"):
            # Symbols enter through the inputs; unbacked ones do not help any proof.
            return None
    return None


def _of_entries(stride: Size) -> Size:
    """A stride without the ``Max(1, size)`` that PyTorch writes, for the strides of empty tensors."""
    if not isinstance(stride, sympy.Expr):
        return stride
    return stride.replace(
        lambda e: isinstance(e, (sympy.Max, Max)) and len(e.args) == 2 and e.args[0] == 1, lambda e: e.args[1]
    )


def row_major(value: torch.Tensor) -> bool:
    """Is the tensor known to be contiguous? (``is_contiguous()`` may install guards.)"""
    expected: Size = 1
    sizes, strides = sizes_of(value.shape), sizes_of(value.stride())
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and sympy.expand(_of_entries(stride) - expected) != 0:
            return False
        expected = expected * size
    return True


def product(shape: tuple[Size, ...]) -> Size:
    total: Size = 1
    for size in shape:
        total = total * size
    return total
