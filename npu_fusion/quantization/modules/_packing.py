"""Several 4-bit codes in one element, and scales in the form in which operators take them."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion import formats
from npu_fusion.formats import mx
from npu_fusion.kernels.reference._quant import pack_int4, unpack_int4


def pack_eight(codes: Tensor) -> Tensor:
    """int32 [..., n] of codes [..., 8n] whose low nibbles count, the first one in the lowest bits."""
    return pack_int4(codes)


def unpack_eight(packed: Tensor, signed: bool) -> Tensor:
    """The inverse: int8 with values from -8 to 7 (``signed``), or uint8 with the bits in the low nibble."""
    codes = unpack_int4(packed)
    return codes if signed else (codes & 0xF).to(torch.uint8)


def pack_two(codes: Tensor) -> Tensor:
    """uint8 [..., n] of codes [..., 2n], the first one in the low nibble."""
    return formats.pack_nibbles(codes)


def unpack_two(packed: Tensor) -> Tensor:
    return formats.unpack_nibbles(packed)


def biased_exponents(scale: Tensor) -> Tensor:
    """uint8 e8m0 of fp32 powers of two."""
    return mx.e8m0(torch.frexp(scale).exponent - 1).view(torch.uint8)


def powers_of_two(biased: Tensor) -> Tensor:
    """The inverse of :func:`biased_exponents`, fp32."""
    exponent = mx.exponent_of(biased)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
