"""mxfp8: float8_e4m3fn elements, 32 neighbours of which share one scale, a power of two (e8m0).

Formula: the OCP Microscaling Formats specification, version 1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.reference._quant import saturate
from npu_fusion.meta_impls._mla_prolog import MX_BLOCK

# floor(log2(448)), of the largest element.
_ELEMENT_EXPONENT = 8
_BIAS = 127
_NOT_A_NUMBER = 255


def dequantize_mx(data: Tensor, scale: Tensor) -> Tensor:
    """fp32 [..., K] of e4m3 ``data`` [..., K] and e8m0 ``scale`` [..., K / 32]; exact."""
    blocks = data.to(torch.float32).unflatten(-1, (-1, MX_BLOCK))
    return (blocks * scale.to(torch.float32).unsqueeze(-1)).flatten(-2)


def quantize_mx(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` fp32 [..., K] as e4m3 [..., K] and e8m0 scales [..., K / 32].

    A scale is ``2^(floor(log2(amax)) - 8)``: elements above 448 of it saturate. A block of zeros has the
    smallest scale, one with an element that is not finite the scale NaN.
    """
    blocks = x.unflatten(-1, (-1, MX_BLOCK))
    amax = blocks.abs().amax(dim=-1)
    # amax = m * 2^e with 1/2 <= m < 1.
    exponent = (torch.frexp(amax).exponent - 1 - _ELEMENT_EXPONENT).clamp(min=-_BIAS)
    exponent = exponent.masked_fill(amax == 0, -_BIAS)
    data = saturate(torch.ldexp(blocks, -exponent.unsqueeze(-1)), torch.float8_e4m3fn)
    biased = (exponent + _BIAS).masked_fill(~amax.isfinite(), _NOT_A_NUMBER)
    return data.flatten(-2), biased.to(torch.uint8).view(torch.float8_e8m0fnu)
