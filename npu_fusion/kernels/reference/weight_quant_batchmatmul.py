"""npu_weight_quant_batchmatmul on the CPU; formula and traps in the file of this name in meta_impls."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion import formats
from npu_fusion.kernels.reference._float_operands import float4_rows, powers_of_two
from npu_fusion.kernels.reference._quant import saturate, unpack_int4, unpack_quant_param
from npu_fusion.meta_impls._registry import cpu_kernel
from npu_fusion.meta_impls._weight_formats import format_of, microscaled, packed_along_rows


@cpu_kernel("npu_weight_quant_batchmatmul")
def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    if microscaled(antiquant_scale):
        antiquant_scale = powers_of_two(antiquant_scale).to(x.dtype)
    w = _numbers(weight, weight_dtype)
    if antiquant_offset is not None:
        w = w + _for_rows(antiquant_offset, w.size(0), antiquant_group_size)
    w = (w * _for_rows(antiquant_scale, w.size(0), antiquant_group_size)).to(x.dtype)
    y = x.to(torch.float32) @ w.to(torch.float32)
    if bias is not None:
        y = y + bias.to(torch.float32)
    if quant_scale is None:
        return y.to(x.dtype)
    if quant_scale.dtype == torch.int64:
        quant_scale, quant_offset = unpack_quant_param(quant_scale)
    y = y * quant_scale
    return saturate(y if quant_offset is None else y + quant_offset, torch.int8)


def _numbers(weight: Tensor, weight_dtype: int | None) -> Tensor:
    """The numbers of the weight, fp32 [K, N]."""
    form = format_of(weight, weight_dtype)
    if form.per_element == 1:
        return weight.to(torch.float32) if form.integer else formats.decode(weight, form.numbers)
    along_rows = packed_along_rows(weight)
    lines = weight.t() if along_rows else weight
    unpacked = unpack_int4(lines).to(torch.float32) if form.integer else float4_rows(lines, form.numbers)
    return unpacked.t() if along_rows else unpacked


def _for_rows(parameter: Tensor, rows: int, group_size: int) -> Tensor:
    """``parameter`` in fp32, one row for each row of the weight where it has one for each group."""
    parameter = parameter.to(torch.float32)
    if parameter.dim() == 1 or parameter.size(0) == 1:
        return parameter
    return parameter.repeat_interleave(group_size, dim=0)[:rows]
