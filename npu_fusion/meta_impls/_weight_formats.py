"""What npu_weight_quant_batchmatmul takes for a weight: the types of its numbers, and how tensors carry them.

=================  ===================================  ============================================
numbers            tensor                               scales
=================  ===================================  ============================================
``int8``           int8                                 one, one for each column, or groups of rows
``int4``           int32, eight in each                 the same
``float8_e4m3fn``  float8_e4m3fn                        one for each column
``hifloat8``       uint8, weight_dtype 290              one for each column
``float4_e2m1``    float32, eight in each               groups of rows; e8m0 too (mxfp4)
``float4_e2m1``    uint8, weight_dtype 296, two each    groups of rows; e8m0 too (mxfp4)
``float4_e1m2``    uint8, weight_dtype 297, two each    groups of rows
=================  ===================================  ============================================

Several in one element lie in its bits, lowest first, as they are along the columns of a contiguous weight, or
along the rows of a transposed one (a [K/8, N] view of [N, K/8]).

Source: Meta and eager implementation of torch_npu 2.13.0 (float32 as a carrier is what
npu_convert_weight_to_int4pack gives); documentation and checks of aclnnWeightQuantBatchMatmulV2 and V3, which
know no float4_e1m2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_fusion import _compat
from npu_fusion.meta_impls._checks import check, check_dtype, check_rank, check_shape, check_size, names
from npu_fusion.meta_impls._dtypes import FLOAT4_E1M2, FLOAT4_E2M1, HIFLOAT8

OP = "npu_weight_quant_batchmatmul"

MX_BLOCK = 32


@dataclass(frozen=True)
class WeightFormat:
    """One row of the table."""

    numbers: str
    per_element: int = 1

    @property
    def integer(self) -> bool:
        return self.numbers.startswith("int")


_FORMATS: dict[torch.dtype, dict[int | None, WeightFormat]] = {
    torch.int8: {None: WeightFormat("int8")},
    torch.int32: {None: WeightFormat("int4", 8)},
    torch.float8_e4m3fn: {None: WeightFormat("float8_e4m3fn")},
    torch.float32: {None: WeightFormat("float4_e2m1", 8)},
    torch.uint8: {
        HIFLOAT8: WeightFormat("hifloat8"),
        FLOAT4_E2M1: WeightFormat("float4_e2m1", 2),
        FLOAT4_E1M2: WeightFormat("float4_e1m2", 2),
    },
}


def format_of(weight: Tensor, weight_dtype: int | None) -> WeightFormat:
    """The format of a weight; ``ValueError`` for a tensor and number that say none."""
    check_dtype(OP, "weight", weight, *_FORMATS)
    known = _FORMATS[weight.dtype]
    options = " or ".join(
        "None" if number is None else f"{number} ({known[number].numbers})" for number in known
    )
    check(weight_dtype in known, OP, "weight_dtype", weight_dtype, f"{options} for {names([weight.dtype])}")
    return known[weight_dtype]


def packed_along_rows(weight: Tensor) -> bool:
    """Do the numbers in one element of ``weight`` belong to a column (a transposed view), not to a row?"""
    return not weight.is_contiguous()


def logical_shape(weight: Tensor, form: WeightFormat) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    """[K, N] of a weight of two dimensions."""
    rows, columns = weight.shape
    if form.per_element == 1:
        return rows, columns
    if packed_along_rows(weight):
        accepted = "contiguous, or the transpose of a contiguous tensor"
        given = f"{form.numbers} in {names([weight.dtype])} with strides {weight.stride()}"
        check(weight.t().is_contiguous(), OP, "weight", given, accepted)
        return rows * form.per_element, columns
    return rows, columns * form.per_element


def microscaled(antiquant_scale: Tensor) -> bool:
    """Are the scales powers of two (e8m0)?"""
    return antiquant_scale.dtype in (torch.uint8, _compat.E8M0)


def check_float_scale(
    form: WeightFormat,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    columns: int | torch.SymInt,
    group_size: int,
) -> None:
    """The rules for the scales of weights that are floating-point numbers."""
    if form.per_element == 1:
        check_dtype(OP, "antiquant_scale", scale, x.dtype)
        check(group_size == 0, OP, "antiquant_group_size", group_size, f"0 with weights of {form.numbers}")
        check_rank(OP, "antiquant_scale", scale, 1, 2)
        check_shape(OP, "antiquant_scale", scale, (columns,) if scale.dim() == 1 else (1, columns))
        return
    mx = microscaled(scale) and form.numbers == "float4_e2m1"
    if not mx and scale.dtype != x.dtype:
        also = ", uint8, float8_e8m0fnu" if form.numbers == "float4_e2m1" else ""
        raise ValueError(
            f"{OP}: antiquant_scale has dtype {names([scale.dtype])}; accepted: {names([x.dtype])}{also}"
        )
    if mx:
        check(group_size == MX_BLOCK, OP, "antiquant_group_size", group_size, f"{MX_BLOCK} with e8m0 scales")
    inner = x.size(1)
    accepted = f"a multiple of {MX_BLOCK} below the {inner} rows of the weight"
    message = f"antiquant_group_size is {group_size}; accepted: {accepted}"
    check_size(group_size > 0 and group_size % MX_BLOCK == 0, OP, message)
    check_size(group_size < inner, OP, message)
    check_shape(OP, "antiquant_scale", scale, ((inner + group_size - 1) // group_size, columns))
    # As the device demands.
    words = {True: "contiguous", False: "not contiguous"}
    order, wanted = scale.is_contiguous(), weight.is_contiguous()
    check(order == wanted, OP, "antiquant_scale", words[order], f"{words[wanted]}, as the weight is")
