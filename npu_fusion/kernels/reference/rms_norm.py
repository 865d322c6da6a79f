"""npu_rms_norm on the CPU; formula and traps in the file of this name in meta_impls."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.reference._norm import rms_normalize
from npu_fusion.meta_impls._registry import cpu_kernel


@cpu_kernel("npu_rms_norm")
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    n, rstd = rms_normalize(input.to(torch.float32).contiguous(), gamma, epsilon)
    return n.to(input.dtype), rstd
