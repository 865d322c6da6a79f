"""The rotations that rotary embeddings are made of, on the last dimension (even)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_half(x: Tensor) -> Tensor:
    """(x1, x2) to (-x2, x1), for the halves of the last dimension."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def rotate_pairs(x: Tensor) -> Tensor:
    """(a, b) to (-b, a), for each pair of adjacent elements."""
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def deinterleave(x: Tensor) -> Tensor:
    """The elements at even positions, then those at odd positions."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
