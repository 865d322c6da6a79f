"""Independent arithmetic for the SwiGLU kernel tests: float64 gates and the check of a rounded result."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

FP32_EPS = 2.0**-23


def swish(a: float, alpha: float = 1.0) -> float:
    """``a / (1 + exp(-alpha * a))`` of one number, without overflow for any ``a``."""
    z = alpha * a
    return a / (1 + math.exp(-z)) if z >= 0 else a * math.exp(z) / (1 + math.exp(z))


def swish_slope(a: float, alpha: float = 1.0) -> float:
    """The derivative of :func:`swish`."""
    z = max(-700.0, min(700.0, alpha * a))
    sigmoid = 1 / (1 + math.exp(-z))
    return sigmoid + alpha * a * sigmoid * (1 - sigmoid)


def groups_of_rows(counts: list[int], rows: int) -> list[int | None]:
    """The group of each row; None for rows of no group."""
    assigned: list[int | None] = [group for group, count in enumerate(counts) for _ in range(count)]
    return assigned + [None] * (rows - len(assigned))


def half_away(x: Tensor) -> Tensor:
    return x.sign() * (x.abs() + 0.5).floor()


ROUNDINGS: dict[int, Callable[[Tensor], Tensor]] = {
    0: torch.round,
    1: half_away,
    2: torch.floor,
    3: torch.ceil,
    4: torch.trunc,
}


def assert_rounded(
    y: Tensor,
    exact: Tensor,
    tolerance: Tensor | float,
    rounding: Callable[[Tensor], Tensor] = torch.round,
    low: int = -128,
    high: int = 127,
) -> None:
    """``y`` is the float64 ``exact``, off by at most ``tolerance`` before it was rounded and saturated.

    ``tolerance`` is a small part of one step, so ``y`` may be another integer only next to a tie.
    """
    assert torch.as_tensor(tolerance).lt(0.25).all(), "fp32 is too imprecise on these inputs to tell"
    least = rounding(exact - tolerance).clamp(low, high)
    most = rounding(exact + tolerance).clamp(low, high)
    wrong = (y.double() < least) | (y.double() > most)
    assert not wrong.any(), f"got {y[wrong].tolist()}, exact values {exact[wrong].tolist()}"
