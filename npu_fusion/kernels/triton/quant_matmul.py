"""npu_quant_matmul on CUDA. Formula and traps: the file of this name in meta_impls; a batch of x2 and
floating-point operands are the reference kernel's.

::

    m <= 64, or sizes that cuBLAS refuses:   one kernel: int8 product, int32 in registers, scales, one store
    m > 64:                                  torch._int_mm (cuBLAS) ─▶ int32 ─▶ kernel: scales, one pass

The rule is not measured. Its reason: with few rows the product reads the weights once and is bound by that,
the int32 matrix of the second way is another write and read, and cuBLAS takes no fewer than 17 rows; with
many rows the product is bound by arithmetic, in which the library is hard to beat. The first kernel is
compiled for two heights of its tile, 16 and 64 rows, whatever the numbers of rows are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_fusion.kernels.reference._quant import unpack_quant_param
from npu_fusion.kernels.triton._launch import Choice, RowKernel, contiguous, looped, power_of_two
from npu_fusion.kernels.triton._rows import RINT, load, rounded, store
from npu_fusion.meta_impls.quant_matmul import result_dtype

FEW_ROWS = 64
_HEIGHTS = (16, FEW_ROWS)
_CUBLAS_MULTIPLE = 8


@triton.jit
def _dequantized(
    acc: tl.tensor,
    scale: tl.tensor,
    row_scale: tl.tensor,
    offset: tl.tensor,
    shift: tl.tensor,
    INT_BIAS: tl.constexpr,
    FLOAT_BIAS: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """int32 sums to ``dtype``. ``scale``, ``shift`` (the bias) and ``offset`` have a number for each column,
    ``row_scale`` for each row."""
    if INT_BIAS:
        acc += shift
    if dtype == tl.int32:
        y = acc
    else:
        x = acc.to(tl.float32) * scale * row_scale
        if FLOAT_BIAS:
            x += shift
        if dtype == tl.int8:
            y = rounded(x + offset, RINT)
        else:
            y = x.to(dtype)
    return y


@triton.jit
def _numbers(
    table: tl.tensor, columns: tl.tensor, WIDTH: tl.constexpr, STEP: tl.constexpr, otherwise: tl.constexpr
) -> tl.tensor:
    """A number for each column in fp32; STEP 0: the same for all. ``otherwise`` where there is no table."""
    if table is None:
        numbers = tl.full(columns.shape, otherwise, tl.float32)
    else:
        numbers = load(table, columns * STEP, WIDTH, True).to(tl.float32)
    return numbers


@triton.jit
def _bias_of(bias: tl.tensor, columns: tl.tensor, WIDTH: tl.constexpr, INT_BIAS: tl.constexpr) -> tl.tensor:
    if INT_BIAS:
        shift = load(bias, columns, WIDTH, True)
    else:
        shift = _numbers(bias, columns, WIDTH, 1, 0.0)
    return shift


@triton.jit(do_not_specialize=["rows"])
def _product_kernel(
    x1: tl.tensor,
    x2: tl.tensor,
    scale: tl.tensor,
    pertoken_scale: tl.tensor,
    offset: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    x2_inner: tl.tensor,
    x2_column: tl.tensor,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE_STEP: tl.constexpr,
    OFFSET_STEP: tl.constexpr,
    INT_BIAS: tl.constexpr,
    FLOAT_BIAS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_INNER: tl.constexpr,
) -> None:
    """A program computes tiles of the result; those that share columns of x2 are next to each other."""
    down = tl.cdiv(rows, TILE_ROWS)
    tiles = down * tl.cdiv(WIDTH, TILE_COLUMNS)
    inner = tl.arange(0, TILE_INNER)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = (tile % down) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        columns = (tile // down) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        there = row < rows
        at = tl.cast(row, tl.int64)
        left = x1 + at[:, None] * INNER + inner[None, :]
        right = x2 + inner[:, None] * x2_inner + tl.cast(columns, tl.int64)[None, :] * x2_column
        acc = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.int32)
        for start in range(0, INNER, TILE_INNER):
            within = start + inner < INNER
            a = tl.load(left, mask=there[:, None] & within[None, :], other=0)
            b = tl.load(right, mask=within[:, None] & (columns < WIDTH)[None, :], other=0)
            acc += tl.dot(a, b, out_dtype=tl.int32)
            left += TILE_INNER
            right += TILE_INNER * x2_inner
        if pertoken_scale is None:
            row_scale = tl.full([TILE_ROWS], 1.0, tl.float32)
        else:
            row_scale = tl.load(pertoken_scale + at, mask=there, other=0.0)
        result = _dequantized(
            acc,
            _numbers(scale, columns, WIDTH, SCALE_STEP, 1.0)[None, :],
            row_scale[:, None],
            _numbers(offset, columns, WIDTH, OFFSET_STEP, 0.0)[None, :],
            _bias_of(bias, columns, WIDTH, INT_BIAS)[None, :],
            INT_BIAS,
            FLOAT_BIAS,
            y.dtype.element_ty,
        )
        place = y + at[:, None] * WIDTH + columns[None, :]
        tl.store(place, result, mask=there[:, None] & (columns < WIDTH)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _epilogue_kernel(
    acc: tl.tensor,
    scale: tl.tensor,
    pertoken_scale: tl.tensor,
    offset: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    WIDTH: tl.constexpr,
    SCALE_STEP: tl.constexpr,
    OFFSET_STEP: tl.constexpr,
    INT_BIAS: tl.constexpr,
    FLOAT_BIAS: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    LOOPED: tl.constexpr,
) -> None:
    """A program takes a row of int32 sums."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        row_scale = 1.0
        if pertoken_scale is not None:
            row_scale = tl.load(pertoken_scale + at)
        for start in range(0, WIDTH, MAIN):
            columns = start + tl.arange(0, MAIN)
            result = _dequantized(
                load(acc + at * WIDTH, columns, WIDTH, True),
                _numbers(scale, columns, WIDTH, SCALE_STEP, 1.0),
                row_scale,
                _numbers(offset, columns, WIDTH, OFFSET_STEP, 0.0),
                _bias_of(bias, columns, WIDTH, INT_BIAS),
                INT_BIAS,
                FLOAT_BIAS,
                y.dtype.element_ty,
            )
            store(y + at * WIDTH, columns, result, WIDTH, True)


def _tiles(constants: dict[str, Any]) -> list[Choice]:
    widest, deepest = power_of_two(constants["WIDTH"]), power_of_two(constants["INNER"])
    shapes = {(min(c, max(widest, 16)), min(k, max(deepest, 32))) for c in (64, 32, 128) for k in (128, 256)}
    return [
        Choice({"TILE_COLUMNS": c, "TILE_INNER": k}, 4, stages)
        for c, k in sorted(shapes)
        for stages in (3, 4)
    ]


def _programs(rows: int, constants: dict[str, Any]) -> int:
    return triton.cdiv(rows, constants["TILE_ROWS"]) * triton.cdiv(
        constants["WIDTH"], constants["TILE_COLUMNS"]
    )


PRODUCTS = {
    height: RowKernel(
        _product_kernel,
        ("x1", "pertoken_scale", "y"),
        _tiles,
        programs=_programs,
        sample_rows=height,
    )
    for height in _HEIGHTS
}
EPILOGUE = RowKernel(_epilogue_kernel, ("acc", "pertoken_scale", "y"), looped)


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: Sequence[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    *leading, inner = x1.shape
    columns = x2.shape[-1]
    one_bias = bias is None or bias.numel() == columns
    if x1.dtype != torch.int8 or x2.dim() != 2 or not one_bias or inner == 0 or columns == 0:
        return NotImplemented
    output = result_dtype(output_dtype)
    if scale.dtype == torch.int64:
        scale, packed_offset = unpack_quant_param(scale)
        offset = packed_offset if output == torch.int8 else None
    left, rows = x1.reshape(-1, inner).contiguous(), math.prod(leading)
    library = _by_library(rows, inner, columns)
    acc = torch._int_mm(left, x2 if 1 in x2.stride() else x2.contiguous()) if library else None
    if acc is not None and output == torch.int32 and bias is None:
        return acc.view(*leading, columns)
    y = x1.new_empty((*leading, columns), dtype=output)
    if pertoken_scale is not None:
        pertoken_scale = pertoken_scale.expand(leading).reshape(-1).contiguous()
    arguments: dict[str, Any] = {
        "scale": None if output == torch.int32 else scale.contiguous(),
        "pertoken_scale": pertoken_scale,
        "offset": contiguous(offset),
        "bias": None if bias is None else bias.reshape(-1).contiguous(),
        "y": y.view(rows, columns),
    }
    constants = {
        "WIDTH": columns,
        "SCALE_STEP": 1 if scale.numel() == columns else 0,
        "OFFSET_STEP": 1 if offset is not None and offset.numel() == columns else 0,
        "INT_BIAS": bias is not None and bias.dtype == torch.int32,
        "FLOAT_BIAS": bias is not None and bias.dtype != torch.int32,
    }
    if acc is not None:
        EPILOGUE(rows, {"acc": acc, **arguments}, constants, x1.device)
        return y
    height = next((height for height in _HEIGHTS if rows <= height), _HEIGHTS[-1])
    strides = {"x2_inner": x2.stride(0), "x2_column": x2.stride(1)}
    tile = {**constants, "INNER": inner, "TILE_ROWS": height}
    PRODUCTS[height](rows, {"x1": left, "x2": x2, **arguments, **strides}, tile, x1.device)
    return y


def _by_library(rows: int, inner: int, columns: int) -> bool:
    return rows > FEW_ROWS and inner % _CUBLAS_MULTIPLE == 0 and columns % _CUBLAS_MULTIPLE == 0
