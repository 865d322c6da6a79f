"""npu_add_rms_norm(_cast) on the CPU; formula and traps in the file of this name in meta_impls."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.reference._norm import add_rms_normalize
from npu_fusion.meta_impls._registry import cpu_kernel


@cpu_kernel("npu_add_rms_norm")
def npu_add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06
) -> tuple[Tensor, Tensor, Tensor]:
    n, rstd, x = add_rms_normalize(x1, x2, gamma, epsilon)
    return n.to(x1.dtype), rstd, x


@cpu_kernel("npu_add_rms_norm_cast")
def npu_add_rms_norm_cast(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, rstd, x = npu_add_rms_norm(x1, x2, gamma, epsilon)
    return y.to(torch.float32, copy=True), y, rstd, x
