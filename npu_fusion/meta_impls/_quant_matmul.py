"""A call of npu_quant_matmul as a whole: what its operands are, and what every kind of them must fulfil."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import check, check_dtype, check_rank, check_shape, check_size, names
from npu_fusion.meta_impls._dtypes import E8M0, FLOAT4_E2M1, HIFLOAT8

OP = "npu_quant_matmul"

Size = int | torch.SymInt


class Kind(Enum):
    """What is multiplied with what, and how it is scaled."""

    INT8 = auto()
    """int8 x int8; a scale for each column, and maybe each row."""
    FLOAT8 = auto()
    """float8_e4m3fn x float8_e4m3fn or hifloat8 x hifloat8, scaled alike."""
    MX = auto()
    """float8_e4m3fn x float8_e4m3fn; a power of two for 32 numbers along the inner dimension of each."""
    MX_FLOAT4 = auto()
    """The same with an x2 of float4_e2m1."""
    TWO_LEVEL = auto()
    """float8_e4m3fn x float4_e2m1; a scale for 32 numbers of a column of x2, and another for the column."""


@dataclass(frozen=True)
class Call:
    """The arguments of the operator, by their names."""

    x1: Tensor
    x2: Tensor
    scale: Tensor
    offset: Tensor | None = None
    pertoken_scale: Tensor | None = None
    bias: Tensor | None = None
    output_dtype: int | torch.dtype | None = None
    x1_dtype: int | None = None
    x2_dtype: int | None = None
    pertoken_scale_dtype: int | None = None
    scale_dtype: int | None = None
    group_sizes: Sequence[int] | None = None
    y_scale: Tensor | None = None


def kind_of(call: Call) -> Kind:
    """The kind of a call; ``ValueError`` where its operands, or their scales, do not go together."""
    if call.x1.dtype == torch.int8:
        check(call.x1_dtype is None, OP, "x1_dtype", call.x1_dtype, "None for int8")
        check_dtype(OP, "x2", call.x2, torch.int8)
        check(call.x2_dtype is None, OP, "x2_dtype", call.x2_dtype, "None for int8")
        return Kind.INT8
    if call.x1.dtype == torch.uint8:
        check(call.x1_dtype == HIFLOAT8, OP, "x1_dtype", call.x1_dtype, f"{HIFLOAT8} (hifloat8) for uint8")
        check_dtype(OP, "x2", call.x2, torch.uint8)
        accepted = f"{HIFLOAT8} (hifloat8) beside the same of x1"
        check(call.x2_dtype == HIFLOAT8, OP, "x2_dtype", call.x2_dtype, accepted)
        return Kind.FLOAT8
    if call.x1.dtype != torch.float8_e4m3fn:
        accepted = f"int8, float8_e4m3fn, or uint8 with x1_dtype {HIFLOAT8} (hifloat8)"
        raise ValueError(f"{OP}: x1 has dtype {names([call.x1.dtype])}; accepted: {accepted}")
    # Meta of torch_npu: the number is for types that PyTorch lacks, and refused beside one that it has.
    check(call.x1_dtype is None, OP, "x1_dtype", call.x1_dtype, "None for float8_e4m3fn")
    microscaled = call.scale_dtype is not None or call.pertoken_scale_dtype is not None
    if call.x2.dtype == torch.uint8:
        accepted = f"{FLOAT4_E2M1} (float4_e2m1) for uint8 beside float8_e4m3fn"
        check(call.x2_dtype == FLOAT4_E2M1, OP, "x2_dtype", call.x2_dtype, accepted)
        return Kind.MX_FLOAT4 if microscaled else Kind.TWO_LEVEL
    if call.x2.dtype != torch.float8_e4m3fn:
        accepted = f"float8_e4m3fn, or uint8 with x2_dtype {FLOAT4_E2M1} (float4_e2m1), beside float8_e4m3fn"
        raise ValueError(f"{OP}: x2 has dtype {names([call.x2.dtype])}; accepted: {accepted}")
    check(call.x2_dtype is None, OP, "x2_dtype", call.x2_dtype, "None for float8_e4m3fn")
    return Kind.MX if microscaled else Kind.FLOAT8


def check_absent(call: Call, kind: str, *arguments: str) -> None:
    """Refuse those of ``arguments`` that are given, although operands of this kind have no use for them."""
    for argument in arguments:
        check(getattr(call, argument) is None, OP, argument, "given", f"None with {kind}")


def check_e8m0(call: Call) -> None:
    """Both scales are there, and powers of two."""
    for argument in ("scale_dtype", "pertoken_scale_dtype"):
        value = getattr(call, argument)
        check(value == E8M0, OP, argument, value, f"{E8M0} (float8_e8m0fnu) for both scales")
    check(call.pertoken_scale is not None, OP, "pertoken_scale", None, "a tensor with microscaled operands")


def check_matrices(call: Call, low: int = 2, high: int = 6) -> None:
    for argument, operand in (("x1", call.x1), ("x2", call.x2)):
        check_rank(OP, argument, operand, low, high)


def check_inner(inner: Size, x2_rows: Size) -> None:
    check_size(inner == x2_rows, OP, f"x1 has {inner} columns, x2 {x2_rows} rows; accepted: the same number")


def batch_shape(x1: Tensor, x2: Tensor) -> tuple[Size, ...]:
    try:
        return tuple(torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2]))
    except RuntimeError as error:
        given = f"{list(x1.shape[:-2])} and {list(x2.shape[:-2])}"
        raise ValueError(f"{OP}: the batches of x1 and x2 are {given}; accepted: broadcastable") from error


def check_bias_shape(bias: Tensor | None, batch: tuple[Size, ...], columns: Size) -> None:
    """[n], or [batch, 1, n] for a result of rank 3."""
    if bias is not None:
        batched = bias.dim() == 3 and len(batch) == 1
        check_shape(OP, "bias", bias, (*batch, 1, columns) if batched else (columns,))
