"""npu_add_rms_norm_dynamic_quant on the CPU; formula and traps in the file of this name in meta_impls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fusion.kernels.reference._norm import add_rms_normalize
from npu_fusion.kernels.reference._quant import DTYPE_MAX, symmetric_rows
from npu_fusion.meta_impls._dtypes import torch_dtype
from npu_fusion.meta_impls._registry import cpu_kernel
from npu_fusion.meta_impls.add_rms_norm_dynamic_quant import present


@cpu_kernel("npu_add_rms_norm_dynamic_quant")
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
    n, _, x = add_rms_normalize(x1, x2, gamma, epsilon, beta)
    dtype = torch_dtype(y_dtype, torch.int8)

    def quantize(exists: bool, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
        if not exists:
            return n.new_empty([0], dtype=torch.int32 if dtype == torch.quint4x2 else dtype), n.new_empty([0])
        rows = n if smooth is None else n * smooth.to(torch.float32)
        return symmetric_rows(rows, DTYPE_MAX[dtype], dtype)

    exist1, exist2 = present(smooth_scale1, smooth_scale2, output_mask)
    y1, scale1 = quantize(exist1, smooth_scale1)
    y2, scale2 = quantize(exist2, smooth_scale2)
    return y1, y2, x, scale1, scale2
