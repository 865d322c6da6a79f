"""npu_quant_matmul of 8-bit and 4-bit floats (Ascend 950).

::

    operands                          y, in fp32, rounded once
    FLOAT8, with pertoken_scale       x1 @ x2 * scale * pertoken_scale + bias
    FLOAT8, without                   (x1 @ x2 + bias) * scale
    MX, MX_FLOAT4                     sum over blocks of (x1 @ x2 * 2^pertoken_scale * 2^scale) + bias
    TWO_LEVEL                         x1 @ w * y_scale        w = e4m3(round16(x2 * scale))

``round16`` is to the dtype of ``scale``, which is that of the result. hifloat8 and float4 numbers are bit
patterns in uint8 (:mod:`npu_fusion.formats`), float4 two in a byte. Layouts, with k the inner size:

* x2 of float4 is the transpose [k/2, n] of a contiguous [n, k/2]: two neighbours along k in a byte, the first
  in the low nibble.
* The e8m0 scales of blocks are in pairs, as npu_dynamic_mx_quant gives them: of x1 [m, ceil(k/64), 2], of x2
  [ceil(k/64), n, 2]. With an odd number of blocks the last of a pair is unused.
* ``scale`` of TWO_LEVEL is [n, k/32], not transposed.

Traps:

* Without ``pertoken_scale`` the bias comes before the scale, so it is the float bias divided by that. With
  ``pertoken_scale`` it is added as it is.
* Without ``pertoken_scale`` the device knows only packed (int64) scales. Eager torch_npu packs float32 ones
  itself and so loses 13 mantissa bits; here they are exact. torchair does not (``hosts/_ge_limits.py``).
* A ``scale`` of one number beside a ``pertoken_scale`` of one is merged with it and packed by the device;
  here it is exact. A ``scale`` of n numbers is exact there, too.
* w of TWO_LEVEL is rounded to float8_e4m3fn before the product; exact where float4 times the scale is one.
* x1_dtype and x2_dtype are for types without a dtype in PyTorch; 292 for float8_e4m3fn is refused.

Source: Meta and eager implementation of torch_npu 2.13.0; documentation and reference computation of
aclnnQuantMatmulV5, whose table of dtypes the checks follow: Meta lets other biases and results pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion import _compat
from npu_fusion.formats import mx
from npu_fusion.meta_impls._checks import (
    check,
    check_broadcastable,
    check_dtype,
    check_shape,
    check_size,
    names,
)
from npu_fusion.meta_impls._dtypes import dtype_argument
from npu_fusion.meta_impls._quant_matmul import (
    OP,
    Call,
    Kind,
    Size,
    batch_shape,
    check_absent,
    check_bias_shape,
    check_e8m0,
    check_inner,
    check_matrices,
)

_NUMBERS = {torch.float16: "5 (float16)", torch.float32: "6 (float32)", torch.bfloat16: "15 (bfloat16)"}
_NARROW = (torch.float16, torch.bfloat16)
_PAIR = 2 * mx.BLOCK
_WHOLE_BLOCKS, _FREE_BLOCKS = [1, 1, mx.BLOCK], [0, 0, mx.BLOCK]


def float_result_dtype(call: Call, kind: Kind) -> torch.dtype:
    """The dtype of the result; ``ValueError`` for one that the operator does not give."""
    offered = tuple(_NUMBERS) if kind in (Kind.FLOAT8, Kind.MX) else _NARROW
    accepted = ", ".join(_NUMBERS[dtype] for dtype in offered)
    check(call.output_dtype is not None, OP, "output_dtype", "None (int8)", accepted)
    return dtype_argument(OP, "output_dtype", call.output_dtype, torch.int8, offered, accepted)


def float_result(call: Call, kind: Kind) -> Tensor:
    """The checks of a call with floating-point operands, and its result without data."""
    output = float_result_dtype(call, kind)
    if kind is Kind.FLOAT8:
        shape = _float8(call)
    elif kind is Kind.MX:
        shape = _mx(call)
    elif kind is Kind.MX_FLOAT4:
        shape = _mx_float4(call, output)
    else:
        shape = _two_level(call, output)
    return call.x1.new_empty(shape, dtype=output)


def _float8(call: Call) -> tuple[Size, ...]:
    kind = "8-bit floats that are not microscaled"
    check_absent(call, kind, "offset", "pertoken_scale_dtype", "scale_dtype", "group_sizes", "y_scale")
    check_matrices(call)
    check_dtype(OP, "scale", call.scale, torch.float32, torch.int64)
    check_dtype(OP, "pertoken_scale", call.pertoken_scale, torch.float32)
    if call.scale.dtype == torch.int64:
        check_absent(call, "an int64 scale", "pertoken_scale")
    check_dtype(OP, "bias", call.bias, torch.float32)
    *_, rows, inner = call.x1.shape
    *_, x2_rows, columns = call.x2.shape
    check_inner(inner, x2_rows)
    batch = batch_shape(call.x1, call.x2)
    check_broadcastable(OP, "scale", call.scale, (columns,), (0,))
    if call.pertoken_scale is not None:
        check_broadcastable(OP, "pertoken_scale", call.pertoken_scale, (rows,), (0,))
    check_bias_shape(call.bias, batch, columns)
    return (*batch, rows, columns)


def _mx(call: Call) -> tuple[Size, ...]:
    check_e8m0(call)
    check_absent(call, "microscaled operands", "offset", "y_scale")
    check_matrices(call)
    _check_groups(call, [_WHOLE_BLOCKS])
    check_dtype(OP, "bias", call.bias, torch.float32)
    *_, rows, inner = call.x1.shape
    *_, x2_rows, columns = call.x2.shape
    check_inner(inner, x2_rows)
    batch = batch_shape(call.x1, call.x2)
    _check_block_scales(call, inner, columns)
    check_bias_shape(call.bias, batch, columns)
    return (*batch, rows, columns)


def _mx_float4(call: Call, output: torch.dtype) -> tuple[Size, ...]:
    check_e8m0(call)
    check_absent(call, "microscaled operands", "offset", "y_scale")
    rows, inner, columns = _float4_sizes(call, 8)
    _check_groups(call, [_WHOLE_BLOCKS, _FREE_BLOCKS])
    _check_block_scales(call, inner, columns)
    check_dtype(OP, "bias", call.bias, output)
    check_shape(OP, "bias", call.bias, (1, columns))
    return rows, columns


def _two_level(call: Call, output: torch.dtype) -> tuple[Size, ...]:
    kind = "float4_e2m1 operands that are not microscaled"
    check_absent(call, kind, "offset", "pertoken_scale", "bias", "pertoken_scale_dtype", "scale_dtype")
    rows, inner, columns = _float4_sizes(call, mx.BLOCK)
    _check_groups(call, [_FREE_BLOCKS, _WHOLE_BLOCKS])
    check_dtype(OP, "scale", call.scale, output)
    check_shape(OP, "scale", call.scale, (columns, inner // mx.BLOCK))
    check(call.y_scale is not None, OP, "y_scale", None, f"a tensor with {kind}")
    check_dtype(OP, "y_scale", call.y_scale, torch.int64)
    check_shape(OP, "y_scale", call.y_scale, (1, columns))
    return rows, columns


def _float4_sizes(call: Call, multiple: int) -> tuple[Size, Size, Size]:
    """m, k and n of a product with an x2 of float4, two along k in a byte."""
    check_matrices(call, 2, 2)
    rows, inner = call.x1.shape
    pairs, columns = call.x2.shape
    accepted = "the transpose of a contiguous tensor [n, k/2]"
    check(call.x2.t().is_contiguous(), OP, "x2", f"float4_e2m1 with strides {call.x2.stride()}", accepted)
    check_size(inner % multiple == 0, OP, f"x1 has {inner} columns; accepted: a multiple of {multiple}")
    check_inner(inner, 2 * pairs)
    return rows, inner, columns


def _check_groups(call: Call, accepted: list[list[int]]) -> None:
    given = None if call.group_sizes is None else list(call.group_sizes)
    check(given in accepted, OP, "group_sizes", given, " or ".join(map(str, accepted)))


def _check_block_scales(call: Call, inner: Size, columns: Size) -> None:
    """Shapes and strides of the scales of microscaled operands. Like eager torch_npu, the latter as well: a
    scale is stored in the order of its operand."""
    pertoken_scale = call.pertoken_scale
    assert pertoken_scale is not None
    pairs = (inner + _PAIR - 1) // _PAIR
    scales = (
        ("pertoken_scale", pertoken_scale, (*call.x1.shape[:-1], pairs, 2), "x1", call.x1),
        ("scale", call.scale, (*call.x2.shape[:-2], pairs, columns, 2), "x2", call.x2),
    )
    for argument, scale, shape, of, operand in scales:
        if scale.dtype not in (torch.uint8, _compat.E8M0):
            given = names([scale.dtype])
            raise ValueError(f"{OP}: {argument} has dtype {given}; accepted: uint8, float8_e8m0fnu")
        check_shape(OP, argument, scale, shape)
        in_memory, wanted = _transposed(scale, scale.dim() - 3), _transposed(operand, operand.dim() - 2)
        if in_memory is not None and wanted is not None:
            words = {True: "transposed", False: "not transposed"}
            accepted = f"{words[wanted]}, as {of} is"
            check(in_memory == wanted, OP, argument, f"{words[in_memory]} in memory", accepted)


def _transposed(tensor: Tensor, dim: int) -> bool | None:
    """Are the dimensions ``dim`` and ``dim + 1`` swapped in memory? None where both have size 1."""
    if tensor.size(dim) == 1 and tensor.size(dim + 1) == 1:
        return None
    return bool(tensor.stride(dim + 1) == tensor.stride(dim) * tensor.size(dim))
