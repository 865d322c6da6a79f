"""npu_swiglu on the CPU. Formula and traps: npu_fusion/meta_impls/swiglu.py."""

from __future__ import annotations

from torch import Tensor

from npu_fusion.kernels.reference._swiglu import swiglu
from npu_fusion.meta_impls._registry import cpu_kernel


@cpu_kernel("npu_swiglu")
def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu of the first half of ``input`` along ``dim`` times the second; fp32 inside, rounded once."""
    return swiglu(input.float(), dim, activate_left=True).to(input.dtype).contiguous()
