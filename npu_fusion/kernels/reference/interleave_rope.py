"""npu_interleave_rope on the CPU; formula and traps in the file of this name in meta_impls."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.reference._rope import deinterleave, rotate_half
from npu_fusion.meta_impls._registry import cpu_kernel


@cpu_kernel("npu_interleave_rope")
def npu_interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q = deinterleave(x.to(torch.float32).contiguous())
    return (q * cos.to(torch.float32) + rotate_half(q) * sin.to(torch.float32)).to(x.dtype)
