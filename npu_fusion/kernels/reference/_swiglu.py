"""The gated activation that every SwiGLU operator shares, in fp32 and in the kernels' order of operations.

Formula: op-plugin documentation and public kernel sources of torch_npu 2.13.0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gate(act: Tensor, lin: Tensor, alpha: float = 1.0) -> Tensor:
    """``act / (1 + exp(-alpha * act)) * lin``: silu(act) * lin where ``alpha`` is 1.

    PyTorch's own silu computes that formula; it is called so that a rewrite of ``silu(a) * b`` is
    bit-identical. (It differs from the separate steps in the last bit, and below -88 by a denormal where
    they give -0.0.)
    """
    if alpha == 1.0:
        return torch.nn.functional.silu(act) * lin
    return act / (1 + torch.exp(-alpha * act)) * lin


def halves(x: Tensor, dim: int, activate_left: bool) -> tuple[Tensor, Tensor]:
    """The halves of ``x`` along ``dim`` as (the one to activate, the linear one)."""
    left, right = x.tensor_split(2, dim)
    return (left, right) if activate_left else (right, left)


def swiglu(x_fp32: Tensor, dim: int, activate_left: bool) -> Tensor:
    """silu of one half of ``x_fp32`` times the other half; ``dim`` shrinks to half its size."""
    return gate(*halves(x_fp32, dim, activate_left))
