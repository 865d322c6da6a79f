"""npu_add_rms_norm(_cast) at speed (src/rms_norm.cpp). Formula and traps: the file of this name in
meta_impls."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.cpu import _norm
from npu_fusion.kernels.cpu._library import finished
from npu_fusion.kernels.cpu._rows import like
from npu_fusion.kernels.cpu._tensors import address, contiguous
from npu_fusion.kernels.cpu.rms_norm import function
from npu_fusion.meta_impls._registry import compiled_kernel


@compiled_kernel("npu_add_rms_norm")
def npu_add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06
) -> tuple[Tensor, Tensor, Tensor]:
    return _run(x1, x2, gamma, epsilon, None)


@compiled_kernel("npu_add_rms_norm_cast")
def npu_add_rms_norm_cast(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1 = contiguous(x1)
    wide = like(x1, torch.float32)
    results = _run(x1, x2, gamma, epsilon, wide)
    return results if results is NotImplemented else (wide, *results)


def _run(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float, wide: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = function()
    if kernel is None:
        return NotImplemented
    x1, x2, gamma = contiguous(x1), contiguous(x2), contiguous(gamma)
    y, x, rstd = torch.empty_like(x1), torch.empty_like(x1), _norm.new_rstd(x1, gamma)
    arguments = _norm.arguments(x1, x2, gamma, epsilon, x=x, rstd=rstd)
    return (y, rstd, x) if finished(kernel(*arguments, y.data_ptr(), address(wide))) else NotImplemented
