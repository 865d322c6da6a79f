"""npu_rotary_mul: rotary position embedding with full-width cosine and sine.

::

    y = input * r1 + rotated * r2                    r1 cosine, r2 sine; fp32, one rounding to input's dtype

    rotary_mode "half":        x1, x2 = halves of the last dimension;   rotated = cat(-x2, x1)
    rotary_mode "interleave":  a, b = even and odd elements;            rotated = (-b[0], a[0], -b[1], ...)
    rotate given:              rotated = input @ rotate, in either mode

Traps:

* "interleave" leaves the pairs where they are. npu_interleave_rope (and mla_prolog) also de-interleave: their
  output is another permutation, and their cosine and sine are laid out for it.
* With ``rotate`` the matrix alone decides what is rotated; the mode is only a name. The matrix that the
  documentation prints for "interleave" has +1 where the formula needs -1.
* On A2 and A3 torchair lowers a call without ``rotate`` to a GE operator that knows no mode: "interleave"
  becomes "half" there. A rewrite must not emit it for that host.
* Whether the A2 kernel works in fp16 or fp32 for fp16 inputs is not documented; the reference works in fp32.

Formula: op-plugin documentation and public kernel sources of torch_npu 2.13.0.
"""

from __future__ import annotations

from torch import Tensor

from npu_fusion.meta_impls._checks import (
    FLOATS,
    check_broadcastable,
    check_choice,
    check_dtype,
    check_rank,
    check_shape,
    check_size,
)
from npu_fusion.meta_impls._registry import operator


@operator(
    "npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode='half', Tensor? rotate=None) "
    "-> Tensor"
)
def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """``input`` [.., .., .., D] in any of the layouts BNSD, BSND, SBND, with D even; ``r1``, ``r2`` of one
    shape: that of ``input``, or with any of the first three dimensions 1. The three have one dtype: float16,
    bfloat16 or float32. ``rotate`` [D, D], any of these dtypes. ``rotary_mode`` "half" or "interleave".

    Returns a tensor of the shape and dtype of ``input``.
    Raises ``ValueError`` for any other dtype, rank, shape or mode.
    """
    op = "npu_rotary_mul"
    check_dtype(op, "input", input, *FLOATS)
    check_rank(op, "input", input, 4, 4)
    width = input.shape[-1]
    check_size(width % 2 == 0, op, f"input has shape {list(input.shape)}; accepted: an even last dimension")
    check_dtype(op, "r1", r1, input.dtype)
    check_dtype(op, "r2", r2, input.dtype)
    check_broadcastable(op, "r1", r1, input.shape, dims=(0, 1, 2))
    check_shape(op, "r2", r2, r1.shape)
    check_choice(op, "rotary_mode", rotary_mode, ("half", "interleave"))
    check_dtype(op, "rotate", rotate, *FLOATS)
    check_shape(op, "rotate", rotate, [width, width])
    return input.new_empty(input.shape)
