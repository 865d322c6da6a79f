"""npu_swiglu_quant on CUDA, int8. Formula and traps: the file of this name in meta_impls; int4 is the
reference kernel's.

One program takes a row, as in ``dequant_swiglu_quant.py``.
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
    looped,
    row_major,
)
from npu_fusion.kernels.triton._rows import (
    INT8_MAX,
    RINT,
    as_float,
    gated,
    group_of,
    load,
    magnitude,
    peak,
    rounded,
    store,
)
from npu_fusion.meta_impls.swiglu_quant import CUMSUM, DYNAMIC


@triton.jit
def _values(
    x: tl.tensor,
    smooth: tl.tensor,
    grouped: tl.tensor,
    columns: tl.tensor,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    ACT: tl.constexpr,
    LIN: tl.constexpr,
    STEP: tl.constexpr,
) -> tl.tensor:
    act = load(x + ACT, columns, WIDTH, MASKED).to(tl.float32)
    lin = load(x + LIN, columns, WIDTH, MASKED).to(tl.float32)
    s = gated(act, lin, 1.0)
    if smooth is not None:
        s *= tl.where(grouped, load(smooth, columns * STEP, WIDTH, MASKED), 1.0)
    return s


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x: tl.tensor,
    smooth: tl.tensor,
    offset: tl.tensor,
    ends: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    rows: tl.tensor,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    ACT: tl.constexpr,
    LIN: tl.constexpr,
    IS_DYNAMIC: tl.constexpr,
    STEP: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    LOOPED: tl.constexpr,
) -> None:
    TABLE_ROW: tl.constexpr = WIDTH if STEP == 1 else 1
    RAGGED: tl.constexpr = WIDTH % MAIN != 0
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        x_row = x + at * (2 * WIDTH)
        y_row = y + at * WIDTH
        group = 0
        grouped = True
        if GROUPS > 0:
            group = group_of(ends, row, GROUPS, GROUP_BLOCK)
            grouped = group < GROUPS
            group = tl.minimum(group, GROUPS - 1)
        factors = smooth
        if smooth is not None:
            factors += group * TABLE_ROW
        shifts = offset
        if offset is not None:
            shifts += group * TABLE_ROW
        if LOOPED:
            row_scale = 0.0
            if IS_DYNAMIC:
                seen = tl.zeros([MAIN], tl.int32)
                for start in range(0, WIDTH, MAIN):
                    columns = start + tl.arange(0, MAIN)
                    s = _values(x_row, factors, grouped, columns, WIDTH, RAGGED, ACT, LIN, STEP)
                    seen = tl.maximum(seen, magnitude(s))
                row_scale = tl.div_rn(INT8_MAX, as_float(tl.max(seen, axis=0)))
            for start in range(0, WIDTH, MAIN):
                columns = start + tl.arange(0, MAIN)
                s = _values(x_row, factors, grouped, columns, WIDTH, RAGGED, ACT, LIN, STEP)
                if IS_DYNAMIC:
                    s *= row_scale
                elif offset is not None:
                    s += tl.where(grouped, load(shifts, columns * STEP, WIDTH, RAGGED), 0.0)
                store(y_row, columns, rounded(s, RINT), WIDTH, RAGGED)
        else:
            columns = tl.arange(0, MAIN)
            s = _values(x_row, factors, grouped, columns, WIDTH, False, ACT, LIN, STEP)
            amax = peak(s)
            if TAIL > 0:
                CUT: tl.constexpr = MAIN + TAIL > WIDTH
                behind = MAIN + tl.arange(0, TAIL)
                rest = _values(x_row, factors, grouped, behind, WIDTH, CUT, ACT, LIN, STEP)
                amax = tl.maximum(amax, peak(rest))
            row_scale = tl.div_rn(INT8_MAX, as_float(amax))
            # A row of zeros: 0 * inf is NaN, which becomes 0.
            store(y_row, columns, rounded(s * row_scale, RINT), WIDTH, False)
            if TAIL > 0:
                store(y_row, behind, rounded(rest * row_scale, RINT), WIDTH, CUT)
        tl.store(scale + at, row_scale)


_PER_ROW = ("x", "y", "scale")
DYNAMIC_KERNEL = RowKernel(_kernel, _PER_ROW, held_or_looped)
STATIC_KERNEL = RowKernel(_kernel, _PER_ROW, looped)


def npu_swiglu_quant(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    offsets: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    group_list_type: int = 0,
    dst_type: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    if dst_type not in (None, torch.int8):
        return NotImplemented
    *tokens, channels = x.shape
    width = channels // 2
    y = x.new_empty((*tokens, width), dtype=torch.int8)
    scale = x.new_empty(tokens, dtype=torch.float32)
    ends, groups, group_block = group_ends(group_index, running=group_list_type == CUMSUM)
    is_dynamic = quant_mode == DYNAMIC
    arguments = {
        "x": row_major(x),
        "smooth": contiguous(smooth_scales),
        "offset": None if is_dynamic else contiguous(offsets),
        "ends": ends,
        "y": y.view(-1, width),
        "scale": scale.view(-1),
    }
    constants = {
        "WIDTH": width,
        "GROUPS": groups,
        "GROUP_BLOCK": group_block,
        "ACT": 0 if activate_left else width,
        "LIN": width if activate_left else 0,
        "IS_DYNAMIC": is_dynamic,
        "STEP": 0 if smooth_scales is not None and smooth_scales.dim() == 1 else 1,
    }
    kernel = DYNAMIC_KERNEL if is_dynamic else STATIC_KERNEL
    kernel(scale.numel(), arguments, constants, x.device)
    return y, scale
