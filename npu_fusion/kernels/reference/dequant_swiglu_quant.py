"""npu_dequant_swiglu_quant on the CPU. Formula and traps: npu_fusion/meta_impls/dequant_swiglu_quant.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from npu_fusion.kernels.reference._quant import INT8_MAX, divide_rows, group_rows, saturate
from npu_fusion.kernels.reference._swiglu import gate, halves, swiglu
from npu_fusion.meta_impls._dtypes import torch_dtype
from npu_fusion.meta_impls._registry import cpu_kernel
from npu_fusion.meta_impls.dequant_swiglu_quant import (
    CEIL,
    DYNAMIC,
    FLOOR,
    HALF_AWAY,
    HALVES,
    INTERLEAVED_CLIPPED,
    OP,
    RINT,
    TRUNC,
)


def _half_away(x: Tensor) -> Tensor:
    # Not trunc(x + 0.5): that sum rounds 0.49999997 up to 1.
    whole = x.trunc()
    return whole + torch.sign(x) * ((x - whole).abs() >= 0.5)


_ROUNDING: dict[int, Callable[[Tensor], Tensor]] = {
    RINT: torch.round,
    HALF_AWAY: _half_away,
    FLOOR: torch.floor,
    CEIL: torch.ceil,
    TRUNC: torch.trunc,
}


@cpu_kernel("npu_dequant_swiglu_quant")
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
    """``(y, scale)``; shapes and dtypes as the fake implementation says.

    Raises ``ValueError`` if the counts in ``group_index`` sum to more than the rows of x: the device would
    read beyond its end.
    """
    dim = -1 if activate_dim is None else activate_dim
    dtype = torch_dtype(dst_type, torch.int8)
    rows = x.flatten(0, -2)
    group = _groups(group_index, rows.shape[0])

    d = _dequantize(rows, weight_scale, activation_scale, bias, group).reshape(x.shape)
    if swiglu_mode == HALVES:
        s = swiglu(d, dim, activate_left)
    else:
        act, lin = _pairs(d, dim) if swiglu_mode == INTERLEAVED_CLIPPED else halves(d, dim, activate_left)
        lin = lin.clamp(-clamp_limit, clamp_limit) + glu_bias
        s = gate(act.clamp(max=clamp_limit), lin, glu_alpha)
    shape = s.shape
    s = s.flatten(0, -2)

    if quant_mode == DYNAMIC:
        if quant_scale is not None:
            s = s * _for_rows(quant_scale, group)
        dtype_max = torch.finfo(dtype).max if dtype.is_floating_point else INT8_MAX
        s, scale = divide_rows(s, dtype_max)
    else:
        scale = s.new_zeros(s.shape[0])
        if quant_scale is not None:
            s = s / _for_static_rows(quant_scale, group, group_index)
        if quant_offset is not None:
            s = s + _for_static_rows(quant_offset, group, group_index)
    if not dtype.is_floating_point:
        s = _ROUNDING[round_mode or RINT](s)
    y = saturate(s, dtype).contiguous()
    if group is not None:
        beyond = group < 0
        y[beyond] = 0
        scale[beyond] = 0
    return y.reshape(shape), scale.reshape(shape[:-1])


def _groups(group_index: Tensor | None, total_rows: int) -> Tensor | None:
    """The group of each row, -1 beyond the last group; None where there is one group of all rows."""
    if group_index is None:
        return None
    used = int(group_index.clamp(min=0).sum())
    if used > total_rows:
        raise ValueError(
            f"{OP}: the counts in group_index sum to {used}; accepted: at most {total_rows}, the rows of x"
        )
    return group_rows(group_index, total_rows)


def _for_rows(per_group: Tensor, group: Tensor | None) -> Tensor:
    """``per_group`` ([G, n], or [n] for one group) for each row: [T, n], or [1, n] without groups.

    Rows of no group get the last group's values; their results are zeroed at the end.
    """
    table = torch.atleast_2d(per_group)
    if table.dtype.is_floating_point:
        table = table.float()
    return table if group is None else table[group]


def _for_static_rows(per_group: Tensor, group: Tensor | None, group_index: Tensor | None) -> Tensor:
    """As :func:`_for_rows`, but a 1-D tensor with one element per group is a scalar for each."""
    groups = 1 if group_index is None else group_index.shape[0]
    scalars = per_group.dim() == 1 and per_group.shape[0] == groups
    return _for_rows(per_group.unsqueeze(1) if scalars else per_group, group)


def _dequantize(
    rows: Tensor,
    weight_scale: Tensor | None,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    group: Tensor | None,
) -> Tensor:
    """``rows`` [T, C] in fp32, scaled and biased in the kernel's order where they are int32."""
    if weight_scale is None:
        return rows.float()
    bias_rows = None if bias is None else _for_rows(bias, group)
    if bias_rows is not None and not bias_rows.dtype.is_floating_point:
        rows, bias_rows = rows + bias_rows, None
    d = rows.float() * _for_rows(weight_scale, group)
    if activation_scale is not None:
        d = d * activation_scale.reshape(-1, 1)
    return d if bias_rows is None else d + bias_rows


def _pairs(d: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Even and odd positions of ``d`` along ``dim``."""
    pairs = d.unflatten(dim, (-1, 2))
    inner = dim if dim < 0 else dim + 1
    return pairs.select(inner, 0), pairs.select(inner, 1)
