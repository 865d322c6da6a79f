"""npu_add_rms_norm_quant on the CPU; formula and traps in the file of this name in meta_impls."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.reference._norm import add_rms_normalize
from npu_fusion.kernels.reference._quant import saturate
from npu_fusion.meta_impls._registry import cpu_kernel


@cpu_kernel("npu_add_rms_norm_quant")
def npu_add_rms_norm_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales1: Tensor,
    zero_points1: Tensor | None,
    beta: Tensor | None = None,
    scales2: Tensor | None = None,
    zero_points2: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-06,
    div_mode: bool = True,
    dst_type: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    n, _, x = add_rms_normalize(x1, x2, gamma, epsilon, beta)

    def quantize(scales: Tensor, zero_points: Tensor | None) -> Tensor:
        factor = scales.to(torch.float32)
        y = n / factor if div_mode else n * factor
        if zero_points is not None:
            y = y + zero_points.to(torch.float32)
        return saturate(y, torch.int8)

    y1 = quantize(scales1, zero_points1)
    # Without scales2 the device leaves y2 uninitialized; zeros keep the CPU deterministic.
    y2 = torch.zeros_like(y1) if scales2 is None else quantize(scales2, zero_points2)
    return y1, y2, x
