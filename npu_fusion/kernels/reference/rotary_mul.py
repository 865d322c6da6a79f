"""npu_rotary_mul on the CPU; formula and traps in the file of this name in meta_impls."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.reference._rope import rotate_half, rotate_pairs
from npu_fusion.meta_impls._registry import cpu_kernel


@cpu_kernel("npu_rotary_mul")
def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    x = input.to(torch.float32).contiguous()
    if rotate is not None:
        rotated = x @ rotate.to(torch.float32)
    else:
        rotated = rotate_half(x) if rotary_mode == "half" else rotate_pairs(x)
    return (x * r1.to(torch.float32) + rotated * r2.to(torch.float32)).to(input.dtype)
