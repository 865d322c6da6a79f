"""npu_grouped_matmul_swiglu_quant on the CPU. Formula, traps: meta_impls/grouped_matmul_swiglu_quant.py."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.reference._quant import INT8_MAX, symmetric_rows
from npu_fusion.kernels.reference._swiglu import swiglu
from npu_fusion.meta_impls._registry import cpu_kernel
from npu_fusion.meta_impls.grouped_matmul_swiglu_quant import OP


@cpu_kernel("npu_grouped_matmul_swiglu_quant")
def npu_grouped_matmul_swiglu_quant(
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor,
    *,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, scale, reserved)``; shapes and dtypes as the fake implementation says.

    Raises ``ValueError`` if ``group_list`` decreases or exceeds the rows of x (counts in place of running
    sums usually do the one or the other).
    """
    tokens, inner = x.shape
    columns = weight_scale.shape[1]
    ends = group_list.tolist()
    if ends != sorted(ends) or (ends and not 0 <= ends[0] <= ends[-1] <= tokens):
        raise ValueError(
            f"{OP}: group_list is {ends}; accepted: ends that do not decrease, from 0 to {tokens}"
        )

    y = x.new_zeros((tokens, columns // 2))
    scale = x_scale.new_zeros(tokens)
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            matrix = _plain(weight[expert], inner, columns)
            # Sums of int8 products are far below 2**53, so float64 (and its fast matmul) holds them exactly.
            product = (x[start:end].double() @ matrix.double()).float()
            d = product * weight_scale[expert].float() * x_scale[start:end, None]
            s = swiglu(d, -1, activate_left=True)
            y[start:end], scale[start:end] = symmetric_rows(s, INT8_MAX, torch.int8)
        start = end
    return y, scale, x_scale.new_zeros(())


def _plain(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] from itself or from its NZ storage [ceil(columns/32), ceil(rows/16), 16, 32]."""
    if matrix.dim() == 2:
        return matrix
    return matrix.permute(1, 2, 0, 3).flatten(2, 3).flatten(0, 1)[:rows, :columns]
