"""The numbers that operands of 4-bit and 8-bit floats stand for, in fp32 and exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion import formats
from npu_fusion.formats import mx


def float4_rows(packed: Tensor, element: str) -> Tensor:
    """fp32 [r, n] of ``packed`` [r, ...]: contiguous rows of nibbles, lowest first, in whatever dtype."""
    return formats.decode(formats.unpack_nibbles(packed.contiguous().view(torch.uint8)), element)


def powers_of_two(scale: Tensor) -> Tensor:
    """The fp32 values of e8m0 scales, given as such or as uint8; NaN for their NaN."""
    biased = scale.view(torch.uint8).to(torch.int32)
    # e8m0 is the exponent of fp32, whose 2^-127 is a denormal; 255 would be infinity.
    bits = (biased << 23).masked_fill(biased == 0, 1 << 22)
    return bits.view(torch.float32).masked_fill(biased == 255, torch.nan)


def spread(scale: Tensor, size: int, dim: int) -> Tensor:
    """``scale`` with one entry for each block of 32 along ``dim``, repeated for each of ``size`` numbers."""
    return scale.repeat_interleave(mx.BLOCK, dim=dim).narrow(dim, 0, size)
