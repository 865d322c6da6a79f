"""npu_add_rms_norm_quant: residual addition, RMSNorm and static int8 quantization, once or twice.

::

    s  = x1 + x2                                                                  fp32
    n  = s / sqrt(mean(s^2 over the last gamma.dim() dimensions) + epsilon) * gamma (+ beta)
    y1 = int8(rint(n / scales1 + zero_points1))        div_mode True
    y1 = int8(rint(n * scales1 + zero_points1))        div_mode False
    y2 = the same with scales2 and zero_points2
    x  = round(s)                                                                 x1's dtype

Everything before the rounding to an integer is fp32; ``rint`` rounds half to even, after the zero point is
added; the result saturates to [-128, 127].

Traps:

* The sixth positional argument is ``beta``; in torch_npu 7.1 there was no beta and the sixth was ``scales2``.
  Pass everything after ``gamma`` by keyword.
* ``zero_points1`` may be None but has no default: it must be passed.
* ``y2`` is always allocated. Without ``scales2`` the device leaves it uninitialized; the reference returns
  zeros, and no rewrite may use it. The eager operator of some torch_npu versions refuses ``scales2``.
* ``axis`` must be -1: scales and zero points run along the normalized dimensions, like gamma.
* The A2 and A3 kernels round to fp16, or with beta to bf16, on the way (see add_rms_norm.py): y may differ
  from theirs by 1.

Formula: op-plugin documentation and public kernel sources of torch_npu 2.13.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import FLOATS, check, check_choice, check_dtype, check_rank, check_shape
from npu_fusion.meta_impls._norm import check_addends, check_gamma
from npu_fusion.meta_impls._registry import operator

_INT8 = 1  # the ScalarType value of torch.int8: the dispatcher turns a torch.dtype into its value


@operator(
    "npu_add_rms_norm_quant(Tensor x1, Tensor x2, Tensor gamma, Tensor scales1, Tensor? zero_points1, "
    "Tensor? beta=None, Tensor? scales2=None, Tensor? zero_points2=None, *, int axis=-1, "
    "float epsilon=1e-06, bool div_mode=True, int? dst_type=None) -> (Tensor, Tensor, Tensor)"
)
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
    """``x1``, ``x2`` [..., *gamma.shape] of one shape, 1 to 8 dimensions; they, ``gamma`` and ``beta`` of one
    dtype: float16, bfloat16 or float32. ``beta``, ``scales1``, ``scales2``, ``zero_points1`` and
    ``zero_points2`` have gamma's shape; scales are float16, bfloat16 or float32 and of one dtype, zero points
    int32 or one of these, of one dtype too.

    Returns ``y1``, ``y2`` (int8, shape of ``x1``) and the sum ``x`` (shape and dtype of ``x1``).
    Raises ``ValueError`` for any other dtype, rank or shape, for a normalized dimension of size 0, for
    ``axis`` other than -1, ``dst_type`` other than int8, and for ``zero_points2`` without ``scales2``.
    """
    op = "npu_add_rms_norm_quant"
    check_dtype(op, "x1", x1, *FLOATS)
    check_rank(op, "x1", x1, 1, 8)
    check_addends(op, x1, x2)
    check_dtype(op, "gamma", gamma, x1.dtype)
    check_gamma(op, "x1", x1, gamma)
    check_dtype(op, "beta", beta, x1.dtype)
    check_dtype(op, "scales1", scales1, *FLOATS)
    check_dtype(op, "scales2", scales2, scales1.dtype)
    check_dtype(op, "zero_points1", zero_points1, torch.int32, *FLOATS)
    check_dtype(op, "zero_points2", zero_points2, torch.int32, *FLOATS)
    if zero_points1 is not None:
        check_dtype(op, "zero_points2", zero_points2, zero_points1.dtype)
    along_gamma = {
        "beta": beta,
        "scales1": scales1,
        "scales2": scales2,
        "zero_points1": zero_points1,
        "zero_points2": zero_points2,
    }
    for argument, tensor in along_gamma.items():
        check_shape(op, argument, tensor, gamma.shape)
    check(
        zero_points2 is None or scales2 is not None, op, "zero_points2", "given", "None, as scales2 is None"
    )
    check_choice(op, "axis", axis, (-1,))
    check_choice(op, "dst_type", dst_type, (None, _INT8))
    y1, y2 = (x1.new_empty(x1.shape, dtype=torch.int8) for _ in range(2))
    return y1, y2, x1.new_empty(x1.shape)
