"""npu_quantize: quantization with given scales.

::

    div_mode True    y = sat(rint(input / scales + zero_points))     to int8, uint8 or int32
    div_mode False   y = sat(rint(input * scales + zero_points))     to int8 or packed int4

in fp32; an absent ``zero_points`` is 0. Results in float8_e4m3fn, float8_e5m2 and hifloat8 (Ascend 950) are
the sum rounded to the nearest number of the format, not to an integer: half to even, hifloat8 half away from
zero.

Traps: the zero point is added BEFORE the rounding, in both modes. PT2E's ``quantized_decomposed`` operators
round first, which differs at ties with an odd zero point (0.5 + 1 rounds to 2, rint(0.5) + 1 is 1) and with
fractional ones; and PyTorch's quantizers multiply by the rounded reciprocal of the scale instead of dividing.
With ``div_mode=False``, ``axis`` -2 means the last dimension but one and EVERY larger value, 0 and 1
included, means the last dimension. With ``div_mode=True`` the eager operator takes PyTorch's numbers of the
float8 dtypes, 23 and 24, but not torch_npu's, 291 and 292, which the Meta kernel takes in both modes. For NaN
and infinity the references of the kernels contradict each other: here NaN stays, and infinity becomes the
largest number, or stays (hifloat8).

Formula: op-plugin documentation of torch_npu 2.13.0 and public kernel sources (Quantize, AscendQuantV2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import (
    check,
    check_broadcastable,
    check_dtype,
    check_rank,
    check_shape,
    check_size,
)
from npu_fusion.meta_impls._dtypes import HIFLOAT8_DTYPE, dtype_argument
from npu_fusion.meta_impls._registry import operator

OP = "npu_quantize"

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_DIV_ZERO_POINTS = (torch.int8, torch.uint8, torch.int32, torch.bfloat16, torch.float32)

_FLOAT8 = {
    torch.float8_e4m3fn: torch.float8_e4m3fn,
    torch.float8_e5m2: torch.float8_e5m2,
    HIFLOAT8_DTYPE: HIFLOAT8_DTYPE,
}
_NOT_DIVIDED = (291, 292)
"""Numbers of torch_npu that its eager operator does not take with ``div_mode=True``."""
_RESULTS = {
    True: {
        **_FLOAT8,
        torch.int8: torch.int8,
        torch.qint8: torch.int8,
        torch.uint8: torch.uint8,
        torch.quint8: torch.uint8,
        torch.int32: torch.int32,
        torch.qint32: torch.int32,
    },
    False: {**_FLOAT8, torch.int8: torch.int8, torch.qint8: torch.int8, torch.quint4x2: torch.quint4x2},
}
_ACCEPTED = {
    True: "1 (int8), 12 (qint8), 0 (uint8), 13 (quint8), 3 (int32), 14 (qint32), 24 (float8_e4m3fn), "
    "23 (float8_e5m2), 290 (hifloat8) with div_mode=True",
    False: "1 (int8), 12 (qint8), 16 (quint4x2), 24 or 292 (float8_e4m3fn), 23 or 291 (float8_e5m2), "
    "290 (hifloat8) with div_mode=False",
}


@operator(
    "npu_quantize(Tensor input, Tensor scales, Tensor? zero_points, int dtype, int axis=1, "
    "bool div_mode=True) -> Tensor"
)
def npu_quantize(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: int | torch.dtype,
    axis: int = 1,
    div_mode: bool = True,
) -> Tensor:
    """Quantize ``input``; returns a tensor of its shape (int4: int32, the last dimension divided by 8;
    hifloat8: uint8, bit patterns).

    Args:
        input: fp16, bf16 or fp32, rank 1 to 8.
        scales: fp16, bf16 or fp32. One entry, or one for each index along the axis: 1-D [C], and with
            ``div_mode=False`` also of the rank of ``input`` with 1 in every other dimension.
        zero_points: the shape of ``scales``; ``div_mode=True``: int8, uint8, int32, bf16 or fp32,
            ``div_mode=False``: the dtype of ``scales``.
        dtype: ScalarType value of the result, quantized or plain spelling (module docstring).
        axis: the quantized dimension; ignored if there is one scale. ``div_mode=False``: -2, or anything
            larger for the last dimension.

    Raises ``ValueError`` for anything else.
    """
    check_dtype(OP, "input", input, *_FLOATS)
    check_rank(OP, "input", input, 1, 8)
    check_dtype(OP, "scales", scales, *_FLOATS)
    target = result_dtype(dtype, div_mode)
    dim = quantized_dim(input, scales, axis, div_mode)

    if scales.dim() == 1:
        check_broadcastable(OP, "scales", scales, (input.size(dim),), (0,))
    else:
        check(not div_mode, OP, "scales", f"{scales.dim()}-dimensional", "1 dimension with div_mode=True")
        shape = [input.size(d) if d == dim % input.dim() else 1 for d in range(input.dim())]
        check_broadcastable(OP, "scales", scales, shape, (dim % input.dim(),))
    if zero_points is not None:
        check_dtype(OP, "zero_points", zero_points, *(_DIV_ZERO_POINTS if div_mode else (scales.dtype,)))
        check_shape(OP, "zero_points", zero_points, scales.shape)

    if target == torch.quint4x2:
        *leading, columns = input.shape
        check_size(columns % 8 == 0, OP, f"input has {columns} columns; accepted: a multiple of 8 (quint4x2)")
        return input.new_empty((*leading, columns // 8), dtype=torch.int32)
    return input.new_empty(input.shape, dtype=torch.uint8 if target == HIFLOAT8_DTYPE else target)


def result_dtype(dtype: int | torch.dtype, div_mode: bool) -> torch.dtype:
    """int8, uint8, int32, quint4x2 (int4), a float8 dtype or ``HIFLOAT8_DTYPE``; ``ValueError`` for what
    ``div_mode`` does not offer."""
    check(not div_mode or dtype not in _NOT_DIVIDED, OP, "dtype", dtype, _ACCEPTED[div_mode])
    results = _RESULTS[div_mode]
    return results[dtype_argument(OP, "dtype", dtype, torch.int8, results, _ACCEPTED[div_mode])]


def quantized_dim(input: Tensor, scales: Tensor, axis: int, div_mode: bool) -> int:
    """The dimension of ``input`` that ``axis`` means; ``ValueError`` if it has none."""
    rank = input.dim()
    if div_mode:
        if scales.dim() == 1 and scales.size(0) == 1:
            return -1
        check(-rank <= axis < rank, OP, "axis", axis, f"{-rank} to {rank - 1}")
        return axis
    check(-2 <= axis < rank, OP, "axis", axis, f"-2 to {rank - 1} with div_mode=False")
    check(rank > 1 or axis != -2, OP, "axis", axis, "-1 or 0 for a 1-dimensional input")
    return -2 if axis == -2 else -1
