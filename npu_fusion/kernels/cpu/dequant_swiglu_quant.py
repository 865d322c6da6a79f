"""npu_dequant_swiglu_quant at speed (src/dequant_swiglu_quant.cpp). Formula and traps: the file of this name
in meta_impls. Results in int8 along the last dimension; everything else is the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.cpu._library import finished, kernel
from npu_fusion.kernels.cpu._tensors import TYPES, address, contiguous, floats, optional_contiguous
from npu_fusion.meta_impls._dtypes import torch_dtype
from npu_fusion.meta_impls._registry import compiled_kernel
from npu_fusion.meta_impls.dequant_swiglu_quant import RINT

_function = kernel("dequant_swiglu_quant", "20q3d")


@compiled_kernel("npu_dequant_swiglu_quant")
def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    function = _function()
    *tokens, channels = x.shape
    along_rows = activate_dim is None or activate_dim in (-1, len(tokens))
    if function is None or not along_rows:
        return NotImplemented
    if dst_type is not None and torch_dtype(dst_type, torch.int8) is not torch.int8:
        return NotImplemented
    width = channels // 2
    x = contiguous(x)
    y = torch.empty(*tokens, width, dtype=torch.int8)
    scale = torch.empty(*tokens, dtype=torch.float32)
    groups = 1 if group_index is None else group_index.shape[0]
    quant_step = 1
    weight_scale, activation_scale = optional_contiguous(weight_scale), optional_contiguous(activation_scale)
    int_bias = float_bias = None
    if bias is not None:
        if bias.dtype is torch.int32:
            int_bias = contiguous(bias)
        else:
            float_bias = floats(bias)
    if quant_scale is not None:
        quant_scale = floats(quant_scale)
        # In static mode one number for each group is meant, even where there are as many groups as columns.
        if quant_mode == 0 and (quant_scale.shape[-1] == 1 or quant_scale.shape == (groups,)):
            quant_step = 0
    if quant_offset is not None:
        quant_offset = floats(quant_offset)
    group_index = optional_contiguous(group_index)
    status = function(
        x.data_ptr(),
        TYPES[x.dtype],
        address(weight_scale),
        address(activation_scale),
        address(int_bias),
        address(float_bias),
        address(quant_scale),
        address(quant_offset),
        address(group_index),
        y.data_ptr(),
        scale.data_ptr(),
        scale.numel(),
        width,
        groups,
        quant_step,
        activate_left,
        quant_mode,
        round_mode or RINT,
        swiglu_mode,
        torch.get_num_threads(),
        clamp_limit,
        glu_alpha,
        glu_bias,
    )
    return (y, scale) if finished(status) else NotImplemented
