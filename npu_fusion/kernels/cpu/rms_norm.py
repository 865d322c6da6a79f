"""npu_rms_norm at speed (src/rms_norm.cpp). Formula and traps: the file of this name in meta_impls."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from npu_fusion.kernels.cpu import _norm
from npu_fusion.kernels.cpu._library import finished, library
from npu_fusion.kernels.cpu._tensors import contiguous
from npu_fusion.meta_impls._registry import compiled_kernel


@functools.cache
def function() -> Callable[..., int] | None:
    found = library()
    return None if found is None else found.function("rms_norm", f"{_norm.FIELDS}2q")


@compiled_kernel("npu_rms_norm")
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    kernel = function()
    if kernel is None:
        return NotImplemented
    x, gamma = contiguous(input), contiguous(gamma)
    y, rstd = torch.empty_like(x), _norm.new_rstd(x, gamma)
    status = kernel(*_norm.arguments(x, None, gamma, epsilon, rstd=rstd), y.data_ptr(), 0)
    return (y, rstd) if finished(status) else NotImplemented
