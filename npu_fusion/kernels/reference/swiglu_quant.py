"""npu_swiglu_quant on the CPU. Formula and traps: npu_fusion/meta_impls/swiglu_quant.py."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.reference._quant import DTYPE_MAX, group_counts, group_rows, saturate
from npu_fusion.kernels.reference._swiglu import swiglu
from npu_fusion.meta_impls._registry import cpu_kernel
from npu_fusion.meta_impls.swiglu_quant import CUMSUM, DYNAMIC


@cpu_kernel("npu_swiglu_quant")
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
    """``(y, scale)``; shapes and dtypes as the fake implementation says."""
    int4 = dst_type == torch.quint4x2
    s = swiglu(x.float().flatten(0, -2), -1, activate_left)
    group = _groups(group_index, group_list_type, s.shape[0])
    if smooth_scales is not None:
        s = s * _for_rows(smooth_scales, group, beyond=1.0)
    if quant_mode == DYNAMIC:
        scale = DTYPE_MAX[dst_type or torch.int8] / s.abs().amax(dim=-1)
        s = s * scale.unsqueeze(-1)  # a zero row is 0 * inf = NaN, which saturate() turns into 0
    else:
        scale = s.new_zeros(s.shape[0])
        if offsets is not None:
            s = s + _for_rows(offsets, group, beyond=0.0)
    y = saturate(s, torch.int8).contiguous()
    if int4:
        y = _two_per_byte(y.clamp(-8, 7))
    return y.unflatten(0, x.shape[:-1]), scale.unflatten(0, x.shape[:-1])


def _groups(group_index: Tensor | None, group_list_type: int, total_rows: int) -> Tensor:
    """The group of each row, -1 beyond the last group; one group of all rows without ``group_index``."""
    if group_index is None:
        return torch.zeros(total_rows, dtype=torch.int64)
    counts = group_counts(group_index) if group_list_type == CUMSUM else group_index
    return group_rows(counts, total_rows)


def _for_rows(per_group: Tensor, group: Tensor, beyond: float) -> Tensor:
    """Row g of ``per_group`` ([G, H] or [G]) for each row of group g; ``beyond`` for rows of no group."""
    table = per_group.reshape(per_group.shape[0], -1)
    # Group -1 selects the appended last row.
    return torch.cat([table, table.new_full((1, table.shape[1]), beyond)])[group]


def _two_per_byte(y: Tensor) -> Tensor:
    """int8 [..., 2n] with values in [-8, 7] to int8 [..., n], the lower index in the lower nibble."""
    return (y[..., 0::2] & 0xF) | (y[..., 1::2] << 4)
