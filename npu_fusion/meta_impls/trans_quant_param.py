"""npu_trans_quant_param: scale and offset of a quantized product in the form that the matrix unit reads.

::

    bits 0 to 31     the float32 scale with its low 13 mantissa bits 0, so that ten are left
    bits 37 to 45    the offset, rint and saturated to [-256, 255], as a two's complement integer
    bit 46           1

npu_quant_matmul takes the int64 in place of a float32 scale where the result is int8 or float16.

Traps: the scale that is packed is not the scale that was given. ``round_mode`` 0 cuts its low bits off, so
that it is up to 2^-10 of itself smaller; 1 rounds them half to even, and turns a denormal scale into zero.

Formula: op-plugin documentation of torch_npu 2.13.0; the kernel of TransQuantParamV2 for ties, denormal
scales and the order of rounding and saturation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import check_choice, check_dtype, check_rank, check_shape, check_size
from npu_fusion.meta_impls._registry import operator

OP = "npu_trans_quant_param"
CUT, ROUND = 0, 1


@operator("npu_trans_quant_param(Tensor scale, Tensor? offset=None, int? round_mode=0) -> Tensor")
def npu_trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int | None = 0) -> Tensor:
    """Pack ``scale`` and ``offset``.

    Args:
        scale: fp32 [N] or [1, N], not empty.
        offset: fp32. Beside a 1-dimensional ``scale``: [N], or [1]; then ``scale`` may be [1], too. Beside a
            2-dimensional one: its shape.
        round_mode: None or 0, cut off low bits of the scale; 1, round them.

    Returns int64, of the shape of ``scale`` or of the longer of the two.

    Raises ``ValueError`` for anything else.
    """
    check_dtype(OP, "scale", scale, torch.float32)
    check_dtype(OP, "offset", offset, torch.float32)
    check_choice(OP, "round_mode", round_mode, (None, CUT, ROUND))
    check_rank(OP, "scale", scale, 1, 2)
    columns = scale.size(-1)
    given = list(scale.shape)
    check_size(columns != 0, OP, f"scale has shape {given}; accepted: [n] or [1, n], not empty")
    if scale.dim() == 2:
        check_size(scale.size(0) == 1, OP, f"scale has shape {given}; accepted: [n] or [1, n]")
        check_shape(OP, "offset", offset, scale.shape)
        return scale.new_empty(scale.shape, dtype=torch.int64)
    if offset is None:
        return scale.new_empty(columns, dtype=torch.int64)
    check_rank(OP, "offset", offset, 1, 1)
    offsets = offset.size(0)
    message = (
        f"offset has shape {list(offset.shape)}; accepted: {given} or [1], or any if scale has one entry"
    )
    check_size(offsets != 0, OP, message)
    check_size((offsets == columns) | (offsets == 1) | (columns == 1), OP, message)
    return scale.new_empty(torch.sym_max(columns, offsets), dtype=torch.int64)
