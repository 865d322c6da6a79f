"""npu_add_rms_norm_quant at speed (src/add_rms_norm_quant.cpp). Formula and traps: the file of this name in
meta_impls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from npu_fusion.kernels.cpu import _norm
from npu_fusion.kernels.cpu._library import finished, kernel
from npu_fusion.kernels.cpu._rows import like
from npu_fusion.kernels.cpu._tensors import address, contiguous, floats
from npu_fusion.meta_impls._registry import compiled_kernel

_function = kernel("add_rms_norm_quant", f"{_norm.FIELDS}7q")


@compiled_kernel("npu_add_rms_norm_quant")
def npu_add_rms_norm_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales1: Tensor,
    zero_points1: Tensor | None,
    beta: Tensor | None = None,
    scales2: Tensor | None = None,
    zero_points2: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-06,
    div_mode: bool = True,
    dst_type: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    function = _function()
    if function is None:
        return NotImplemented
    x1, x2, gamma, beta = contiguous(x1), contiguous(x2), contiguous(gamma), _maybe(beta, contiguous)
    parameters = [_maybe(p, floats) for p in (scales1, zero_points1, scales2, zero_points2)]
    y1, y2, x = like(x1, torch.int8), like(x1, torch.int8), torch.empty_like(x1)
    scale1, zero_point1, scale2, zero_point2 = (address(p) for p in parameters)
    status = function(
        *_norm.arguments(x1, x2, gamma, epsilon, beta=beta, x=x),
        scale1,
        zero_point1,
        y1.data_ptr(),
        scale2,
        zero_point2,
        y2.data_ptr(),
        div_mode,
    )
    return (y1, y2, x) if finished(status) else NotImplemented


def _maybe(x: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if x is None else change(x)
