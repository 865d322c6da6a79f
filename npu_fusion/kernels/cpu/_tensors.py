"""Tensors on their way into C: contiguous, in a dtype that the kernel reads, as addresses."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = {
    torch.int8: 1,
    torch.int32: 3,
    torch.float16: 5,
    torch.float32: 6,
    torch.bfloat16: 15,
}
"""``Type`` in src/isa.h."""


def contiguous(x: Tensor) -> Tensor:
    # The question costs a tenth of the answer.
    return x if x.is_contiguous() else x.contiguous()


def optional_contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else contiguous(x)


def floats(x: Tensor) -> Tensor:
    """``x`` contiguous in float32: for the small tensors (scales, weights of norms) only."""
    return contiguous(x if x.dtype is torch.float32 else x.float())


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
