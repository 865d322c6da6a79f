"""Argument checks that every RMSNorm operator shares."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import check_dtype, check_rank, check_shape, check_size


def check_gamma(op: str, argument: str, x: Tensor, gamma: Tensor) -> None:
    """``gamma`` spans the trailing dimensions of ``x`` that are normalized together."""
    check_rank(op, "gamma", gamma, 1, x.dim())
    normalized = x.shape[x.dim() - gamma.dim() :]
    check_shape(op, "gamma", gamma, normalized)
    for size in normalized:
        check_size(size != 0, op, f"{argument} has shape {list(x.shape)}; accepted: normalized sizes above 0")


def check_addends(op: str, x1: Tensor, x2: Tensor) -> None:
    """``x1`` and ``x2`` are added without broadcasting or type promotion."""
    check_dtype(op, "x2", x2, x1.dtype)
    check_shape(op, "x2", x2, x1.shape)


def new_rstd(x: Tensor, gamma: Tensor) -> Tensor:
    """fp32, the shape of ``x`` with every normalized dimension 1."""
    leading = x.shape[: x.dim() - gamma.dim()]
    return x.new_empty([*leading, *[1] * gamma.dim()], dtype=torch.float32)
