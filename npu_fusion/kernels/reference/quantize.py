"""npu_quantize on the CPU; formula and traps in the file of this name in meta_impls."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.reference._quant import saturate
from npu_fusion.meta_impls._registry import cpu_kernel
from npu_fusion.meta_impls.quantize import quantized_dim, result_dtype


@cpu_kernel("npu_quantize")
def npu_quantize(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> Tensor:
    dim = quantized_dim(input, scales, axis, div_mode) % input.dim()

    def along_axis(parameter: Tensor) -> Tensor:
        trailing = input.dim() - 1 - dim
        spread = parameter if parameter.dim() > 1 else parameter.reshape(-1, *[1] * trailing)
        return spread.to(torch.float32)

    x, s = input.to(torch.float32), along_axis(scales)
    x = x / s if div_mode else x * s
    if zero_points is not None:
        x = x + along_axis(zero_points)
    return saturate(x.contiguous(), result_dtype(dtype, div_mode))
