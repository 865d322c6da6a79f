"""npu_transpose_batchmatmul on the CPU; formula and traps in the file of this name in meta_impls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fusion.kernels.reference._quant import saturate, unpack_quant_param
from npu_fusion.meta_impls._registry import cpu_kernel
from npu_fusion.meta_impls.transpose_batchmatmul import IDENTITY, PERM_Y


@cpu_kernel("npu_transpose_batchmatmul")
def npu_transpose_batchmatmul(
    input: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    perm_x1: Sequence[int] | None = None,
    perm_x2: Sequence[int] | None = None,
    perm_y: Sequence[int] | None = None,
    batch_split_factor: int | None = 1,
) -> Tensor:
    a = input.permute(*(perm_x1 or IDENTITY)).to(torch.float32)
    w = weight.permute(*(perm_x2 or IDENTITY)).to(torch.float32)
    y = torch.matmul(a, w).permute(*PERM_Y)
    rows, batch, columns = y.shape
    if scale is not None:
        factor, offset = unpack_quant_param(scale)
        return saturate(y.reshape(rows, 1, batch * columns) * factor + offset, torch.int8)
    y = y.to(input.dtype).contiguous()
    parts = batch_split_factor or 1
    if parts > 1:
        return y.view(rows, parts, batch // parts * columns).transpose(0, 1).contiguous()
    return y
