"""Symmetric integers by the largest magnitude, the arithmetic below fake quantization and int8 weights.

::

    scale = max|x| / n        codes = clamp(round(x / scale), -n, n)        n = 2^(bits-1) - 1

in fp32, half to even, the maximum over each row (the last dimension) or over the whole tensor. With eight
bits and rows that is :func:`npu_fusion.quantization.modules.quantize_rows`. A scale of 0 (all zero, or so
small that it underflows) divides by 1 instead, so the codes are 0. There is no lower bound of the scale.

Source: equation 1 of SmoothQuant (arXiv:2211.10438). Its code bounds the maximum by 1e-5 and does not clamp:
a code beyond the range can come out where the scale is a denormal number.
"""

from __future__ import annotations

import torch
from torch import Tensor


def absmax_codes(x: Tensor, by_row: bool, n_bits: int = 8) -> tuple[Tensor, Tensor]:
    """Integers of ``x`` [..., K] as fp32, and their scale, fp32 [..., 1] or []. ``x`` is left as it is."""
    x = x.detach().float()
    largest = 2 ** (n_bits - 1) - 1
    if x.numel() == 0:
        scale = x.new_zeros((*x.shape[:-1], 1) if by_row else ())
    else:
        scale = (x.abs().amax(dim=-1, keepdim=True) if by_row else x.abs().amax()) / largest
    codes = (x / torch.where(scale == 0, 1.0, scale)).round().clamp(-largest, largest)
    return codes, scale
