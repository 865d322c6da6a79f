"""npu_add_rms_norm: residual addition and RMSNorm in one operator; with _cast, also y in float32.

::

    s    = x1 + x2                                                                 fp32
    rstd = 1 / sqrt(mean(s^2 over the last gamma.dim() dimensions) + epsilon)      fp32
    y    = round(s * rstd * gamma)                                                 one rounding to x1's dtype
    x    = round(s)

Trap: the outputs come in the order (y, rstd, x); the sum is the third. npu_add_rms_norm_cast has y in
float32 in front, rounded to x1's dtype before: it stands for a cast of y, not for more precision.

Rounding points. The devices do not agree among themselves: the A2 and A3 kernels round the sum to fp16 before
they normalize it (fp16 only), and round ``s * rstd`` before they multiply by gamma (bf16 and fp16); the 950
rounds once. The reference keeps everything in fp32 and rounds once at the end, as the 950 does: of all
variants this one is closest to the exact value, and a device differs from it by about a unit in the last
place for each rounding it adds. So compare y with a device, or with ``npu_rms_norm(x1 + x2)``, by tolerance
and not bit by bit.

Formula: op-plugin documentation and public kernel sources of torch_npu 2.13.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import FLOATS, check_dtype, check_rank
from npu_fusion.meta_impls._norm import check_addends, check_gamma, new_rstd
from npu_fusion.meta_impls._registry import operator


@operator(
    "npu_add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor, Tensor)"
)
def npu_add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06
) -> tuple[Tensor, Tensor, Tensor]:
    """``x1``, ``x2`` [..., *gamma.shape] of one shape, 1 to 8 dimensions; all three of one dtype: float16,
    bfloat16 or float32.

    Returns ``y`` (shape and dtype of ``x1``), ``rstd`` (float32, normalized dimensions 1) and the sum ``x``
    (shape and dtype of ``x1``).
    Raises ``ValueError`` for any other dtype, rank or shape, and for a normalized dimension of size 0.
    """
    return _checked("npu_add_rms_norm", x1, x2, gamma)


@operator(
    "npu_add_rms_norm_cast(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
def npu_add_rms_norm_cast(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As npu_add_rms_norm, with ``y`` in float32 first: (y as float32, y, rstd, x)."""
    y, rstd, x = _checked("npu_add_rms_norm_cast", x1, x2, gamma)
    return y.new_empty(y.shape, dtype=torch.float32), y, rstd, x


def _checked(op: str, x1: Tensor, x2: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, rstd and the sum, without data."""
    check_dtype(op, "x1", x1, *FLOATS)
    check_rank(op, "x1", x1, 1, 8)
    check_addends(op, x1, x2)
    check_dtype(op, "gamma", gamma, x1.dtype)
    check_gamma(op, "x1", x1, gamma)
    return x1.new_empty(x1.shape), new_rstd(x1, gamma), x1.new_empty(x1.shape)
