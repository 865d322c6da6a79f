"""npu_dequant_swiglu_quant on CUDA. Formula and traps: the file of this name in meta_impls.

One program takes a row: it reads it once, keeps ``s`` in registers and writes int8 (``_rows.py``); static
quantization needs no reduction and goes through the row in blocks. Results in int8 along the last dimension;
everything else is the reference kernel's.

That the counts in ``group_index`` sum to no more than the rows is not checked here: asking would make the
host wait for the device. Rows beyond the tensor do not exist, so nothing is read or written out of it.
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
    as_float,
    gated,
    group_of,
    load,
    magnitude,
    peak,
    quantized,
    rounded,
    store,
)
from npu_fusion.meta_impls._dtypes import torch_dtype
from npu_fusion.meta_impls.dequant_swiglu_quant import DYNAMIC, HALVES, INTERLEAVED_CLIPPED, RINT


@triton.jit
def _values(
    x: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    token_scale: tl.tensor,
    columns: tl.tensor,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    STEP: tl.constexpr,
    INT_BIAS: tl.constexpr,
    FLOAT_BIAS: tl.constexpr,
    OFFSET: tl.constexpr,
) -> tl.tensor:
    """One half of d in fp32 for ``columns`` of the result: elements STEP * column + OFFSET of the row."""
    at = columns * STEP + OFFSET
    END: tl.constexpr = WIDTH * STEP + OFFSET
    value = load(x, at, END, MASKED)
    if INT_BIAS:
        value += load(bias, at, END, MASKED)
    d = value.to(tl.float32)
    if weight_scale is not None:
        d *= load(weight_scale, at, END, MASKED)
    if token_scale is not None:
        d *= token_scale
    if FLOAT_BIAS:
        d += load(bias, at, END, MASKED).to(tl.float32)
    return d


@triton.jit
def _activated(
    x: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    token_scale: tl.tensor,
    columns: tl.tensor,
    clamp_limit: tl.tensor,
    glu_alpha: tl.tensor,
    glu_bias: tl.tensor,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    STEP: tl.constexpr,
    INT_BIAS: tl.constexpr,
    FLOAT_BIAS: tl.constexpr,
    ACT: tl.constexpr,
    LIN: tl.constexpr,
    CLIPPED: tl.constexpr,
) -> tl.tensor:
    act = _values(x, weight_scale, bias, token_scale, columns, WIDTH, MASKED, STEP, INT_BIAS, FLOAT_BIAS, ACT)
    lin = _values(x, weight_scale, bias, token_scale, columns, WIDTH, MASKED, STEP, INT_BIAS, FLOAT_BIAS, LIN)
    if CLIPPED:
        # Written so that NaN stays NaN, as torch.clamp has it.
        act = tl.where(act > clamp_limit, clamp_limit, act)
        lin = tl.where(lin > clamp_limit, clamp_limit, tl.where(lin < -clamp_limit, -clamp_limit, lin))
        s = gated(act, lin + glu_bias, glu_alpha)
    else:
        s = gated(act, lin, 1.0)
    return s


@triton.jit
def _smoothed(
    s: tl.tensor, quant_scale: tl.tensor, columns: tl.tensor, WIDTH: tl.constexpr, MASKED: tl.constexpr
) -> tl.tensor:
    if quant_scale is not None:
        s *= load(quant_scale, columns, WIDTH, MASKED).to(tl.float32)
    return s


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x: tl.tensor,
    weight_scale: tl.tensor,
    activation_scale: tl.tensor,
    bias: tl.tensor,
    quant_scale: tl.tensor,
    quant_offset: tl.tensor,
    ends: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    rows: tl.tensor,
    clamp_limit: tl.tensor,
    glu_alpha: tl.tensor,
    glu_bias: tl.tensor,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    INT_BIAS: tl.constexpr,
    FLOAT_BIAS: tl.constexpr,
    ACT: tl.constexpr,
    LIN: tl.constexpr,
    CLIPPED: tl.constexpr,
    IS_DYNAMIC: tl.constexpr,
    QUANT_STEP: tl.constexpr,
    ROUND: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    LOOPED: tl.constexpr,
) -> None:
    QUANT_ROW: tl.constexpr = WIDTH if QUANT_STEP == 1 else 1
    RAGGED: tl.constexpr = WIDTH % MAIN != 0
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        x_row = x + at * (2 * WIDTH)
        y_row = y + at * WIDTH
        token_scale = None
        if activation_scale is not None:
            token_scale = tl.load(activation_scale + at)
        group = 0
        inside = True
        if GROUPS > 0:
            group = group_of(ends, row, GROUPS, GROUP_BLOCK)
            inside = group < GROUPS
            # Rows of no group are zeroed at the end; until then they read the last group's values.
            group = tl.minimum(group, GROUPS - 1)
        weights = weight_scale
        if weight_scale is not None:
            weights += group * (2 * WIDTH)
        shifts = bias
        if bias is not None:
            shifts += group * (2 * WIDTH)
        factors = quant_scale
        if quant_scale is not None:
            factors += group * QUANT_ROW
        offsets = quant_offset
        if quant_offset is not None:
            offsets += group * QUANT_ROW

        if LOOPED:
            row_scale = 0.0
            if IS_DYNAMIC:
                seen = tl.zeros([MAIN], tl.int32)
                for start in range(0, WIDTH, MAIN):
                    columns = start + tl.arange(0, MAIN)
                    s = _activated(
                        x_row, weights, shifts, token_scale, columns, clamp_limit, glu_alpha, glu_bias,
                        WIDTH, RAGGED, STEP, INT_BIAS, FLOAT_BIAS, ACT, LIN, CLIPPED,
                    )  # fmt: skip
                    seen = tl.maximum(seen, magnitude(_smoothed(s, factors, columns, WIDTH, RAGGED)))
                row_scale = tl.div_rn(as_float(tl.max(seen, axis=0)), INT8_MAX)
            for start in range(0, WIDTH, MAIN):
                columns = start + tl.arange(0, MAIN)
                s = _activated(
                    x_row, weights, shifts, token_scale, columns, clamp_limit, glu_alpha, glu_bias,
                    WIDTH, RAGGED, STEP, INT_BIAS, FLOAT_BIAS, ACT, LIN, CLIPPED,
                )  # fmt: skip
                if IS_DYNAMIC:
                    q = quantized(_smoothed(s, factors, columns, WIDTH, RAGGED), row_scale, ROUND)
                else:
                    if quant_scale is not None:
                        divisor = load(factors, columns * QUANT_STEP, WIDTH, RAGGED).to(tl.float32)
                        s = tl.div_rn(s, divisor)
                    if quant_offset is not None:
                        s += load(offsets, columns * QUANT_STEP, WIDTH, RAGGED).to(tl.float32)
                    q = rounded(s, ROUND)
                store(y_row, columns, tl.where(inside, q, 0), WIDTH, RAGGED)
        else:
            columns = tl.arange(0, MAIN)
            s = _activated(
                x_row, weights, shifts, token_scale, columns, clamp_limit, glu_alpha, glu_bias,
                WIDTH, False, STEP, INT_BIAS, FLOAT_BIAS, ACT, LIN, CLIPPED,
            )  # fmt: skip
            s = _smoothed(s, factors, columns, WIDTH, False)
            amax = peak(s)
            if TAIL > 0:
                behind = MAIN + tl.arange(0, TAIL)
                rest = _activated(
                    x_row, weights, shifts, token_scale, behind, clamp_limit, glu_alpha, glu_bias,
                    WIDTH, MAIN + TAIL > WIDTH, STEP, INT_BIAS, FLOAT_BIAS, ACT, LIN, CLIPPED,
                )  # fmt: skip
                rest = _smoothed(rest, factors, behind, WIDTH, MAIN + TAIL > WIDTH)
                amax = tl.maximum(amax, peak(rest))
            row_scale = tl.div_rn(as_float(amax), INT8_MAX)
            store(y_row, columns, tl.where(inside, quantized(s, row_scale, ROUND), 0), WIDTH, False)
            if TAIL > 0:
                q = tl.where(inside, quantized(rest, row_scale, ROUND), 0)
                store(y_row, behind, q, WIDTH, MAIN + TAIL > WIDTH)
        tl.store(scale + at, tl.where(inside, row_scale, 0.0))


_PER_ROW = ("x", "activation_scale", "y", "scale")
DYNAMIC_KERNEL = RowKernel(_kernel, _PER_ROW, held_or_looped)
STATIC_KERNEL = RowKernel(_kernel, _PER_ROW, looped)


def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    *tokens, channels = x.shape
    along_rows = activate_dim is None or activate_dim in (-1, len(tokens))
    if not along_rows or torch_dtype(dst_type, torch.int8) != torch.int8:
        return NotImplemented
    width = channels // 2
    y = x.new_empty((*tokens, width), dtype=torch.int8)
    scale = x.new_empty(tokens, dtype=torch.float32)
    ends, groups, group_block = group_ends(group_index)
    # In static mode one number for each group is meant, even where there are as many groups as columns.
    scalars = False
    if quant_scale is not None and quant_mode != DYNAMIC:
        scalars = quant_scale.shape[-1] == 1 or quant_scale.shape == (max(groups, 1),)
    if swiglu_mode == INTERLEAVED_CLIPPED:
        step, act, lin = 2, 0, 1
    else:
        step, act, lin = 1, *((0, width) if activate_left else (width, 0))
    kernel = DYNAMIC_KERNEL if quant_mode == DYNAMIC else STATIC_KERNEL
    kernel(
        scale.numel(),
        {
            "x": row_major(x),
            "weight_scale": contiguous(weight_scale),
            "activation_scale": None
            if activation_scale is None
            else activation_scale.reshape(-1).contiguous(),
            "bias": contiguous(bias),
            "quant_scale": contiguous(quant_scale),
            "quant_offset": contiguous(quant_offset),
            "ends": ends,
            "y": y.view(-1, width),
            "scale": scale.view(-1),
            "clamp_limit": float(clamp_limit),
            "glu_alpha": float(glu_alpha),
            "glu_bias": float(glu_bias),
        },
        {
            "WIDTH": width,
            "GROUPS": groups,
            "GROUP_BLOCK": group_block,
            "STEP": step,
            "INT_BIAS": bias is not None and bias.dtype == torch.int32,
            "FLOAT_BIAS": bias is not None and bias.dtype != torch.int32,
            "ACT": act,
            "LIN": lin,
            "CLIPPED": swiglu_mode != HALVES,
            "IS_DYNAMIC": quant_mode == DYNAMIC,
            "QUANT_STEP": 0 if scalars else 1,
            "ROUND": round_mode or RINT,
        },
        x.device,
    )
    return y, scale
