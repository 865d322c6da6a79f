"""Device functions that the kernels over rows share. A row is a token; columns go through in blocks.

::

    held      s = [main block | tail block]      in registers between the reduction and the quantization
    looped    for block: reduce                  for block: compute s again, quantize

MAIN is the largest power of two in the width and TAIL the smallest that covers the rest, so a held row of
9216 columns is 8192 + 1024 without an idle lane, where one power of two would be 16384.

Numbers. NaN: ``tl.max`` drops it, so the largest magnitude is taken of the bit patterns, where NaN is above
infinity. Rounding half to even: adding 1.5 * 2^23 to a float below 2^22 leaves no bits for a fraction, and
the sum's low byte is the integer in two's complement. Both hold on every device, without libdevice.
"""

from __future__ import annotations

import triton
import triton.language as tl

INT8_MAX: tl.constexpr = tl.constexpr(127.0)
RINT: tl.constexpr = tl.constexpr(0)
HALF_AWAY: tl.constexpr = tl.constexpr(1)
FLOOR: tl.constexpr = tl.constexpr(2)
CEIL: tl.constexpr = tl.constexpr(3)
TRUNC: tl.constexpr = tl.constexpr(4)

_INTEGER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23
_MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_SMALL: tl.constexpr = tl.constexpr(2.0**-100)
_RAISED: tl.constexpr = tl.constexpr(2.0**100)
_NO_END: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def load(pointer: tl.tensor, columns: tl.tensor, WIDTH: tl.constexpr, MASKED: tl.constexpr) -> tl.tensor:
    """The elements at ``columns``; beyond WIDTH zeros."""
    if MASKED:
        value = tl.load(pointer + columns, mask=columns < WIDTH, other=0)
    else:
        value = tl.load(pointer + columns)
    return value


@triton.jit
def store(
    pointer: tl.tensor, columns: tl.tensor, value: tl.tensor, WIDTH: tl.constexpr, MASKED: tl.constexpr
) -> None:
    if MASKED:
        tl.store(pointer + columns, value, mask=columns < WIDTH)
    else:
        tl.store(pointer + columns, value)


@triton.jit
def magnitude(x: tl.tensor) -> tl.tensor:
    """|x| of float32 as an integer: ordered as the magnitudes are, NaN above all."""
    return x.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def peak(x: tl.tensor) -> tl.tensor:
    """The largest :func:`magnitude` in a block."""
    return tl.max(magnitude(x), axis=0)


@triton.jit
def as_float(magnitude: tl.tensor) -> tl.tensor:
    """The number that a :func:`magnitude` is of."""
    return magnitude.to(tl.float32, bitcast=True)


@triton.jit
def rounded(x: tl.tensor, ROUND: tl.constexpr) -> tl.tensor:
    """float32 to int8: rounded as ROUND says, saturated; NaN becomes 0."""
    x = tl.where(x == x, x, 0.0)
    x = tl.minimum(tl.maximum(x, -128.0), 127.0)
    if ROUND == RINT:
        y = (x + _INTEGER).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        whole = (x + _INTEGER) - _INTEGER
        if ROUND == FLOOR:
            whole = whole - tl.where(whole > x, 1.0, 0.0)
        elif ROUND == CEIL:
            whole = whole + tl.where(whole < x, 1.0, 0.0)
        else:
            # Towards zero: never a larger magnitude than x has.
            sign = tl.where(x < 0.0, -1.0, 1.0)
            whole = whole - tl.where(tl.abs(whole) > tl.abs(x), sign, 0.0)
            if ROUND == HALF_AWAY:
                whole = whole + tl.where(tl.abs(x - whole) >= 0.5, sign, 0.0)
        y = whole.to(tl.int8)
    return y


@triton.jit
def quantized(x: tl.tensor, scale: tl.tensor, ROUND: tl.constexpr) -> tl.tensor:
    """``x / scale`` in int8, for one scale; 0 where that is 0.

    Not a division for each element, which would take a fifth of all instructions, but a multiplication by the
    reciprocal and one step of Newton's method: the same quotient in all but very rare cases. Scales whose
    reciprocal would overflow are raised together with x, which is exact.
    """
    raised = tl.where(scale < _SMALL, _RAISED, 1.0)
    divisor = scale * raised
    inverse = tl.where(scale == 0.0, 0.0, tl.div_rn(1.0, tl.where(scale == 0.0, 1.0, divisor)))
    x *= raised
    quotient = x * inverse
    return rounded(tl.fma(tl.fma(-quotient, divisor, x), inverse, quotient), ROUND)


@triton.jit
def gated(act: tl.tensor, lin: tl.tensor, alpha: tl.tensor) -> tl.tensor:
    """``act * sigmoid(alpha * act) * lin``."""
    return act / (1.0 + tl.exp(-alpha * act)) * lin


@triton.jit
def group_of(ends: tl.tensor, row: tl.tensor, GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr) -> tl.tensor:
    """The group that ``row`` is in, from the ends of the groups; GROUPS beyond the last."""
    index = tl.arange(0, GROUP_BLOCK)
    end = tl.load(ends + index, mask=index < GROUPS, other=_NO_END)
    return tl.sum((end <= row).to(tl.int32), axis=0)
