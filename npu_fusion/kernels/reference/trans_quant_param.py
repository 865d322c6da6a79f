"""npu_trans_quant_param on the CPU; formula and traps in the file of this name in meta_impls."""

from __future__ import annotations

from torch import Tensor

from npu_fusion.kernels.reference._quant import pack_quant_param
from npu_fusion.meta_impls._registry import cpu_kernel
from npu_fusion.meta_impls.trans_quant_param import ROUND


@cpu_kernel("npu_trans_quant_param")
def npu_trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int | None = 0) -> Tensor:
    return pack_quant_param(scale, offset, round_mode == ROUND)
