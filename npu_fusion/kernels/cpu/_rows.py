"""Outputs of the row kernels: allocating them is most of what a call on one token costs."""

from __future__ import annotations

import torch
from torch import Tensor


def like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialized, of the shape of a contiguous ``x``."""
    return torch.empty_like(x, dtype=dtype)


def per_row(x: Tensor) -> Tensor:
    """Uninitialized, a float32 for each row (last dimension) of ``x``."""
    *rows, _ = x.shape
    # Sizes one by one are parsed in half the time.
    return torch.empty(*rows, dtype=torch.float32) if rows else torch.empty((), dtype=torch.float32)
