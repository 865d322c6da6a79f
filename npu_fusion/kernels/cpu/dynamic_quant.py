"""npu_dynamic_quant(_asymmetric) at speed (src/dynamic_quant.cpp). Formulas and traps: the file of this name
in meta_impls. Results in int8, per token, and symmetric ones also per tensor; everything else is the
reference's."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from npu_fusion.kernels.cpu._library import finished, library
from npu_fusion.kernels.cpu._rows import like, per_row
from npu_fusion.kernels.cpu._tensors import TYPES, address, contiguous, floats
from npu_fusion.meta_impls._registry import compiled_kernel
from npu_fusion.meta_impls.dynamic_quant import destination

_FIELDS = "13q"


@functools.cache
def _symmetric() -> Callable[..., int] | None:
    found = library()
    return None if found is None else found.function("dynamic_quant", _FIELDS)


@functools.cache
def _asymmetric() -> Callable[..., int] | None:
    found = library()
    return None if found is None else found.function("dynamic_quant_asymmetric", _FIELDS)


@compiled_kernel("npu_dynamic_quant")
def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    function = _symmetric()
    if function is None or quant_mode == "perchannel" or not _taken(input, dst_type):
        return NotImplemented
    whole_tensor = quant_mode == "pertensor"
    scale = torch.empty(1, dtype=torch.float32) if whole_tensor else per_row(input)
    y = _run(function, input, smooth_scales, group_index, scale, scale, whole_tensor)
    return NotImplemented if y is None else (y, scale)


@compiled_kernel("npu_dynamic_quant_asymmetric")
def npu_dynamic_quant_asymmetric(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    function = _asymmetric()
    if function is None or quant_mode != "pertoken" or not _taken(input, dst_type):
        return NotImplemented
    scale, offset = per_row(input), per_row(input)
    y = _run(function, input, smooth_scales, group_index, scale, offset, False)
    return NotImplemented if y is None else (y, scale, offset)


def _taken(input: Tensor, dst_type: int | None) -> bool:
    int8 = dst_type is None or destination("npu_dynamic_quant", dst_type) is torch.int8
    return int8 and input.numel() > 0


def _run(
    function: Callable[..., int],
    input: Tensor,
    smooth_scales: Tensor | None,
    group_index: Tensor | None,
    scale: Tensor,
    offset: Tensor,
    whole_tensor: bool,
) -> Tensor | None:
    """``y``; ``scale`` and ``offset`` (only the asymmetric kernel's) are written."""
    x = contiguous(input)
    width = x.shape[-1]
    y = like(x, torch.int8)
    groups = 0
    smooth_type = x.dtype
    if smooth_scales is not None:
        smooth_scales = contiguous(smooth_scales) if smooth_scales.dtype is x.dtype else floats(smooth_scales)
        smooth_type = smooth_scales.dtype
    if group_index is not None:
        group_index = contiguous(group_index)
        groups = group_index.shape[0]
    status = function(
        x.data_ptr(),
        TYPES[x.dtype],
        address(smooth_scales),
        TYPES[smooth_type],
        address(group_index),
        y.data_ptr(),
        scale.data_ptr(),
        offset.data_ptr(),
        x.numel() // width,
        width,
        groups,
        whole_tensor,
        torch.get_num_threads(),
    )
    return y if finished(status) else None
