"""npu_dynamic_quant(_asymmetric) on the CPU; formulas and traps in the file of this name in meta_impls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from npu_fusion.kernels.reference._quant import (
    DTYPE_MAX,
    INT4_PER_INT32,
    group_counts,
    group_rows,
    saturate,
    symmetric_rows,
)
from npu_fusion.meta_impls._registry import cpu_kernel
from npu_fusion.meta_impls.dynamic_quant import destination

# Below this range a row has this scale on the device: nothing is divided by zero.
_SMALLEST_ASYMMETRIC_SCALE = 1e-12


@cpu_kernel("npu_dynamic_quant")
def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    dtype = destination("npu_dynamic_quant", dst_type)
    x = _smoothed(input, smooth_scales, group_index, quant_mode)

    def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
        return symmetric_rows(rows, dst_type_max or DTYPE_MAX[dtype], dtype)

    y, scale = _by_mode(quantize, x, quant_mode)
    return y, scale


@cpu_kernel("npu_dynamic_quant_asymmetric")
def npu_dynamic_quant_asymmetric(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = destination("npu_dynamic_quant_asymmetric", dst_type)
    x = _smoothed(input, smooth_scales, group_index, quant_mode)

    def quantize(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _asymmetric_rows(rows, dst_type_max or DTYPE_MAX[dtype], dtype)

    y, scale, offset = _by_mode(quantize, x, quant_mode)
    return y, scale, offset


def _smoothed(
    input: Tensor, smooth_scales: Tensor | None, group_index: Tensor | None, quant_mode: str
) -> Tensor:
    x = input.to(torch.float32).contiguous()
    if smooth_scales is None:
        return x
    factor = smooth_scales.to(torch.float32)
    if quant_mode == "perchannel":
        return x * factor.unsqueeze(-1)
    if group_index is None:
        return x * factor
    rows = x.reshape(x.shape[:-1].numel(), x.size(-1))
    # Rows of no group (-1) select the appended last row.
    table = torch.cat([factor, factor.new_ones(1, x.size(-1))])
    group = group_rows(group_counts(group_index), rows.size(0))
    return (rows * table[group]).reshape(x.shape)


def _asymmetric_rows(x: Tensor, largest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    if x.size(-1) == 0:
        low = high = x.new_zeros(x.shape[:-1])
    else:
        low, high = x.aminmax(dim=-1)
    # The smallest integer is -largest - 1, the smallest float -largest.
    steps = 2 * largest + (1 if dtype in (torch.int8, torch.quint4x2) else 0)
    scale = ((high - low) / steps).clamp(min=_SMALLEST_ASYMMETRIC_SCALE)
    offset = largest - high / scale
    return saturate(x / scale.unsqueeze(-1) + offset.unsqueeze(-1), dtype), scale, offset


def _by_mode(
    quantize: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, quant_mode: str
) -> tuple[Tensor, ...]:
    """Apply ``quantize``, which takes rows to (y, one number for each row, ...), as the mode says."""
    if quant_mode == "pertoken":
        return quantize(x)
    if quant_mode == "perchannel":
        y, *numbers = quantize(x.transpose(-1, -2))
        return y.transpose(-1, -2).contiguous(), *numbers
    y, *numbers = quantize(x.reshape(1, -1))
    columns = x.size(-1) // INT4_PER_INT32 if y.dtype == torch.int32 else x.size(-1)
    return y.reshape(*x.shape[:-1], columns), *numbers
