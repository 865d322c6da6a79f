"""Checks that the layers and functions of this package share. ``who`` is what the error starts with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FEWEST_INPUTS, MOST_INPUTS = 2, 131_071
"""``torch._int_mm`` misreads a matrix of one row on the CPU (pytorch issue 195066); of more inputs than the
other a sum of int8 products need not fit int32."""
WEIGHT_QUANT = ("per_channel", "per_tensor")


def check_choice(who: str, name: str, given: object, accepted: Iterable[object]) -> None:
    """Raise ``ValueError`` unless ``given`` is one of ``accepted``."""
    accepted = tuple(accepted)
    if given not in accepted:
        raise ValueError(f"{who}: {name} is {given!r}; accepted: {', '.join(map(repr, accepted))}")


def check_float(who: str, name: str, x: Tensor) -> None:
    """Raise ``ValueError`` unless ``x`` is float16, bfloat16 or float32."""
    if x.dtype not in FLOATS:
        raise ValueError(
            f"{who}: {name} has dtype {x.dtype}; accepted: {', '.join(str(dtype) for dtype in FLOATS)}"
        )


def check_sizes(who: str, in_features: int, out_features: int) -> None:
    """Raise ``ValueError`` unless a linear layer with int8 products can have these sizes."""
    if not FEWEST_INPUTS <= in_features <= MOST_INPUTS or out_features < 1:
        raise ValueError(
            f"{who}: in_features is {in_features} and out_features {out_features}; accepted: in_features "
            f"{FEWEST_INPUTS} to {MOST_INPUTS} and out_features at least 1"
        )


def check_linear(who: str, module: object) -> nn.Linear:
    """``module``, a linear layer that can be quantized: in floating point and finite."""
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{who}: module must be a torch.nn.Linear, got {type(module).__name__}")
    check_float(who, "weight", module.weight)
    for name, parameter in module.named_parameters(recurse=False):
        if not parameter.isfinite().all():
            raise ValueError(f"{who}: {name} has infinities or NaN; accepted: finite values")
    return module


def check_rows(who: str, x: Tensor, in_features: int) -> None:
    """Raise ``ValueError`` unless ``x`` is [..., in_features]."""
    if x.dim() == 0 or x.size(-1) != in_features:
        raise ValueError(
            f"{who}: x has shape {list(x.shape)}; accepted: [..., {in_features}] (in_features last)"
        )


def one_scale(who: str, name: str, value: float | Tensor) -> float:
    """A positive number, given as one or as a tensor of one element."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{who}: {name} must be a number or a tensor, got {type(value).__name__}")
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{who}: {name} has shape {list(value.shape)}; accepted: one element")
        value = value.item()
    if not 0 < value < float("inf"):
        raise ValueError(f"{who}: {name} is {value}; accepted: a positive finite number")
    return float(value)


def zero_point(who: str, name: str, value: int | Tensor | None) -> int | None:
    """An int8 number, given as one or as an integer tensor of one element; or None."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_floating_point() or value.is_complex():
            raise ValueError(
                f"{who}: {name} has dtype {value.dtype} and shape {list(value.shape)}; "
                "accepted: one integer element"
            )
        value = int(value.item())
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{who}: {name} must be an integer, a tensor or None, got {type(value).__name__}")
    if not -128 <= value <= 127:
        raise ValueError(f"{who}: {name} is {value}; accepted: -128 to 127")
    return value
