"""The fp32 arithmetic that every RMSNorm operator shares; the callers decide where it is rounded.

Formula: op-plugin documentation and public kernel sources of torch_npu 2.13.0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_normalize(x_fp32: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``(x * rstd) * gamma`` and ``rstd``, both fp32, for a contiguous fp32 ``x`` [..., *gamma.shape].

    ``rstd`` has size 1 in each of the normalized dimensions.
    """
    normalized = tuple(range(-gamma.dim(), 0))
    rstd = torch.rsqrt(x_fp32.square().mean(normalized, keepdim=True) + epsilon)
    return x_fp32 * rstd * gamma.to(torch.float32), rstd


def add_rms_normalize(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float, beta: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalized sum of ``x1`` and ``x2`` (fp32), its ``rstd`` (fp32), and the sum in their dtype.

    What is normalized is the fp32 sum, before its rounding (see meta_impls/add_rms_norm.py for the choice).
    """
    total = (x1.to(torch.float32) + x2.to(torch.float32)).contiguous()
    n, rstd = rms_normalize(total, gamma, epsilon)
    if beta is not None:
        n = n + beta.to(torch.float32)
    return n, rstd, total.to(x1.dtype)
