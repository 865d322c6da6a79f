"""float4_e2m1 and float4_e1m2: a sign, and a magnitude of 3 bits.

::

    code & 7         0    1    2    3    4    5    6    7
    float4_e2m1      0   .5    1  1.5    2    3    4    6
    float4_e1m2      0  .25   .5  .75    1 1.25  1.5 1.75

Half-way numbers go to the even code, magnitudes beyond the largest to the largest; -0 keeps its sign, and
NaN, which there is not, becomes a zero of its sign.

Source: OCP Microscaling Formats Specification, version 1.0 (E2M1). E1M2 is Ascend's; its numbers are
multiples of 1/4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.formats._checks import check_codes, check_numbers

E2M1, E1M2 = "float4_e2m1", "float4_e1m2"
MAXIMUM = {E2M1: 6.0, E1M2: 1.75}

_SIGN, _MAGNITUDE = 0x8, 0x7


def encode(x: Tensor, name: str) -> Tensor:
    """The codes, uint8 with the pattern in the low nibble. See :func:`npu_fusion.formats.encode`."""
    check_numbers(f"encode '{name}'", x)
    x = x.to(torch.float32)
    size = torch.nan_to_num(x.abs(), nan=0.0).clamp(max=MAXIMUM[name])
    if name == E1M2:
        code = (size * 4).round()
    else:
        # Steps of 1/2 up to 2, of 1 up to 4, of 2 up to 6. An even number of steps is an even code in all.
        code = torch.where(
            size < 2, (size * 2).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4)
        )
    return code.to(torch.uint8) | (torch.signbit(x).to(torch.uint8) * _SIGN)


def decode(codes: Tensor, name: str) -> Tensor:
    """The numbers in float32; the high nibble is ignored. See :func:`npu_fusion.formats.decode`."""
    check_codes(f"decode '{name}'", codes, torch.uint8)
    step = (codes & _MAGNITUDE).to(torch.float32)
    if name == E1M2:
        size = step / 4
    else:
        size = torch.where(step <= 4, step / 2, torch.where(step <= 6, step - 2, step * 2 - 8))
    return torch.where((codes & _SIGN) != 0, -size, size)
