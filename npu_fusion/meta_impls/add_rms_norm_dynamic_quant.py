"""npu_add_rms_norm_dynamic_quant: residual addition, RMSNorm and per-token quantization, once or twice.

::

    s      = x1 + x2                                                              fp32
    n      = s / sqrt(mean(s^2 over the last dimension) + epsilon) * gamma (+ beta)
    r1     = n * smooth_scale1                 (n without smooth_scale1)
    scale1 = amax|r1| / DMAX                   over the last dimension; DMAX 127 for int8, 7 for int4
    y1     = rint(r1 / scale1)                 half to even
    y2, scale2: the same with smooth_scale2
    x      = round(s)                                                             x1's dtype

Everything before ``y`` is fp32: n is not rounded to x1's dtype before it is quantized.

Traps:

* Without ``output_mask`` the second pair (y2, scale2) exists only if both smooth scales are given; with it,
  the mask alone decides. An absent output has shape (0,).
* A zero row has scale 0 and y 0. (One published golden gives scale 1 there; the kernel gives 0.)
* ``y_dtype`` quint4x2 packs eight int4 into one int32, lowest nibble first: last dimension / 8.
* The kernels multiply by a rounded DMAX / amax: at halves y may differ by 1.
* The outputs come in the order (y1, y2, x, scale1, scale2); the sum is the third.

Formula: op-plugin documentation and public kernel sources of torch_npu 2.13.0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import (
    check,
    check_choice,
    check_dtype,
    check_rank,
    check_shape,
    check_size,
)
from npu_fusion.meta_impls._norm import check_addends, check_gamma
from npu_fusion.meta_impls._registry import operator

# ScalarType values: the dispatcher turns a torch.dtype into its value.
_INT8 = 1
_QUINT4X2 = 16

_INT4_PER_INT32 = 8


def present(
    smooth_scale1: Tensor | None, smooth_scale2: Tensor | None, output_mask: Sequence[bool] | None
) -> tuple[bool, bool]:
    """Which of the two quantized outputs (each with its scale) exist."""
    if output_mask is None:
        return True, smooth_scale1 is not None and smooth_scale2 is not None
    return output_mask[0], output_mask[1]


@operator(
    "npu_add_rms_norm_dynamic_quant(Tensor x1, Tensor x2, Tensor gamma, *, Tensor? smooth_scale1=None, "
    "Tensor? smooth_scale2=None, Tensor? beta=None, float epsilon=1e-6, bool[2]? output_mask=None, "
    "int? y_dtype=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
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
    """``x1``, ``x2`` [..., H] of one shape, 2 to 8 dimensions; ``gamma``, ``beta``, ``smooth_scale1``,
    ``smooth_scale2`` [H]; all of one dtype: float16 or bfloat16. ``y_dtype`` int8 (also None) or quint4x2.

    Returns ``y1``, ``y2`` (int8 [..., H], or int32 [..., H / 8] for quint4x2), the sum ``x`` (shape and dtype
    of ``x1``), ``scale1``, ``scale2`` (float32 [...]); those that do not exist have shape (0,).
    Raises ``ValueError`` for any other dtype, rank or shape; for H 0, or with quint4x2 not a multiple of 8;
    for an ``output_mask`` that has not two values, is False twice, or is False where a smooth scale is given;
    without a mask for ``smooth_scale2`` without ``smooth_scale1``.
    """
    op = "npu_add_rms_norm_dynamic_quant"
    check_dtype(op, "x1", x1, torch.float16, torch.bfloat16)
    check_rank(op, "x1", x1, 2, 8)
    check_addends(op, x1, x2)
    check_dtype(op, "gamma", gamma, x1.dtype)
    check_rank(op, "gamma", gamma, 1, 1)
    check_gamma(op, "x1", x1, gamma)
    vectors = {"beta": beta, "smooth_scale1": smooth_scale1, "smooth_scale2": smooth_scale2}
    for argument, tensor in vectors.items():
        check_dtype(op, argument, tensor, x1.dtype)
        check_shape(op, argument, tensor, gamma.shape)
    check_choice(op, "y_dtype", y_dtype, (None, _INT8, _QUINT4X2))
    _check_mask(op, smooth_scale1, smooth_scale2, output_mask)

    *rows, columns = x1.shape
    dtype = torch.int8
    if y_dtype == _QUINT4X2:
        message = f"x1 has shape {list(x1.shape)}; accepted for int4: a last dimension divisible by 8"
        check_size(columns % _INT4_PER_INT32 == 0, op, message)
        dtype, columns = torch.int32, columns // _INT4_PER_INT32
    exist = present(smooth_scale1, smooth_scale2, output_mask)
    y1, y2 = (x1.new_empty([*rows, columns] if e else [0], dtype=dtype) for e in exist)
    scale1, scale2 = (x1.new_empty(rows if e else [0], dtype=torch.float32) for e in exist)
    return y1, y2, x1.new_empty(x1.shape), scale1, scale2


def _check_mask(
    op: str,
    smooth_scale1: Tensor | None,
    smooth_scale2: Tensor | None,
    output_mask: Sequence[bool] | None,
) -> None:
    if output_mask is None:
        accepted = "None, as smooth_scale1 is None and there is no output_mask"
        check(smooth_scale1 is not None or smooth_scale2 is None, op, "smooth_scale2", "given", accepted)
        return
    mask = list(output_mask)
    check(len(mask) == 2 and any(mask), op, "output_mask", mask, "two values, at least one of them True")
    for index, smooth in enumerate((smooth_scale1, smooth_scale2)):
        accepted = f"True at index {index}, as smooth_scale{index + 1} is given"
        check(mask[index] or smooth is None, op, "output_mask", mask, accepted)
