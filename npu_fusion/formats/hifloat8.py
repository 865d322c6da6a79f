"""hifloat8: 8 bits, of which the size of the exponent decides how many are the significand's.

::

    code    s p..p e..e m..m      the leading 1 of |exponent| is not stored, its sign is

    D    prefix p    exponent e    m         |exponent|
    0    0001        no bit        3 bits    0
    1    001         1 bit         3 bits    1
    2    01          2 bits        3 bits    2, 3
    3    10          3 bits        2 bits    4 to 7
    4    11          4 bits        1 bit     8 to 15
    -    0000        no bit        3 bits    denormal: the number is 2^(m - 23)

    value = (-1)^s * 2^exponent * (1 + m / 2^bits)

0x00 is zero (there is no -0), 0x80 NaN, 0x6F and 0xEF are the infinities; the largest number is 2^15, the
smallest 2^-22. Half-way numbers go away from zero.

That makes the code a function of few bits of the input: adding half a step and cutting off depends on the
bits down to half a step only, which is the fourth of the significand at most. So float32 is encoded by the
table of bfloat16, read with the upper 16 bits CUT OFF; rounding to bfloat16 first would round twice.

Source: "Ascend HiFloat8 Format for Deep Learning", arXiv 2409.16626.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from npu_fusion._compat import real_tensors
from npu_fusion.formats._checks import check_codes, check_numbers

NAME = "hifloat8"
MAXIMUM = 32768.0

_NAN, _INFINITY, _LARGEST = 0x80, 0x6F, 0x6E
_MANTISSA, _BIAS = 23, 127
"""Of float32."""
_LOWEST = -22
"""Exponent of the smallest number."""
_LOWEST_NORMAL = -15
# As bits of float32. Half of the smallest number is rounded up to it, all below is 0; from 40960, half a step
# above the largest number, it overflows.
_HALF_OF_SMALLEST, _SMALLEST = (_LOWEST - 1 + _BIAS) << _MANTISSA, (_LOWEST + _BIAS) << _MANTISSA
_OVERFLOW = ((15 + _BIAS) << _MANTISSA) | (1 << (_MANTISSA - 2))
_INFINITE = 255 << _MANTISSA


def encode(x: Tensor, saturate: bool = True) -> Tensor:
    """The codes, uint8. See :func:`npu_fusion.formats.encode`."""
    check_numbers("encode 'hifloat8'", x)
    if not _eager(x):
        return _encode(x.to(torch.float32), saturate)
    if x.dtype == torch.float32:
        # A NaN may have no bit in its upper half; or-ing makes it one that has.
        bits = x.contiguous().view(torch.int32)
        index = ((bits >> 16) & 0xFFFF) | x.isnan().to(torch.int32)
        table = _codes(torch.bfloat16, saturate, x.device)
    else:
        index = x.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
        table = _codes(x.dtype, saturate, x.device)
    return table.index_select(0, index.reshape(-1)).view(x.shape)


def decode(codes: Tensor) -> Tensor:
    """The numbers in float32. See :func:`npu_fusion.formats.decode`."""
    check_codes("decode 'hifloat8'", codes, torch.uint8)
    if not _eager(codes):
        return _decode(codes)
    return _numbers(codes.device).index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


def _eager(x: Tensor) -> bool:
    """Are these numbers to be computed with now? A graph is given arithmetic, not tables of this process."""
    return not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter)


@cache
def _codes(dtype: torch.dtype, saturate: bool, device: torch.device) -> Tensor:
    """uint8 [65536]: the code of every number of a 16-bit dtype, by its bits."""
    with real_tensors(), torch.inference_mode(False):
        bits = torch.arange(1 << 16).to(torch.uint16).view(dtype)
        return _encode(bits.to(torch.float32), saturate).to(device)


@cache
def _numbers(device: torch.device) -> Tensor:
    """float32 [256]: the number of every code."""
    with real_tensors(), torch.inference_mode(False):
        return _decode(torch.arange(256, dtype=torch.uint8)).to(device)


def _encode(x: Tensor, saturate: bool) -> Tensor:
    """The codes of float32 numbers, by integer arithmetic on their bits."""
    bits = x.contiguous().view(torch.int32)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF

    # Round to the step of the binade. What is rounded up to the next power of two may have a coarser step
    # there, but is a number of it.
    bounded = size.clamp(_SMALLEST, _OVERFLOW)
    step = _MANTISSA - _significand_bits(_exponent(bounded))
    rounded = (bounded + (1 << (step - 1))) >> step << step

    exponent = _exponent(rounded)
    digits = _exponent_bits(exponent)
    mantissa_bits = _significand_bits(exponent)
    mantissa = (rounded & ((1 << _MANTISSA) - 1)) >> (_MANTISSA - mantissa_bits)
    # 0001, 001, 01, 10, 11 in front of what follows it.
    prefix = (8 << digits) - 32 * (digits == 4)
    stored_size = exponent.abs() - ((1 << digits) >> 1)
    stored_sign = ((exponent < 0).to(torch.int32) << (digits + mantissa_bits)) >> 1
    normal = prefix | stored_sign | (stored_size << mantissa_bits) | mantissa
    code = torch.where(exponent < _LOWEST_NORMAL, exponent - (_LOWEST - 1), normal)

    code = torch.where(size < _HALF_OF_SMALLEST, 0, code | sign)
    infinite = size == _INFINITE if saturate else size >= _OVERFLOW
    code = torch.where(size >= _OVERFLOW, _LARGEST | sign, code)
    code = torch.where(infinite, _INFINITY | sign, code)
    return torch.where(size > _INFINITE, _NAN, code).to(torch.uint8)


def _decode(codes: Tensor) -> Tensor:
    code = codes.to(torch.int32) & 0x7F
    # The prefix says how many bits the exponent has.
    digits = sum((code >= 8 << d).to(torch.int32) for d in (1, 2, 3)) + (code >= 0x60).to(torch.int32)
    mantissa_bits = 3 - (digits >= 3).to(torch.int32) - (digits == 4).to(torch.int32)
    field = (code >> mantissa_bits) & ((1 << digits) - 1)
    leading = (1 << digits) >> 1
    size = leading | (field & (leading - 1))
    exponent = torch.where((field & leading) != 0, -size, size)
    mantissa = code & ((1 << mantissa_bits) - 1)
    normal = ((exponent + _BIAS) << _MANTISSA) | (mantissa << (_MANTISSA - mantissa_bits))
    bits = torch.where(code < 8, (code + (_LOWEST - 1 + _BIAS)) << _MANTISSA, normal)
    bits = torch.where(code == 0, 0, torch.where(code == _INFINITY, _INFINITE, bits))
    value = bits.to(torch.int32).view(torch.float32)
    value = torch.where(codes >= 0x80, -value, value)
    return torch.where(codes == _NAN, torch.nan, value)


def _exponent(bits: Tensor) -> Tensor:
    return (bits >> _MANTISSA) - _BIAS


def _exponent_bits(exponent: Tensor) -> Tensor:
    """D of a normal number."""
    size = exponent.abs()
    return sum((size >= 1 << d).to(torch.int32) for d in range(4))  # type: ignore[return-value]


def _significand_bits(exponent: Tensor) -> Tensor:
    """Bits of m, in which a denormal number, a power of two, has none."""
    digits = _exponent_bits(exponent)
    normal = 3 - (digits >= 3).to(torch.int32) - (digits == 4).to(torch.int32)
    return torch.where(exponent < _LOWEST_NORMAL, 0, normal)
