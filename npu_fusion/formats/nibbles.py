"""Two codes of 4 bits in one byte."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.formats._checks import check_codes


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., n] of ``codes`` uint8 [..., 2n], whose low nibbles count: even indices in the low nibble.

    Raises ``TypeError`` for another dtype, ``ValueError`` for an odd last dimension or none.
    """
    check_codes("pack_nibbles", codes, torch.uint8)
    if codes.dim() == 0 or codes.size(-1) % 2:
        raise ValueError(
            f"pack_nibbles: codes have shape {list(codes.shape)}; accepted: an even last dimension"
        )
    return (codes[..., 0::2] & 0xF) | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_nibbles`: uint8 [..., n] to uint8 [..., 2n], codes in the low nibble."""
    check_codes("unpack_nibbles", packed, torch.uint8)
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
