"""npu_quant_matmul at speed (src/quant_matmul.cpp). Formula and traps: the file of this name in meta_impls.

Takes every product of int8 with one weight matrix, but the bare one of many rows; batches of weights and
floating-point operands are the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fusion.kernels.cpu._library import finished, kernel
from npu_fusion.kernels.cpu._tensors import TYPES, address, contiguous, floats
from npu_fusion.kernels.reference._quant import unpack_quant_param
from npu_fusion.meta_impls._registry import compiled_kernel
from npu_fusion.meta_impls.quant_matmul import result_dtype

FIELDS = "18q"
"""``Call`` in src/quant_matmul.cpp."""


MANY_ROWS = 256
"""From here on the bare int32 product is the reference's, ``torch._int_mm``: with 512 rows oneDNN is up to a
sixth faster, and there is no epilogue to gain by (docs/performance.md)."""


_function = kernel("quant_matmul", FIELDS)


@compiled_kernel("npu_quant_matmul")
def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: Sequence[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    function = _function()
    one_bias = bias is None or bias.dim() == 1
    if function is None or x1.dtype is not torch.int8 or x2.dim() != 2 or not one_bias:
        return NotImplemented
    output = result_dtype(output_dtype)
    *batch, rows, inner = x1.shape
    if batch:
        repeats = torch.Size(batch).numel()
        x1 = x1.reshape(repeats * rows, inner)
        if pertoken_scale is not None:
            pertoken_scale = pertoken_scale.repeat(repeats)
    if x1.stride(1) != 1:
        x1 = x1.contiguous()
    x1_step = x1.stride(0)
    columns = x2.shape[1]
    x2_step, x2_across = x2.stride()
    transposed = x2_step == 1
    if transposed:
        x2_step = x2_across
    elif x2_across != 1:
        x2 = x2.contiguous()
        x2_step = columns
    if output is torch.int32 and bias is None and x1.shape[0] >= MANY_ROWS:
        return NotImplemented
    y = torch.empty((*batch, rows, columns), dtype=output)

    int_bias = float_bias = None
    if bias is not None:
        if bias.dtype is torch.int32:
            int_bias = contiguous(bias)
        else:
            float_bias = floats(bias)
    if scale.dtype is torch.int64:
        scale, packed_offset = unpack_quant_param(scale)
        offset = packed_offset if output is torch.int8 else None
    scale = floats(scale)
    offset_step = 0
    if offset is not None:
        offset = contiguous(offset)
        offset_step = offset.shape[0] != 1
    if pertoken_scale is not None:
        pertoken_scale = contiguous(pertoken_scale)
    status = function(
        x1.data_ptr(),
        x1_step,
        x2.data_ptr(),
        x2_step,
        transposed,
        x1.shape[0],
        columns,
        inner,
        scale.data_ptr(),
        scale.shape[0] != 1,
        address(pertoken_scale),
        address(int_bias),
        address(float_bias),
        address(offset),
        offset_step,
        y.data_ptr(),
        TYPES[output],
        torch.get_num_threads(),
    )
    return y if finished(status) else NotImplemented
