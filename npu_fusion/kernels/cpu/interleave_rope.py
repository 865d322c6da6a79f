"""npu_interleave_rope at speed (src/interleave_rope.cpp). Formula and traps: the file of this name in
meta_impls."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.cpu import _rope
from npu_fusion.kernels.cpu._library import finished, kernel
from npu_fusion.meta_impls._registry import compiled_kernel

_function = kernel("interleave_rope", _rope.FIELDS)


@compiled_kernel("npu_interleave_rope")
def npu_interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    function = _function()
    if function is None or not x.numel():
        return NotImplemented
    x, cos, sin = _rope.rows(x), _rope.rows(cos), _rope.rows(sin)
    y = torch.empty(*x.shape, dtype=x.dtype)
    return y if finished(function(*_rope.arguments(x, cos, sin, y))) else NotImplemented
