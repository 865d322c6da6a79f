"""npu_swiglu at speed (src/swiglu.cpp). Formula and traps: the file of this name in meta_impls. Along the
last dimension; other dimensions are the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.cpu._library import finished, kernel
from npu_fusion.kernels.cpu._tensors import TYPES, contiguous
from npu_fusion.meta_impls._registry import compiled_kernel

_function = kernel("swiglu", "6q")


@compiled_kernel("npu_swiglu")
def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    function = _function()
    if function is None or dim not in (-1, input.dim() - 1) or not input.numel():
        return NotImplemented
    x = contiguous(input)
    *rows, channels = x.shape
    width = channels // 2
    y = torch.empty(*rows, width, dtype=x.dtype)
    status = function(
        x.data_ptr(),
        TYPES[x.dtype],
        y.data_ptr(),
        y.numel() // width,
        width,
        torch.get_num_threads(),
    )
    return y if finished(status) else NotImplemented
