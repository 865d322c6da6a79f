"""npu_dequant_bias on the CPU; formula and traps in the file of this name in meta_impls."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.reference._quant import dequantize
from npu_fusion.meta_impls._dtypes import torch_dtype
from npu_fusion.meta_impls._registry import cpu_kernel


@cpu_kernel("npu_dequant_bias")
def npu_dequant_bias(
    x: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    *,
    output_dtype: int | torch.dtype | None = None,
) -> Tensor:
    y = dequantize(x, weight_scale, activation_scale, bias)
    return y.contiguous().to(torch_dtype(output_dtype, torch.float16))
