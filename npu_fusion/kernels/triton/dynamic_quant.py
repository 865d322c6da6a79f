"""npu_dynamic_quant on CUDA: int8 with a scale for each token, with and without smooth scales (one row of
them or one for each group). Formula and traps: the file of this name in meta_impls; int4 and the other modes
are the reference kernel's.

One program takes a row: it reads it once and keeps it in registers, or twice if it is wide (``_rows.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_fusion.kernels.triton._launch import (
    RowKernel,
    contiguous,
    group_ends,
    held_or_looped,
    row_major,
)
from npu_fusion.kernels.triton._rows import (
    INT8_MAX,
    RINT,
    as_float,
    group_of,
    load,
    magnitude,
    peak,
    quantized,
    store,
)
from npu_fusion.meta_impls.dynamic_quant import destination


@triton.jit
def _values(
    x: tl.tensor,
    smooth: tl.tensor,
    grouped: tl.tensor,
    columns: tl.tensor,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    value = load(x, columns, WIDTH, MASKED).to(tl.float32)
    if smooth is not None:
        factor = load(smooth, columns, WIDTH, MASKED).to(tl.float32)
        value *= tl.where(grouped, factor, 1.0)
    return value


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x: tl.tensor,
    smooth: tl.tensor,
    ends: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    rows: tl.tensor,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    LOOPED: tl.constexpr,
) -> None:
    RAGGED: tl.constexpr = WIDTH % MAIN != 0
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        x_row = x + at * WIDTH
        y_row = y + at * WIDTH
        factors = smooth
        grouped = True
        if GROUPS > 0:
            group = group_of(ends, row, GROUPS, GROUP_BLOCK)
            grouped = group < GROUPS
            factors += tl.minimum(group, GROUPS - 1) * WIDTH
        if LOOPED:
            seen = tl.zeros([MAIN], tl.int32)
            for start in range(0, WIDTH, MAIN):
                columns = start + tl.arange(0, MAIN)
                value = _values(x_row, factors, grouped, columns, WIDTH, RAGGED)
                seen = tl.maximum(seen, magnitude(value))
            row_scale = tl.div_rn(as_float(tl.max(seen, axis=0)), INT8_MAX)
            for start in range(0, WIDTH, MAIN):
                columns = start + tl.arange(0, MAIN)
                value = _values(x_row, factors, grouped, columns, WIDTH, RAGGED)
                store(y_row, columns, quantized(value, row_scale, RINT), WIDTH, RAGGED)
        else:
            columns = tl.arange(0, MAIN)
            value = _values(x_row, factors, grouped, columns, WIDTH, False)
            amax = peak(value)
            if TAIL > 0:
                behind = MAIN + tl.arange(0, TAIL)
                rest = _values(x_row, factors, grouped, behind, WIDTH, MAIN + TAIL > WIDTH)
                amax = tl.maximum(amax, peak(rest))
            row_scale = tl.div_rn(as_float(amax), INT8_MAX)
            store(y_row, columns, quantized(value, row_scale, RINT), WIDTH, False)
            if TAIL > 0:
                store(y_row, behind, quantized(rest, row_scale, RINT), WIDTH, MAIN + TAIL > WIDTH)
        tl.store(scale + at, row_scale)


KERNEL = RowKernel(_kernel, ("x", "y", "scale"), held_or_looped)


def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    if quant_mode != "pertoken" or destination("npu_dynamic_quant", dst_type) != torch.int8:
        return NotImplemented
    width = input.shape[-1]
    y = input.new_empty(input.shape, dtype=torch.int8)
    scale = input.new_empty(input.shape[:-1], dtype=torch.float32)
    if width == 0:
        return y, scale.zero_()
    ends, groups, group_block = group_ends(group_index, running=True)
    arguments = {
        "x": row_major(input),
        "smooth": contiguous(smooth_scales),
        "ends": ends,
        "y": y.view(-1, width),
        "scale": scale.view(-1),
    }
    constants = {"WIDTH": width, "GROUPS": groups, "GROUP_BLOCK": group_block}
    KERNEL(scale.numel(), arguments, constants, input.device)
    return y, scale
