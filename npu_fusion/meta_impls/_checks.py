"""Argument checks shared by the fake implementations.

Every message names the operator, the argument, what was given and what is accepted. Checks on sizes go
through :func:`check_size` (``torch._check_value``), as PyTorch's own operators do: a symbolic size is never
turned into a number; a relation between sizes that must hold becomes a guard or a runtime assertion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check(condition: bool, op: str, argument: str, given: Any, accepted: str) -> None:
    """Raise ``ValueError`` unless ``condition``; ``condition`` must be a plain bool (never a SymBool)."""
    if not condition:
        raise ValueError(f"{op}: {argument} is {given}; accepted: {accepted}")


def check_dtype(op: str, argument: str, tensor: Tensor | None, *accepted: torch.dtype) -> None:
    """Refuse a tensor (None passes) whose dtype is not one of ``accepted``."""
    if tensor is not None and tensor.dtype not in accepted:
        given = names([tensor.dtype])
        raise ValueError(f"{op}: {argument} has dtype {given}; accepted: {names(accepted)}")


def check_rank(op: str, argument: str, tensor: Tensor, low: int, high: int | None = None) -> None:
    """Refuse a tensor of fewer than ``low`` or more than ``high`` dimensions."""
    if tensor.dim() < low or (high is not None and tensor.dim() > high):
        accepted = f"at least {low}" if high is None else (str(low) if low == high else f"{low} to {high}")
        raise ValueError(f"{op}: {argument} has {tensor.dim()} dimensions; accepted: {accepted}")


def check_size(condition: Any, op: str, message: str) -> None:
    """Refuse with ``ValueError`` unless ``condition`` (bool or SymBool on sizes) holds."""
    if condition is True:
        return
    torch._check_value(condition, lambda: f"{op}: {message}")


def check_choice(op: str, argument: str, value: Any, accepted: Sequence[Any]) -> None:
    if value not in accepted:
        options = ", ".join(repr(a) for a in accepted)
        raise ValueError(f"{op}: {argument} is {value!r}; accepted: {options}")


def check_shape(op: str, argument: str, tensor: Tensor | None, shape: Sequence[int | torch.SymInt]) -> None:
    """Refuse a tensor (None passes) that has not exactly ``shape``."""
    if tensor is None:
        return
    message = f"{argument} has shape {list(tensor.shape)}; accepted: {list(shape)}"
    check_size(tensor.dim() == len(shape), op, message)
    for given, wanted in zip(tensor.shape, shape, strict=True):
        check_size(given == wanted, op, message)


def check_broadcastable(
    op: str, argument: str, tensor: Tensor, shape: Sequence[int | torch.SymInt], dims: Sequence[int]
) -> None:
    """Refuse a tensor that has not ``shape``, except that each dimension in ``dims`` may also be 1."""
    free = ", ".join(map(str, dims))
    message = (
        f"{argument} has shape {list(tensor.shape)}; accepted: {list(shape)}, where dimension {free} may be 1"
    )
    check_size(tensor.dim() == len(shape), op, message)
    for dim, (given, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
        equal = given == wanted
        check_size(equal | (given == 1) if dim in dims else equal, op, message)
