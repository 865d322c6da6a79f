"""npu_quantize at speed (src/quantize.cpp). Formula and traps: the file of this name in meta_impls. Results
in int8, one scale or one for each column of the last dimension; everything else is the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.cpu._library import finished, kernel
from npu_fusion.kernels.cpu._rows import like
from npu_fusion.kernels.cpu._tensors import TYPES, address, contiguous, floats
from npu_fusion.meta_impls._registry import compiled_kernel
from npu_fusion.meta_impls.quantize import quantized_dim, result_dtype

_function = kernel("quantize", "10q")


@compiled_kernel("npu_quantize")
def npu_quantize(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> Tensor:
    function = _function()
    one_scale = scales.numel() == 1
    last = quantized_dim(input, scales, axis, div_mode) in (-1, input.dim() - 1)
    if function is None or not (one_scale or last) or not input.numel():
        return NotImplemented
    if result_dtype(dtype, div_mode) is not torch.int8:
        return NotImplemented
    x, scales = contiguous(input), floats(scales)
    if zero_points is not None:
        zero_points = floats(zero_points)
    width = x.shape[-1]
    y = like(x, torch.int8)
    status = function(
        x.data_ptr(),
        TYPES[x.dtype],
        scales.data_ptr(),
        address(zero_points),
        y.data_ptr(),
        x.numel() // width,
        width,
        not one_scale,
        div_mode,
        torch.get_num_threads(),
    )
    return y if finished(status) else NotImplemented
