"""What the RMSNorm kernels are called with first: ``x_type``, ``gamma_type`` and ``Norm`` of src/norm.h."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.cpu._tensors import TYPES, address

FIELDS = "11qd"
"""Of :func:`arguments`, as ``Library.function`` takes them."""


def arguments(
    x1: Tensor,
    x2: Tensor | None,
    gamma: Tensor,
    epsilon: float,
    *,
    beta: Tensor | None = None,
    x: Tensor | None = None,
    rstd: Tensor | None = None,
) -> tuple[float, ...]:
    """For contiguous tensors; ``x`` and ``rstd`` are written."""
    width = gamma.numel()
    return (
        TYPES[x1.dtype],
        TYPES[gamma.dtype],
        x1.data_ptr(),
        address(x2),
        gamma.data_ptr(),
        address(beta),
        address(x),
        address(rstd),
        x1.numel() // width,
        width,
        torch.get_num_threads(),
        epsilon,
    )


def new_rstd(x: Tensor, gamma: Tensor) -> Tensor:
    """Uninitialized, of the shape of ``x``, each normalized dimension 1."""
    rank = gamma.dim()
    return torch.empty(*x.shape[: x.dim() - rank], *[1] * rank, dtype=torch.float32)
