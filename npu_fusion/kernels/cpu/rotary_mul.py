"""npu_rotary_mul at speed (src/rotary_mul.cpp). Formula and traps: the file of this name in meta_impls. Calls
with a matrix are the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.cpu import _rope
from npu_fusion.kernels.cpu._library import finished, kernel
from npu_fusion.meta_impls._registry import compiled_kernel

_function = kernel("rotary_mul", f"{_rope.FIELDS}q")


@compiled_kernel("npu_rotary_mul")
def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    function = _function()
    if function is None or rotate is not None or not input.numel():
        return NotImplemented
    x, cos, sin = _rope.rows(input), _rope.rows(r1), _rope.rows(r2)
    y = torch.empty(*x.shape, dtype=x.dtype)
    status = function(*_rope.arguments(x, cos, sin, y), rotary_mode == "interleave")
    return y if finished(status) else NotImplemented
