"""npu_quant_matmul: int8 matrix product with dequantization or requantization.

::

    acc = x1 @ x2 (+ bias, if int32)                                       exact int32
    int32 output            acc
    bf16 and fp16 output    acc * scale (* pertoken_scale) (+ bias, if floating point), one rounding
    int8 output             sat(rint(acc * scale (+ offset)))

in fp32, in this order.

Traps: ``output_dtype=None`` means int8. An int32 output is the raw accumulator: ``scale`` is demanded and
ignored (npu_dequant_swiglu_quant and npu_dequant_bias take it from there). An int64 ``scale`` is not a number
but the bit pattern of ``npu_trans_quant_param``: fp32 with 10 mantissa bits left, and an integer offset
(applied to int8 outputs): not the result of the fp32 scale. A float bias comes after the scales, an int32
bias before.

Formula: op-plugin documentation and Meta implementation of torch_npu 2.13.0, whose table of dtype
combinations the checks follow. int4 operands (int32 or uint8 tensors, ``x1_dtype`` ...), float8 and hifloat8
operands, group and microscaling scales (``group_sizes``, two-dimensional scales, ``y_scale``) are not
implemented.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import (
    check,
    check_broadcastable,
    check_dtype,
    check_rank,
    check_shape,
    check_size,
    names,
)
from npu_fusion.meta_impls._dtypes import dtype_argument
from npu_fusion.meta_impls._registry import operator

OP = "npu_quant_matmul"

_SCALE_OF_OUTPUT = {
    torch.int8: (torch.float32, torch.int64),
    torch.int32: (torch.float32, torch.bfloat16),
    torch.float16: (torch.float32, torch.int64),
    torch.bfloat16: (torch.float32, torch.bfloat16),
}


@operator(
    "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, "
    "Tensor? pertoken_scale=None, Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, "
    "int? x2_dtype=None, int? pertoken_scale_dtype=None, int? scale_dtype=None, int[]? group_sizes=None, "
    "Tensor? y_scale=None) -> Tensor"
)
def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | torch.dtype | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: Sequence[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """Multiply ``x1`` [..., m, k] by ``x2`` [..., k, n]; returns [..., m, n] of ``output_dtype``.

    Args:
        x1, x2: int8, rank 2 to 6; the leading dimensions broadcast.
        scale: [n] or [1]. fp32; or int64 (packed) for int8 and fp16 outputs without ``pertoken_scale``; or
            bf16 for bf16 and int32 outputs.
        offset: fp32 [n] or [1]; int8 outputs with an fp32 ``scale`` only.
        pertoken_scale: fp32 [m]; fp16 and bf16 outputs only.
        bias: [n], or [batch, 1, n] for an output of rank 3. int32; or fp32 for fp16 and bf16 outputs; or bf16
            for a bf16 one; or fp16 for an fp16 one with ``pertoken_scale``.
        output_dtype: ScalarType value: None or 1 (int8), 3 (int32), 5 (fp16), 15 (bf16).
        x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype, group_sizes, y_scale: None.

    Raises ``ValueError`` for anything else.
    """
    unsupported = {
        "x1_dtype": x1_dtype,
        "x2_dtype": x2_dtype,
        "pertoken_scale_dtype": pertoken_scale_dtype,
        "scale_dtype": scale_dtype,
        "group_sizes": group_sizes,
        "y_scale": y_scale,
    }
    for argument, value in unsupported.items():
        check(value is None, OP, argument, "given", "None")
    for argument, operand in (("x1", x1), ("x2", x2)):
        check_dtype(OP, argument, operand, torch.int8)
        check_rank(OP, argument, operand, 2, 6)
    output = result_dtype(output_dtype)
    _check_dtypes(scale, offset, pertoken_scale, bias, output)

    *_, rows, inner = x1.shape
    *_, x2_rows, columns = x2.shape
    check_size(inner == x2_rows, OP, f"x1 has {inner} columns, x2 {x2_rows} rows; accepted: the same number")
    batch = _batch_shape(x1, x2)
    check_broadcastable(OP, "scale", scale, (columns,), (0,))
    if offset is not None:
        check_broadcastable(OP, "offset", offset, (columns,), (0,))
    check_shape(OP, "pertoken_scale", pertoken_scale, (rows,))
    if bias is not None:
        batched = bias.dim() == 3 and len(batch) == 1
        check_shape(OP, "bias", bias, (*batch, 1, columns) if batched else (columns,))
    return x1.new_empty((*batch, rows, columns), dtype=output)


def result_dtype(output_dtype: int | torch.dtype | None) -> torch.dtype:
    """The dtype of the result; ``ValueError`` for one that the operator does not give."""
    accepted = "None or 1 (int8), 3 (int32), 5 (float16), 15 (bfloat16)"
    return dtype_argument(OP, "output_dtype", output_dtype, torch.int8, _SCALE_OF_OUTPUT, accepted)


def _batch_shape(x1: Tensor, x2: Tensor) -> tuple[int | torch.SymInt, ...]:
    try:
        return tuple(torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2]))
    except RuntimeError as error:
        given = f"{list(x1.shape[:-2])} and {list(x2.shape[:-2])}"
        raise ValueError(f"{OP}: the batches of x1 and x2 are {given}; accepted: broadcastable") from error


def _check_dtypes(
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output: torch.dtype,
) -> None:
    result = f"output_dtype {names([output])}"
    if scale.dtype not in _SCALE_OF_OUTPUT[output]:
        accepted = f"{names(_SCALE_OF_OUTPUT[output])} with {result}"
        raise ValueError(f"{OP}: scale has dtype {names([scale.dtype])}; accepted: {accepted}")

    check_dtype(OP, "offset", offset, torch.float32)
    packed = scale.dtype == torch.int64
    check(
        offset is None or (output == torch.int8 and not packed),
        OP,
        "offset",
        f"given with {result} and a scale of dtype {names([scale.dtype])}",
        "None, or a tensor with output_dtype int8 and a float32 scale",
    )

    check_dtype(OP, "pertoken_scale", pertoken_scale, torch.float32)
    check(
        pertoken_scale is None or (output.is_floating_point and not packed),
        OP,
        "pertoken_scale",
        f"given with {result} and a scale of dtype {names([scale.dtype])}",
        "None, or a tensor with output_dtype float16 or bfloat16 and a scale that is not int64",
    )

    if bias is None:
        return
    accepted_bias = [torch.int32]
    if output.is_floating_point:
        accepted_bias.append(torch.float32)
        if output == torch.bfloat16 or pertoken_scale is not None:
            accepted_bias.append(output)
    if bias.dtype not in accepted_bias:
        accepted = f"{names(accepted_bias)} with {result} and these scales"
        raise ValueError(f"{OP}: bias has dtype {names([bias.dtype])}; accepted: {accepted}")
