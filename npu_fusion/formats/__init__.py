"""Number formats of quantized values that torch has no arithmetic for, or none that can be relied on.

::

    codes = encode(x, "hifloat8")      x [...]: float16, bfloat16 or float32
    value = decode(codes, "hifloat8")  float32 [...], exact

=================  ========================  ===================================  =========  ================
format             codes                     positive numbers                     largest    ties
=================  ========================  ===================================  =========  ================
``hifloat8``       uint8 bit patterns        2^-22 to 2^15, 1 to 4 digits         32768      away from zero
``float8_e4m3fn``  ``torch.float8_e4m3fn``   2^-9 to 448, 4 digits                448        to even
``float8_e5m2``    ``torch.float8_e5m2``     2^-16 to 57344, 3 digits             57344      to even
``float4_e2m1``    uint8, the low nibble     .5 1 1.5 2 3 4 6                     6          to even
``float4_e1m2``    uint8, the low nibble     .25 .5 .75 1 1.25 1.5 1.75           1.75       to even
=================  ========================  ===================================  =========  ================

The mx types (``mxfp8_e4m3fn``, ``mxfp8_e5m2``, ``mxfp4_e2m1``) are blocks of 32 such elements that share a
power of two: see :mod:`npu_fusion.formats.mx`. Their elements are encoded here, by the name of the mx type or
of the element.

Source: arXiv 2409.16626 (HiFloat8), the OCP specifications of 8-bit floating point and of microscaling
formats.
"""

from __future__ import annotations

from torch import Tensor

from npu_fusion.formats import float4, float8, hifloat8, mx
from npu_fusion.formats.nibbles import pack_nibbles, unpack_nibbles

__all__ = ["ELEMENT", "MAXIMUM", "decode", "encode", "mx", "pack_nibbles", "unpack_nibbles"]

MAXIMUM: dict[str, float] = {hifloat8.NAME: hifloat8.MAXIMUM, **float8.MAXIMUM, **float4.MAXIMUM}
"""The largest finite number of each format."""

ELEMENT: dict[str, str] = {**{name: name for name in MAXIMUM}, **mx.ELEMENT}
"""The format of the elements of every type: of mx types that of the block's elements, otherwise itself."""


def encode(x: Tensor, type: str, *, saturate: bool = True) -> Tensor:
    """The codes of the numbers of a format that are nearest to ``x``.

    Args:
        x: float16, bfloat16 or float32, any shape. It is rounded once, whatever its dtype.
        type: a key of :data:`ELEMENT`.
        saturate: a number beyond the largest becomes the largest. Otherwise it becomes what the format has
        for
            it: infinity (hifloat8, float8_e5m2) or NaN (float8_e4m3fn).

    NaN stays NaN; in 4 bits, which have none, it becomes a zero. Infinity saturates, but for hifloat8, where
    it stays: there ``saturate`` is about finite numbers only.

    Returns codes of the shape of ``x`` (table in the docstring of the package).

    Raises ``ValueError`` for an unknown type and for ``saturate=False`` with a 4-bit format (it has neither
    infinity nor NaN), ``TypeError`` for a dtype.
    """
    element = _element("encode", type)
    if element == hifloat8.NAME:
        return hifloat8.encode(x, saturate)
    if element in float8.DTYPES:
        return float8.encode(x, element, saturate)
    if not saturate:
        raise ValueError(f"encode: saturate is False for '{type}', which has no infinity; accepted: True")
    return float4.encode(x, element)


def decode(codes: Tensor, type: str) -> Tensor:
    """The numbers that ``codes`` stand for, float32 of the same shape; exact.

    Raises ``ValueError`` for an unknown type, ``TypeError`` for codes of another dtype than :func:`encode`
    gives.
    """
    element = _element("decode", type)
    if element == hifloat8.NAME:
        return hifloat8.decode(codes)
    if element in float8.DTYPES:
        return float8.decode(codes, element)
    return float4.decode(codes, element)


def _element(function: str, type: str) -> str:
    if type not in ELEMENT:
        raise ValueError(f"{function}: type is {type!r}; accepted: {', '.join(ELEMENT)}")
    return ELEMENT[type]
