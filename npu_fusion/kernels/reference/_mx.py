"""Blocks of 32 neighbours that share one scale, a power of two (e8m0): mxfp8 and mxfp4.

Formula: the OCP Microscaling Formats specification, version 1.0. What a block with an element that is not
finite gives is from the reference of Ascend's DynamicMxQuant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion import formats
from npu_fusion.formats import mx


def dequantize_mx(data: Tensor, scale: Tensor) -> Tensor:
    """fp32 [..., K] of e4m3 ``data`` [..., K] and e8m0 ``scale`` [..., K / 32]; exact."""
    blocks = data.to(torch.float32).unflatten(-1, (-1, mx.BLOCK))
    return (blocks * scale.to(torch.float32).unsqueeze(-1)).flatten(-2)


def quantize_mx(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` fp32 [..., K] as e4m3 [..., K] and e8m0 scales [..., K / 32].

    A scale is ``2^(floor(log2(amax)) - 8)``: elements above 448 of it saturate. A block of zeros has the
    smallest scale, one with an element that is not finite zeros and the scale NaN.
    """
    data, exponent = quantize_blocks(x.unflatten(-1, (-1, mx.BLOCK)), "float8_e4m3fn", "floor")
    return data.flatten(-2), mx.e8m0(exponent)


def quantize_blocks(blocks: Tensor, element: str, mode: str) -> tuple[Tensor, Tensor]:
    """Codes (``formats.encode``) of ``blocks`` fp32 [..., size], and the exponents [...] of their scales."""
    exponent = mx.shared_exponent(blocks.abs().amax(dim=-1), element, mode)
    scaled = torch.ldexp(blocks, -exponent.unsqueeze(-1))
    scaled = scaled.masked_fill((exponent == mx.NAN_EXPONENT).unsqueeze(-1), 0.0)
    return formats.encode(scaled, element), exponent
