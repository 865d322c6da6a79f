"""Scales with which float4_e2m1 numbers are float8_e4m3fn numbers.

::

    value = code · scale(block) · channel_scale(row)      code · scale is ROUNDED to float8_e4m3fn by devices

Beside float8_e4m3fn inputs a float4_e2m1 weight is multiplied as float8_e4m3fn. Its numbers have the
mantissas 1 and 1.5, float8's have four bits, so the products are exact with the scales 1, 1.25 and 1.5 times
a power of two, from 2^-6 (below are the denormals) to 64 (6 times 80 is beyond 448). A row is therefore
scaled to a largest magnitude of 6 · 64 = 384.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 384.0
"""What ``channel_scale`` makes of the largest magnitude of a row."""

_MANTISSAS = (1.0, 1.25, 1.5, 2.0)
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-6, 64.0


def nearest_inner_scale(scale: Tensor) -> Tensor:
    """The exact scales (see the module's docstring) that are nearest to ``scale``, fp32, positive.

    Nearest, not the next larger: the largest magnitudes saturate a little, which costs less than a coarser
    step does for all others.
    """
    mantissas = torch.tensor(_MANTISSAS, device=scale.device)
    fraction, exponent = torch.frexp(scale.float())
    chosen = mantissas[torch.bucketize(2 * fraction, (mantissas[1:] + mantissas[:-1]) / 2)]
    return torch.ldexp(chosen, exponent - 1).clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
