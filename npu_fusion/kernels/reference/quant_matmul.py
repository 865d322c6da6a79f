"""npu_quant_matmul on the CPU; formula and traps in the file of this name in meta_impls."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fusion.kernels.reference._quant import dequantize, saturate, unpack_quant_param
from npu_fusion.kernels.reference._quant_matmul_floats import float_product
from npu_fusion.meta_impls._quant_matmul import Call
from npu_fusion.meta_impls._registry import cpu_kernel
from npu_fusion.meta_impls.quant_matmul import result_dtype


@cpu_kernel("npu_quant_matmul")
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
    if x1.dtype != torch.int8:
        return float_product(
            Call(
                x1,
                x2,
                scale,
                offset,
                pertoken_scale,
                bias,
                output_dtype,
                x1_dtype,
                x2_dtype,
                pertoken_scale_dtype,
                scale_dtype,
                group_sizes,
                y_scale,
            )
        )
    output = result_dtype(output_dtype)
    acc = int8_matmul(x1, x2)
    if output == torch.int32:
        return acc if bias is None else acc + bias
    if scale.dtype == torch.int64:
        scale, packed_offset = unpack_quant_param(scale)
        offset = packed_offset if output == torch.int8 else None
    y = dequantize(acc, scale, pertoken_scale, bias)
    if output == torch.int8:
        return saturate(y if offset is None else y + offset, torch.int8)
    return y.to(output)


def int8_matmul(x1: Tensor, x2: Tensor) -> Tensor:
    """``x1 @ x2`` of int8 operands, exactly, as contiguous int32 (sums beyond 32 bits wrap)."""
    if x1.device.type != "cpu":
        # CUDA multiplies no int32 matrices, and int8 ones of some sizes only. float64 holds every sum.
        return torch.matmul(x1.double(), x2.double()).to(torch.int64).to(torch.int32).contiguous()
    if not _fast_product_is_exact():
        return torch.matmul(x1.to(torch.int32), x2.to(torch.int32)).contiguous()
    rows, inner = x1.shape[-2:]
    columns = x2.size(-1)
    if x2.dim() == 2:
        product = torch._int_mm(_plain(x1.reshape(x1.shape[:-1].numel(), inner)), _plain(x2))
        return product.reshape(*x1.shape[:-1], columns)
    batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    left = x1.expand(*batch, rows, inner).reshape(batch.numel(), rows, inner)
    right = x2.expand(*batch, inner, columns).reshape(batch.numel(), inner, columns)
    result = torch.empty(batch.numel(), rows, columns, dtype=torch.int32, device=x1.device)
    for index in range(batch.numel()):
        torch._int_mm(_plain(left[index]), _plain(right[index]), out=result[index])
    return result.reshape(*batch, rows, columns)


def _plain(x: Tensor) -> Tensor:
    """The matrix ``x`` with strides that ``torch._int_mm`` (2.13) reads right: it gives garbage for repeated
    rows, and for a single row or column that has the strides of its transpose."""
    (rows, columns), (down, right) = x.shape, x.stride()
    if right == 1 and down >= columns:
        return x
    if down == 1 and right >= rows and min(rows, columns) > 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


@functools.cache
def _fast_product_is_exact() -> bool:
    """Whether ``torch._int_mm`` is exact on this processor.

    Without the VNNI instructions its library may add pairs of products in 16 bits, which saturates for large
    operands; only such operands tell.
    """
    extremes = torch.tensor([[-128], [127]], dtype=torch.int8)
    matrix = extremes.repeat(16, 64)
    x2 = extremes.t().repeat(64, 16)
    for x1 in (matrix, matrix[:1], matrix[1:2]):
        exact = torch.matmul(x1.to(torch.int32), x2.to(torch.int32))
        for right in (x2, x2.t().contiguous().t()):
            if not torch.equal(torch._int_mm(x1, right), exact):
                return False
    return True
