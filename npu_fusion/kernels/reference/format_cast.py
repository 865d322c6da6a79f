"""npu_format_cast on the CPU: a copy (see the file of this name in meta_impls)."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.meta_impls._registry import cpu_kernel


@cpu_kernel("npu_format_cast")
def npu_format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    return input.clone(memory_format=torch.contiguous_format)


@cpu_kernel("npu_format_cast.Tensor")
def npu_format_cast_tensor(
    input: Tensor, dst: Tensor, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    return input.clone(memory_format=torch.contiguous_format)
