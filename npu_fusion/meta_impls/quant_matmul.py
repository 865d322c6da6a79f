"""npu_quant_matmul: matrix product of quantized operands, dequantized or requantized.

int8 operands::

    acc = x1 @ x2 (+ bias, if int32)                                       exact int32
    int32 output            acc
    bf16 and fp16 output    acc * scale (* pertoken_scale) (+ bias, if floating point), one rounding
    int8 output             sat(rint(acc * scale (+ offset)))

in fp32, in this order. Operands of 8-bit and 4-bit floats are in ``_quant_matmul_floats.py``.

Traps: ``output_dtype=None`` means int8. An int32 output is the raw accumulator: ``scale`` is demanded and
ignored (npu_dequant_swiglu_quant and npu_dequant_bias take it from there). An int64 ``scale`` is not a number
but the bit pattern of ``npu_trans_quant_param``: fp32 with 10 mantissa bits left, and an integer offset
(applied to int8 outputs): not the result of the fp32 scale. A float bias comes after the scales, an int32
bias before.

Formula: op-plugin documentation and Meta implementation of torch_npu 2.13.0, whose table of dtype
combinations the checks follow. Not implemented: int4 operands (int32 tensors, ``x2_dtype`` 285), float8_e5m2
and pairs of float4 operands, one scale for each block of 128 (``group_sizes`` [1, 128, 128], [128, 128, 128])
and int4 groups of 256 with an offset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import (
    check,
    check_broadcastable,
    check_dtype,
    check_shape,
    names,
)
from npu_fusion.meta_impls._dtypes import dtype_argument
from npu_fusion.meta_impls._quant_matmul import (
    OP,
    Call,
    Kind,
    batch_shape,
    check_absent,
    check_bias_shape,
    check_inner,
    check_matrices,
    kind_of,
)
from npu_fusion.meta_impls._quant_matmul_floats import float_result
from npu_fusion.meta_impls._registry import operator

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

    Args for int8 operands:
        x1, x2: int8, rank 2 to 6; the leading dimensions broadcast.
        scale: [n] or [1]. fp32; or int64 (packed) for int8 and fp16 outputs without ``pertoken_scale``; or
            bf16 for bf16 and int32 outputs.
        offset: fp32 [n] or [1]; int8 outputs with an fp32 ``scale`` only.
        pertoken_scale: fp32 [m]; fp16 and bf16 outputs only.
        bias: [n], or [batch, 1, n] for an output of rank 3. int32; or fp32 for fp16 and bf16 outputs; or bf16
            for a bf16 one; or fp16 for an fp16 one with ``pertoken_scale``.
        output_dtype: ScalarType value: None or 1 (int8), 3 (int32), 5 (fp16), 15 (bf16).
        x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype, group_sizes, y_scale: None.

    Args for float8_e4m3fn, and for hifloat8 (uint8 with x1_dtype and x2_dtype 290):
        x1, x2: rank 2 to 6; the leading dimensions broadcast.
        scale: [n] or [1]; fp32, or int64 (packed) without ``pertoken_scale``.
        pertoken_scale: None, or fp32 [m] or [1].
        bias: fp32 [n], or [batch, 1, n] for an output of rank 3; without ``pertoken_scale`` it is scaled.
        output_dtype: 5 (fp16), 6 (fp32), 15 (bf16).

    Args for microscaled operands (both scales e8m0, scale_dtype and pertoken_scale_dtype 293, group_sizes
    [1, 1, 32]):
        x1: float8_e4m3fn [..., m, k].
        x2: float8_e4m3fn [..., k, n]; or float4_e2m1: uint8 [k/2, n], x2_dtype 296, with an x1 of rank 2
            and k a multiple of 8.
        pertoken_scale: uint8 or float8_e8m0fnu [..., m, ceil(k/64), 2].
        scale: the same, [..., ceil(k/64), n, 2]; transposed in memory where x2 is.
        bias: fp32 [n] or [batch, 1, n]; with float4_e2m1 [1, n] of the dtype of the output.
        output_dtype: 5 (fp16), 15 (bf16), and but for float4_e2m1 6 (fp32).

    Args for float8_e4m3fn times float4_e2m1 with two levels of scales:
        x1: float8_e4m3fn [m, k], k a multiple of 32.
        x2: uint8 [k/2, n], x2_dtype 296.
        scale: [n, k/32] of the dtype of the output.
        y_scale: int64 (packed) [1, n].
        group_sizes: [0, 0, 32] or [1, 1, 32].
        output_dtype: 5 (fp16), 15 (bf16).

    Raises ``ValueError`` for anything else.
    """
    call = Call(
        x1,
        x2,
        scale,
        offset,
        pertoken_scale,
        bias,
        output_dtype,
        x1_dtype,
        x2_dtype,
        pertoken_scale_dtype,
        scale_dtype,
        group_sizes,
        y_scale,
    )
    kind = kind_of(call)
    return _int8_result(call) if kind is Kind.INT8 else float_result(call, kind)


def _int8_result(call: Call) -> Tensor:
    check_absent(call, "int8 operands", "pertoken_scale_dtype", "scale_dtype", "group_sizes", "y_scale")
    check_matrices(call)
    output = result_dtype(call.output_dtype)
    _check_dtypes(call.scale, call.offset, call.pertoken_scale, call.bias, output)

    *_, rows, inner = call.x1.shape
    *_, x2_rows, columns = call.x2.shape
    check_inner(inner, x2_rows)
    batch = batch_shape(call.x1, call.x2)
    check_broadcastable(OP, "scale", call.scale, (columns,), (0,))
    if call.offset is not None:
        check_broadcastable(OP, "offset", call.offset, (columns,), (0,))
    check_shape(OP, "pertoken_scale", call.pertoken_scale, (rows,))
    check_bias_shape(call.bias, batch, columns)
    return call.x1.new_empty((*batch, rows, columns), dtype=output)


def result_dtype(output_dtype: int | torch.dtype | None) -> torch.dtype:
    """The dtype of the result of int8 operands; ``ValueError`` for one that the operator does not give."""
    accepted = "None or 1 (int8), 3 (int32), 5 (float16), 15 (bfloat16)"
    return dtype_argument(OP, "output_dtype", output_dtype, torch.int8, _SCALE_OF_OUTPUT, accepted)


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
