"""npu_swiglu_quant at speed (src/swiglu_quant.cpp). Formula and traps: the file of this name in meta_impls.
Results in int8; int4 is the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.cpu._library import finished, kernel
from npu_fusion.kernels.cpu._rows import per_row
from npu_fusion.kernels.cpu._tensors import TYPES, address, contiguous
from npu_fusion.meta_impls._registry import compiled_kernel
from npu_fusion.meta_impls.swiglu_quant import CUMSUM

_function = kernel("swiglu_quant", "14q")


@compiled_kernel("npu_swiglu_quant")
def npu_swiglu_quant(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    offsets: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    group_list_type: int = 0,
    dst_type: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    function = _function()
    if function is None or dst_type not in (None, torch.int8):
        return NotImplemented
    x = contiguous(x)
    *rows, channels = x.shape
    width = channels // 2
    y = torch.empty(*rows, width, dtype=torch.int8)
    scale = per_row(x)
    groups = 0
    if smooth_scales is not None:
        smooth_scales = _by_column(smooth_scales, width)
    if offsets is not None:
        offsets = _by_column(offsets, width)
    if group_index is not None:
        group_index = contiguous(group_index)
        groups = group_index.shape[0]
    status = function(
        x.data_ptr(),
        TYPES[x.dtype],
        address(smooth_scales),
        address(offsets),
        address(group_index),
        y.data_ptr(),
        scale.data_ptr(),
        scale.numel(),
        width,
        groups,
        group_list_type == CUMSUM,
        activate_left,
        quant_mode,
        torch.get_num_threads(),
    )
    return (y, scale) if finished(status) else NotImplemented


def _by_column(by_group: Tensor, width: int) -> Tensor:
    """[G, H] of [G, H] or [G]."""
    return contiguous(by_group if by_group.dim() == 2 else by_group.unsqueeze(1).expand(-1, width))
