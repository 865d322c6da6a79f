"""npu_weight_quant_batchmatmul: floating-point activations times a weight of 8 or 4 bits.

::

    w = (weight + antiquant_offset) * antiquant_scale           rounded to the dtype of x
    y = x @ w (+ bias)                                          rounded to the dtype of x

in fp32; with ``quant_scale`` in place of the last rounding ``y = sat_int8(rint(y * quant_scale (+
quant_offset)))``. ``antiquant_scale`` and ``antiquant_offset`` hold one number, one for each column of the
weight, or one for each column and each group of ``antiquant_group_size`` consecutive rows.

The weight is of int8, int4, float8_e4m3fn, hifloat8, float4_e2m1 or float4_e1m2; ``_weight_formats.py`` says
how tensors carry these. ``antiquant_scale`` is e8m0 for mxfp4: a power of two for each 32 rows, which is
converted to the dtype of x first.

Traps: the offset is ADDED to the weight (the negative of the usual zero point). ``antiquant_group_size`` has
no effect on integers unless the scale has more than one row. Floating-point weights (Ascend 950) take no
offset and no ``quant_scale``, and a bias in the dtype of x, where integers take fp32 beside bf16.

Formula: op-plugin documentation and Meta implementation of torch_npu 2.13.0; of the floating-point weights,
the reference computation of aclnnWeightQuantBatchMatmulV2. That the dequantized weight is rounded to the
dtype of x follows from the matrix unit, which multiplies in that dtype. Not implemented: int64
``antiquant_scale``, and int4 in uint8 (``weight_dtype`` 285).
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
from npu_fusion.meta_impls._weight_formats import OP, check_float_scale, format_of, logical_shape

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
        weight: [K, N], maybe several numbers in an element (``_weight_formats.py``).
        antiquant_scale: dtype of ``x``. int8, int4: [1] or [1, 1], [N] or [1, N], or
            [ceil(K / antiquant_group_size), N]. 8-bit floats: [N] or [1, N]. 4-bit floats: one for groups,
            transposed in memory where the weight is; for float4_e2m1 also of uint8 or float8_e8m0fnu.
        antiquant_offset: dtype and shape of ``antiquant_scale``; integers only.
        quant_scale: fp32, or int64 packed by ``npu_trans_quant_param``; [1], [N] or [1, N]. Makes ``y`` int8.
            Integers only.
        quant_offset: fp32, the shape of ``quant_scale``; only with an fp32 ``quant_scale``.
        bias: [N] or [1, N]. The dtype of ``x``, but for integers fp32 with bf16 ``x``.
        antiquant_group_size: rows of a group, for a scale of several rows; 0 otherwise. For 4-bit floats a
            multiple of 32 below K, and 32 where the scales are powers of two.
        inner_precise: 0 (precise) or 1 (fast); the CPU kernel is always precise.
        weight_dtype: None, or for uint8 290 (hifloat8), 296 (float4_e2m1), 297 (float4_e1m2).

    Returns ``y`` in the dtype of ``x``, or int8. Raises ``ValueError`` for anything else.
    """
    check_dtype(OP, "x", x, *_BIAS_OF_X)
    check_rank(OP, "x", x, 2, 2)
    form = format_of(weight, weight_dtype)
    check_rank(OP, "weight", weight, 2, 2)
    check_choice(OP, "inner_precise", inner_precise, (0, 1))
    check(antiquant_group_size >= 0, OP, "antiquant_group_size", antiquant_group_size, "0 or more")
    rows, inner = x.shape
    weight_rows, columns = logical_shape(weight, form)
    message = f"x has {inner} columns, weight {weight_rows} rows; accepted: the same number"
    check_size(inner == weight_rows, OP, message)

    if form.integer:
        check_dtype(OP, "antiquant_scale", antiquant_scale, x.dtype)
        _check_antiquant_shape(antiquant_scale, inner, columns, antiquant_group_size)
        check_dtype(OP, "antiquant_offset", antiquant_offset, antiquant_scale.dtype)
        check_shape(OP, "antiquant_offset", antiquant_offset, antiquant_scale.shape)
    else:
        check_float_scale(form, x, weight, antiquant_scale, columns, antiquant_group_size)
        accepted = f"None with weights of {form.numbers}"
        check(antiquant_offset is None, OP, "antiquant_offset", "given", accepted)
        check(quant_scale is None, OP, "quant_scale", "given", accepted)

    if bias is not None:
        check_dtype(OP, "bias", bias, _BIAS_OF_X[x.dtype] if form.integer else x.dtype)
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
