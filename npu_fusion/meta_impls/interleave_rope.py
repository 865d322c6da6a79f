"""npu_interleave_rope: rotary position embedding of adjacent pairs, stored as halves.

::

    q = the even elements of x's last dimension, then the odd ones         (de-interleave)
    a, b = halves of q
    y = q * cos + cat(-b, a) * sin                                         fp32, one rounding to x's dtype

Traps:

* The output stays de-interleaved: evens first. This is the rotation inside mla_prolog and
  kv_rmsnorm_rope_cache, and it is NOT npu_rotary_mul(rotary_mode="interleave"), which leaves pairs adjacent.
* ``cos`` and ``sin`` multiply the de-interleaved vector: for pair frequencies f they are [f, f], not each f
  twice in a row.

Devices take a last dimension of 64 only; here any even one is accepted.

Formula: op-plugin documentation and public kernel sources of torch_npu 2.13.0.
"""

from __future__ import annotations

from torch import Tensor

from npu_fusion.meta_impls._checks import (
    FLOATS,
    check_broadcastable,
    check_dtype,
    check_rank,
    check_shape,
    check_size,
)
from npu_fusion.meta_impls._registry import operator


@operator("npu_interleave_rope(Tensor x, Tensor cos, Tensor sin) -> Tensor")
def npu_interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [B, N, S, D] with D even; ``cos``, ``sin`` [B or 1, 1, S or 1, D] of one shape; all of one dtype:
    float16, bfloat16 or float32.

    Returns a tensor of the shape and dtype of ``x``.
    Raises ``ValueError`` for any other dtype, rank or shape.
    """
    op = "npu_interleave_rope"
    check_dtype(op, "x", x, *FLOATS)
    check_rank(op, "x", x, 4, 4)
    batch, _, sequence, width = x.shape
    check_size(width % 2 == 0, op, f"x has shape {list(x.shape)}; accepted: an even last dimension")
    check_dtype(op, "cos", cos, x.dtype)
    check_dtype(op, "sin", sin, x.dtype)
    check_broadcastable(op, "cos", cos, [batch, 1, sequence, width], dims=(0, 2))
    check_shape(op, "sin", sin, cos.shape)
    return x.new_empty(x.shape)
