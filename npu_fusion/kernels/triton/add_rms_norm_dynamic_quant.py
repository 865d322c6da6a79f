"""npu_add_rms_norm_dynamic_quant on CUDA, int8. Formula and traps: the file of this name in meta_impls; int4
is the reference kernel's.

One program takes a row. Held in registers, x1 and x2 are read once; looped, they are read for the sum of
squares, and for each output for its largest magnitude and for its values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_fusion.kernels.triton._launch import RowKernel, contiguous, held_or_looped, row_major
from npu_fusion.kernels.triton._norm import reciprocal_rms
from npu_fusion.kernels.triton._rows import (
    INT8_MAX,
    RINT,
    as_float,
    load,
    magnitude,
    peak,
    quantized,
    store,
)
from npu_fusion.meta_impls._dtypes import torch_dtype
from npu_fusion.meta_impls.add_rms_norm_dynamic_quant import present


@triton.jit
def _total(
    x1: tl.tensor, x2: tl.tensor, columns: tl.tensor, WIDTH: tl.constexpr, MASKED: tl.constexpr
) -> tl.tensor:
    left = load(x1, columns, WIDTH, MASKED).to(tl.float32)
    return left + load(x2, columns, WIDTH, MASKED).to(tl.float32)


@triton.jit
def _normalized(
    total: tl.tensor,
    rstd: tl.tensor,
    gamma: tl.tensor,
    beta: tl.tensor,
    columns: tl.tensor,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    n = total * rstd * load(gamma, columns, WIDTH, MASKED).to(tl.float32)
    if beta is not None:
        n += load(beta, columns, WIDTH, MASKED).to(tl.float32)
    return n


@triton.jit
def _smoothed(
    n: tl.tensor, smooth: tl.tensor, columns: tl.tensor, WIDTH: tl.constexpr, MASKED: tl.constexpr
) -> tl.tensor:
    if smooth is not None:
        n *= load(smooth, columns, WIDTH, MASKED).to(tl.float32)
    return n


@triton.jit
def _held(
    n: tl.tensor,
    rest: tl.tensor,
    smooth: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
) -> None:
    """One quantized output of a row whose normalized values are in registers."""
    CUT: tl.constexpr = MAIN + TAIL > WIDTH
    columns = tl.arange(0, MAIN)
    r = _smoothed(n, smooth, columns, WIDTH, False)
    amax = peak(r)
    if TAIL > 0:
        behind = MAIN + tl.arange(0, TAIL)
        r_rest = _smoothed(rest, smooth, behind, WIDTH, CUT)
        amax = tl.maximum(amax, peak(r_rest))
    row_scale = tl.div_rn(as_float(amax), INT8_MAX)
    store(y, columns, quantized(r, row_scale, RINT), WIDTH, False)
    if TAIL > 0:
        store(y, behind, quantized(r_rest, row_scale, RINT), WIDTH, CUT)
    tl.store(scale, row_scale)


@triton.jit
def _looped(
    x1: tl.tensor,
    x2: tl.tensor,
    rstd: tl.tensor,
    gamma: tl.tensor,
    beta: tl.tensor,
    smooth: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
) -> None:
    """One quantized output of a row that is read again."""
    RAGGED: tl.constexpr = WIDTH % MAIN != 0
    seen = tl.zeros([MAIN], tl.int32)
    for start in range(0, WIDTH, MAIN):
        columns = start + tl.arange(0, MAIN)
        total = _total(x1, x2, columns, WIDTH, RAGGED)
        n = _normalized(total, rstd, gamma, beta, columns, WIDTH, RAGGED)
        seen = tl.maximum(seen, magnitude(_smoothed(n, smooth, columns, WIDTH, RAGGED)))
    row_scale = tl.div_rn(as_float(tl.max(seen, axis=0)), INT8_MAX)
    for start in range(0, WIDTH, MAIN):
        columns = start + tl.arange(0, MAIN)
        total = _total(x1, x2, columns, WIDTH, RAGGED)
        n = _normalized(total, rstd, gamma, beta, columns, WIDTH, RAGGED)
        r = _smoothed(n, smooth, columns, WIDTH, RAGGED)
        store(y, columns, quantized(r, row_scale, RINT), WIDTH, RAGGED)
    tl.store(scale, row_scale)


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x1: tl.tensor,
    x2: tl.tensor,
    gamma: tl.tensor,
    beta: tl.tensor,
    smooth1: tl.tensor,
    smooth2: tl.tensor,
    x: tl.tensor,
    y1: tl.tensor,
    y2: tl.tensor,
    scale1: tl.tensor,
    scale2: tl.tensor,
    rows: tl.tensor,
    epsilon: tl.tensor,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    LOOPED: tl.constexpr,
) -> None:
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        start_of_row = at * WIDTH
        x1_row = x1 + start_of_row
        x2_row = x2 + start_of_row
        x_row = x + start_of_row
        if LOOPED:
            RAGGED: tl.constexpr = WIDTH % MAIN != 0
            squares = tl.zeros([MAIN], tl.float32)
            for start in range(0, WIDTH, MAIN):
                columns = start + tl.arange(0, MAIN)
                total = _total(x1_row, x2_row, columns, WIDTH, RAGGED)
                store(x_row, columns, total.to(x.dtype.element_ty), WIDTH, RAGGED)
                squares += total * total
            rstd = reciprocal_rms(tl.sum(squares, axis=0), WIDTH, epsilon)
            if y1 is not None:
                _looped(
                    x1_row, x2_row, rstd, gamma, beta, smooth1, y1 + start_of_row, scale1 + at, WIDTH, MAIN
                )
            if y2 is not None:
                _looped(
                    x1_row, x2_row, rstd, gamma, beta, smooth2, y2 + start_of_row, scale2 + at, WIDTH, MAIN
                )
        else:
            columns = tl.arange(0, MAIN)
            total = _total(x1_row, x2_row, columns, WIDTH, False)
            store(x_row, columns, total.to(x.dtype.element_ty), WIDTH, False)
            squares = tl.sum(total * total, axis=0)
            rest = total
            if TAIL > 0:
                CUT: tl.constexpr = MAIN + TAIL > WIDTH
                behind = MAIN + tl.arange(0, TAIL)
                rest = _total(x1_row, x2_row, behind, WIDTH, CUT)
                store(x_row, behind, rest.to(x.dtype.element_ty), WIDTH, CUT)
                squares += tl.sum(rest * rest, axis=0)
            rstd = reciprocal_rms(squares, WIDTH, epsilon)
            n = _normalized(total, rstd, gamma, beta, columns, WIDTH, False)
            if TAIL > 0:
                rest = _normalized(rest, rstd, gamma, beta, behind, WIDTH, CUT)
            if y1 is not None:
                _held(n, rest, smooth1, y1 + start_of_row, scale1 + at, WIDTH, MAIN, TAIL)
            if y2 is not None:
                _held(n, rest, smooth2, y2 + start_of_row, scale2 + at, WIDTH, MAIN, TAIL)


KERNEL = RowKernel(_kernel, ("x1", "x2", "x", "y1", "y2", "scale1", "scale2"), held_or_looped)


def npu_add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    smooth_scale1: Tensor | None = None,
    smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: Sequence[bool] | None = None,
    y_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if torch_dtype(y_dtype, torch.int8) != torch.int8:
        return NotImplemented
    width = x1.shape[-1]
    x = x1.new_empty(x1.shape)
    exist = present(smooth_scale1, smooth_scale2, output_mask)
    y1, y2 = (x1.new_empty(x1.shape if e else [0], dtype=torch.int8) for e in exist)
    scale1, scale2 = (x1.new_empty(x1.shape[:-1] if e else [0], dtype=torch.float32) for e in exist)
    arguments = {
        "x1": row_major(x1),
        "x2": row_major(x2),
        "gamma": gamma.contiguous(),
        "beta": contiguous(beta),
        "smooth1": contiguous(smooth_scale1),
        "smooth2": contiguous(smooth_scale2),
        "x": x.view(-1, width),
        "y1": y1.view(-1, width) if exist[0] else None,
        "y2": y2.view(-1, width) if exist[1] else None,
        "scale1": scale1.view(-1) if exist[0] else None,
        "scale2": scale2.view(-1) if exist[1] else None,
        "epsilon": float(epsilon),
    }
    KERNEL(x.numel() // width, arguments, {"WIDTH": width}, x1.device)
    return y1, y2, x, scale1, scale2
