"""npu_add_rms_norm_dynamic_quant at speed (src/add_rms_norm_dynamic_quant.cpp). Formula and traps: the file
of this name in meta_impls. Results in int8; int4 is the reference's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fusion.kernels.cpu import _norm
from npu_fusion.kernels.cpu._library import finished, kernel
from npu_fusion.kernels.cpu._rows import like, per_row
from npu_fusion.kernels.cpu._tensors import address, contiguous
from npu_fusion.meta_impls._dtypes import torch_dtype
from npu_fusion.meta_impls._registry import compiled_kernel
from npu_fusion.meta_impls.add_rms_norm_dynamic_quant import present

_function = kernel("add_rms_norm_dynamic_quant", f"{_norm.FIELDS}6q")


@compiled_kernel("npu_add_rms_norm_dynamic_quant")
def npu_add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    smooth_scale1: Tensor | None = None,
    smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: Sequence[bool] | None = None,
    y_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    function = _function()
    if function is None or (y_dtype is not None and torch_dtype(y_dtype, torch.int8) is not torch.int8):
        return NotImplemented
    x1, x2, gamma = contiguous(x1), contiguous(x2), contiguous(gamma)
    if beta is not None:
        beta = contiguous(beta)
    if smooth_scale1 is not None:
        smooth_scale1 = contiguous(smooth_scale1)
    if smooth_scale2 is not None:
        smooth_scale2 = contiguous(smooth_scale2)
    exist1, exist2 = present(smooth_scale1, smooth_scale2, output_mask)
    x = torch.empty_like(x1)
    (y1, scale1), (y2, scale2) = _output(exist1, x1), _output(exist2, x1)
    status = function(
        *_norm.arguments(x1, x2, gamma, epsilon, beta=beta, x=x),
        address(smooth_scale1),
        y1.data_ptr() if exist1 else 0,
        scale1.data_ptr(),
        address(smooth_scale2),
        y2.data_ptr() if exist2 else 0,
        scale2.data_ptr(),
    )
    return (y1, y2, x, scale1, scale2) if finished(status) else NotImplemented


def _output(exists: bool, x: Tensor) -> tuple[Tensor, Tensor]:
    """``y`` and its scales."""
    if exists:
        return like(x, torch.int8), per_row(x)
    return torch.empty(0, dtype=torch.int8), torch.empty(0, dtype=torch.float32)
