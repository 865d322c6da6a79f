"""Unsigned integers of a few bits in int32 words, as AutoAWQ, GPTQ and compressed-tensors pack them.

All three write a stream of bits, lowest first: value j is bits ``j * bits`` to ``(j + 1) * bits - 1`` of the
words laid end to end. With 3 bits a value can begin in one word and end in the next.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD, BYTE = 32, 8


def unpack(words: Tensor, bits: int) -> Tensor:
    """The values, uint8 [..., W * 32 / bits], in int32 ``words`` [..., W].

    W is a multiple of the words after which the pattern repeats (3 with 3 bits, 1 with 2, 4 and 8).
    """
    if BYTE % bits == 0:
        stream = words.contiguous().view(torch.uint8)
        if bits == BYTE:
            return stream
        fields = [(stream >> shift) & (2**bits - 1) for shift in range(0, BYTE, bits)]
        return torch.stack(fields, -1).flatten(-2)
    period = math.lcm(WORD, bits) // WORD
    count = period * WORD // bits
    # As unsigned numbers in 64 bits, where a right shift brings no sign, and two words fit.
    wide = (words.to(torch.int64) & 0xFFFFFFFF).unflatten(-1, (-1, period))
    values = torch.empty((*wide.shape[:-1], count), dtype=torch.uint8, device=words.device)
    for j in range(count):
        word, shift = divmod(j * bits, WORD)
        pair = wide[..., word]
        if shift + bits > WORD:
            pair = pair | (wide[..., word + 1] << WORD)
        values[..., j] = (pair >> shift) & (2**bits - 1)
    return values.flatten(-2)


def signed(values: Tensor, bits: int) -> Tensor:
    """uint8 values 0 ... 2^bits - 1 as int8, half of the range below 0."""
    # uint8 wraps around, to the bits of the negative number.
    return (values - 2 ** (bits - 1)).view(torch.int8)
