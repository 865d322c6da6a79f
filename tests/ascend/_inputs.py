"""The grid of calls on which the fakes and torch_npu's Meta kernels are compared: what every family shares.

A family lists, for each of its operators, one complete call and what is changed in it::

    grid = Grid("npu_swiglu", input=f32(3, 8))
    grid.accepts("rank 1", input=f32(8))
    grid.refuses("dim out of range", dim=2)

Tensors are on the meta device. ``accepts`` and ``refuses`` say what the fake of this package does; where
torch_npu does otherwise the call is named in ``_contradictions.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from npu_fusion.meta_impls._registry import OPERATORS


def _tensors(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *shape: torch.empty(shape, dtype=dtype, device="meta")


f16, bf16, f32, f64 = map(_tensors, (torch.float16, torch.bfloat16, torch.float32, torch.float64))
i8, i16, i32, i64 = map(_tensors, (torch.int8, torch.int16, torch.int32, torch.int64))
u8, boolean = map(_tensors, (torch.uint8, torch.bool))
e4m3, e5m2 = _tensors(torch.float8_e4m3fn), _tensors(torch.float8_e5m2)
e8m0 = _tensors(torch.float8_e8m0fnu)


@dataclass(frozen=True)
class Case:
    """One call of one operator."""

    operator: str
    label: str
    arguments: dict[str, Any]
    accepted: bool

    def call(self) -> tuple[list[Any], dict[str, Any]]:
        """The arguments as the schema orders them."""
        schema = torch._C.parse_schema(f"npu::{OPERATORS[self.operator].schema}").arguments
        given = [a for a in schema if a.name in self.arguments]
        unknown = self.arguments.keys() - {a.name for a in schema}
        assert not unknown, f"{self.operator} has no argument {unknown}"
        positional = [a for a in schema if not a.kwarg_only]
        while positional and positional[-1].name not in self.arguments:
            positional.pop()
        args = [self.arguments.get(a.name, a.default_value) for a in positional]
        return args, {a.name: self.arguments[a.name] for a in given if a.kwarg_only}


@dataclass
class Grid:
    """Calls of operators that take the same arguments."""

    operators: tuple[str, ...]
    base: dict[str, Any]
    cases: list[Case] = field(default_factory=list)

    def __init__(self, *operators: str, label: str = "base", **base: Any) -> None:
        self.operators, self.base, self.cases = operators, base, []
        self.accepts(label)

    def accepts(self, label: str, **changes: Any) -> None:
        self._add(label, changes, True)

    def refuses(self, label: str, **changes: Any) -> None:
        self._add(label, changes, False)

    def _add(self, label: str, changes: dict[str, Any], accepted: bool) -> None:
        for operator in self.operators:
            self.cases.append(Case(operator, label, {**self.base, **changes}, accepted))
