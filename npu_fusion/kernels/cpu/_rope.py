"""The arguments that the rotary kernels begin with: ``Rope`` of src/rope.h.

Queries and keys of models are transposed views: rows are taken where they lie, if only their own elements are
next to each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.cpu._tensors import TYPES, contiguous

FIELDS = "19q"
"""Of :func:`arguments`, as ``Library.function`` takes them."""


def rows(x: Tensor) -> Tensor:
    """``x`` [.., .., .., D] with elements of a row next to each other."""
    return x if x.stride(-1) == 1 else contiguous(x)


def arguments(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor) -> tuple[int, ...]:
    """For tensors from :func:`rows`, and a contiguous ``y``, which is written."""
    return (
        TYPES[x.dtype],
        x.data_ptr(),
        *x.stride()[:3],
        cos.data_ptr(),
        *_broadcast(cos),
        sin.data_ptr(),
        *_broadcast(sin),
        y.data_ptr(),
        *x.shape,
        torch.get_num_threads(),
    )


def _broadcast(x: Tensor) -> tuple[int, int, int]:
    """The strides of the first three dimensions, 0 for those that one row serves."""
    (a, b, c, _), (stride_a, stride_b, stride_c, _) = x.shape, x.stride()
    return 0 if a == 1 else stride_a, 0 if b == 1 else stride_b, 0 if c == 1 else stride_c
