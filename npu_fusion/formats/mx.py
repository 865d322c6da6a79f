"""mx types: blocks of 32 elements that share one scale, a power of two stored as e8m0.

::

    exponent = floor(log2(amax)) - EMAX + (m > threshold)      amax = m * 2^k of the block, 1 <= m < 2
    element  = sat(x / 2^exponent)                             the largest element is in the binade of 2^EMAX

    mode     threshold                    amax / 2^exponent
    floor    none: never                  below 2^(EMAX + 1); what is above the largest element saturates
    even     half a step below 2          as floor, unless it would round up to 2^(EMAX + 1)
    rceil    m of the largest element     at most the largest element: nothing saturates
    ceil     1                            at most 2^EMAX

For float4_e2m1, ``even`` raises mantissas above 1.75, and ``rceil`` those above 1.5.

An e8m0 scale is the exponent plus 127 in 8 bits, with 255 for NaN. Trap: a cast to ``torch.float8_e8m0fnu``
rounds (1.5 becomes 2) and turns 0 into 2^-127, so scales are made of exponents, and viewed.

Source: OCP Microscaling Formats Specification, version 1.0 (``floor``); documentation and kernels of Ascend's
DynamicMxQuant (``floor``; for float4_e2m1 also ``even``, as in AMCT, and ``rceil``). The comparison is
strict: others raise a mantissa of exactly the threshold of ``even``, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion import _compat
from npu_fusion.formats._checks import check_numbers

BLOCK = 32
"""Neighbours that share one scale."""

ELEMENT = {"mxfp8_e4m3fn": "float8_e4m3fn", "mxfp8_e5m2": "float8_e5m2", "mxfp4_e2m1": "float4_e2m1"}
"""The format of the elements of each mx type."""

MODES = ("floor", "even", "ceil", "rceil")
NAN_EXPONENT = 128
"""Of a block with an element that is not finite."""

_BIAS = 127
# EMAX, bits of the significand, and mantissa of the largest element.
_SHAPES = {
    "float8_e4m3fn": (8, 3, 1.75),
    "float8_e5m2": (15, 2, 1.75),
    "float4_e2m1": (2, 1, 1.5),
    "float4_e1m2": (0, 2, 1.75),
}


def shared_exponent(amax: Tensor, element: str, mode: str | None = None) -> Tensor:
    """The exponents of blocks, int32 of the shape of ``amax``, from -127 to 127.

    Args:
        amax: float16, bfloat16 or float32: the largest magnitude of each block.
        element: ``float8_e4m3fn``, ``float8_e5m2``, ``float4_e2m1`` or ``float4_e1m2``, or an mx type.
        mode: how ``amax`` is rounded to a power of two (docstring of the module). None: what goes with the
            element, ``floor`` for 8 bits and ``even`` for 4.

    A block of zeros has -127. If ``amax`` is not finite, the exponent is :data:`NAN_EXPONENT`, e8m0's NaN.

    Raises ``ValueError`` for another element or mode, ``TypeError`` for a dtype.
    """
    check_numbers("shared_exponent", amax)
    name = ELEMENT.get(element, element)
    if name not in _SHAPES:
        raise ValueError(
            f"shared_exponent: element is {element!r}; accepted: {', '.join([*_SHAPES, *ELEMENT])}"
        )
    if mode is None:
        mode = "even" if name.startswith("float4") else "floor"
    if mode not in MODES:
        raise ValueError(f"shared_exponent: mode is {mode!r}; accepted: {', '.join(MODES)}")
    largest, bits, mantissa = _SHAPES[name]
    # frexp gives 1/2 <= fraction < 1, exactly and for denormals, too.
    fraction, exponent = torch.frexp(amax.to(torch.float32))
    raised = exponent - 1 - largest
    if mode != "floor":
        threshold = {"even": 2 - 2.0 ** -(bits + 1), "ceil": 1.0, "rceil": mantissa}[mode]
        raised = raised + (fraction * 2 > threshold)
    # Infinity and NaN have no exponent of their own: what frexp gives is left to the platform.
    raised = raised.clamp(-_BIAS, _BIAS).masked_fill(amax == 0, -_BIAS)
    return raised.masked_fill(~amax.isfinite(), NAN_EXPONENT).to(torch.int32)


def e8m0(exponent: Tensor) -> Tensor:
    """The scales 2^exponent of int32 exponents from -127 to 127; :data:`NAN_EXPONENT` becomes NaN.

    Their dtype is ``torch.float8_e8m0fnu``, or uint8 with the same bits where torch is older than 2.7.
    """
    bits = (exponent + _BIAS).to(torch.uint8)
    return bits if _compat.E8M0 is None else bits.view(_compat.E8M0)


def exponent_of(scale: Tensor) -> Tensor:
    """The inverse of :func:`e8m0`: int32 exponents of scales, given as :func:`e8m0` does or as uint8.

    Raises ``TypeError`` for another dtype.
    """
    if scale.dtype not in (torch.uint8, _compat.E8M0):
        raise TypeError(f"exponent_of: scale is {scale.dtype}; accepted: torch.float8_e8m0fnu, torch.uint8")
    return scale.view(torch.uint8).to(torch.int32) - _BIAS
