"""npu_weight_quant_batchmatmul: floating-point activations times an int8 or int4 weight.

::

    w = (weight + antiquant_offset) * antiquant_scale           rounded to the dtype of x
    y = x @ w (+ bias)                                          rounded to the dtype of x

in fp32; with ``quant_scale`` in place of the last rounding ``y = sat_int8(rint(y * quant_scale (+
quant_offset)))``. ``antiquant_scale`` and ``antiquant_offset`` hold one number, one for each column of the
weight, or one for each column and each group of ``antiquant_group_size`` consecutive rows.

Traps: the offset is ADDED to the weight (the negative of the usual zero point). ``antiquant_group_size`` has
no effect unless the scale has more than one row. Eight int4 weights share an int32, lowest nibble first,
along the columns of a contiguous weight [K, N/8], along the rows of a transposed one (a [K/8, N] view of
[N, K/8]).

Formula: op-plugin documentation and Meta implementation of torch_npu 2.13.0. That the dequantized weight is
rounded to the dtype of x follows from the matrix unit, which multiplies in that dtype. Not implemented: int64
``antiquant_scale``, and weights that ``weight_dtype`` reinterprets (int4 in uint8, float4, float8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import (
    check,
    check_broadcastable,
    check_choice,
    check_dtype,
    check_rank,
    check_shape,
    check_size,
)
from npu_fusion.meta_impls._registry import operator

OP = "npu_weight_quant_batchmatmul"

_INT4_PER_INT32 = 8
_BIAS_OF_X = {torch.float16: torch.float16, torch.bfloat16: torch.float32}


@operator(
    "npu_weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor antiquant_scale, "
    "Tensor? antiquant_offset=None, Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? bias=None, "
    "int antiquant_group_size=0, int inner_precise=0, int? weight_dtype=None) -> Tensor"
)
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
    """Multiply ``x`` [M, K] by the dequantized ``weight`` [K, N]; returns [M, N].

    Args:
        x: fp16 or bf16 [M, K].
        weight: int8 [K, N], or int4 packed in int32 (module docstring).
        antiquant_scale: dtype of ``x``; [1] or [1, 1], [N] or [1, N], or [ceil(K / antiquant_group_size), N].
        antiquant_offset: dtype and shape of ``antiquant_scale``.
        quant_scale: fp32, or int64 packed by ``npu_trans_quant_param``; [1], [N] or [1, N]. Makes ``y`` int8.
        quant_offset: fp32, the shape of ``quant_scale``; only with an fp32 ``quant_scale``.
        bias: [N] or [1, N]; fp16 for fp16 ``x``, fp32 for bf16 ``x``.
        antiquant_group_size: rows of a group, for a scale of several rows.
        inner_precise: 0 (precise) or 1 (fast); the CPU kernel is always precise.
        weight_dtype: None.

    Returns ``y`` in the dtype of ``x``, or int8. Raises ``ValueError`` for anything else.
    """
    check_dtype(OP, "x", x, *_BIAS_OF_X)
    check_rank(OP, "x", x, 2, 2)
    check_dtype(OP, "weight", weight, torch.int8, torch.int32)
    check_rank(OP, "weight", weight, 2, 2)
    check_choice(OP, "inner_precise", inner_precise, (0, 1))
    check(weight_dtype is None, OP, "weight_dtype", weight_dtype, "None")
    check(antiquant_group_size >= 0, OP, "antiquant_group_size", antiquant_group_size, "0 or more")
    rows, inner = x.shape
    weight_rows, columns = _logical_shape(weight)
    message = f"x has {inner} columns, weight {weight_rows} rows; accepted: the same number"
    check_size(inner == weight_rows, OP, message)

    check_dtype(OP, "antiquant_scale", antiquant_scale, x.dtype)
    _check_antiquant_shape(antiquant_scale, inner, columns, antiquant_group_size)
    check_dtype(OP, "antiquant_offset", antiquant_offset, antiquant_scale.dtype)
    check_shape(OP, "antiquant_offset", antiquant_offset, antiquant_scale.shape)

    if bias is not None:
        check_dtype(OP, "bias", bias, _BIAS_OF_X[x.dtype])
        check_rank(OP, "bias", bias, 1, 2)
        check_shape(OP, "bias", bias, (columns,) if bias.dim() == 1 else (1, columns))

    if quant_scale is None:
        check(quant_offset is None, OP, "quant_offset", "given", "None without quant_scale")
        return x.new_empty((rows, columns))
    check_dtype(OP, "quant_scale", quant_scale, torch.float32, torch.int64)
    check_rank(OP, "quant_scale", quant_scale, 1, 2)
    per_column = (columns,) if quant_scale.dim() == 1 else (1, columns)
    check_broadcastable(OP, "quant_scale", quant_scale, per_column, (quant_scale.dim() - 1,))
    packed = quant_scale.dtype == torch.int64
    check(quant_offset is None or not packed, OP, "quant_offset", "given", "None with an int64 quant_scale")
    check_dtype(OP, "quant_offset", quant_offset, torch.float32)
    check_shape(OP, "quant_offset", quant_offset, quant_scale.shape)
    return x.new_empty((rows, columns), dtype=torch.int8)


def packed_along_rows(weight: Tensor) -> bool:
    """Whether the int32 ``weight`` holds eight int4 of a column (a transposed view), not of a row."""
    return not weight.is_contiguous()


def _logical_shape(weight: Tensor) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    rows, columns = weight.shape
    if weight.dtype == torch.int8:
        return rows, columns
    if packed_along_rows(weight):
        accepted = "contiguous, or the transpose of a contiguous tensor"
        check(weight.t().is_contiguous(), OP, "weight", f"int32 with strides {weight.stride()}", accepted)
        return rows * _INT4_PER_INT32, columns
    return rows, columns * _INT4_PER_INT32


def _check_antiquant_shape(
    scale: Tensor, inner: int | torch.SymInt, columns: int | torch.SymInt, group_size: int
) -> None:
    check_rank(OP, "antiquant_scale", scale, 1, 2)
    if scale.dim() == 1:
        check_broadcastable(OP, "antiquant_scale", scale, (columns,), (0,))
    elif scale.size(0) == 1:
        check_broadcastable(OP, "antiquant_scale", scale, (1, columns), (1,))
    else:
        given = list(scale.shape)
        accepted = "a positive antiquant_group_size with an antiquant_scale of several rows"
        check(group_size > 0, OP, f"antiquant_group_size with a scale of shape {given}", group_size, accepted)
        check_shape(OP, "antiquant_scale", scale, ((inner + group_size - 1) // group_size, columns))
