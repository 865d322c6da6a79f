"""float8_e4m3fn and float8_e5m2: torch's dtypes, with an overflow that is the same in all versions.

Trap: what a cast makes of a number beyond the largest depends on the version of torch and on the device (the
largest, infinity or NaN), so the number is decided before the cast. Half-way numbers go to the even
neighbour.

Source: OCP 8-bit Floating Point Specification, revision 1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.formats._checks import check_codes, check_numbers

DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
MAXIMUM = {name: torch.finfo(dtype).max for name, dtype in DTYPES.items()}

# What is beyond the largest, and from where on: half a step above it, where e4m3fn's largest is even (464 is
# rounded down) and e5m2's is odd (61440 is rounded up).
_OVERFLOW = {"float8_e4m3fn": (464.0, torch.nan), "float8_e5m2": (61440.0, torch.inf)}


def encode(x: Tensor, name: str, saturate: bool = True) -> Tensor:
    """``x`` in the dtype of this name; a new tensor. See :func:`npu_fusion.formats.encode`."""
    check_numbers(f"encode '{name}'", x)
    largest, dtype = MAXIMUM[name], DTYPES[name]
    y = x.clamp(-largest, largest).to(dtype)
    if saturate:
        return y
    limit, instead = _OVERFLOW[name]
    size = x.abs()
    over = size > limit if name == "float8_e4m3fn" else size >= limit
    # Bit patterns: the sign (kept for infinity) and the code; torch.where has no kernel for float8.
    code = torch.tensor(instead, device=x.device).to(dtype).view(torch.uint8)
    bits = y.view(torch.uint8)
    return torch.where(over, (bits & 0x80) | code, bits).view(dtype)


def decode(codes: Tensor, name: str) -> Tensor:
    """``codes`` in float32. See :func:`npu_fusion.formats.decode`."""
    check_codes(f"decode '{name}'", codes, DTYPES[name])
    return codes.to(torch.float32)
