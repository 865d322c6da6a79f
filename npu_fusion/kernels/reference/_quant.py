"""Exact building blocks that the quantizing reference kernels share.

Formula: op-plugin documentation and public kernel sources of torch_npu 2.13.0. Quantization computes in
fp32, rounds half to even and saturates. The device turns NaN into 0 on the way to an integer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion import formats
from npu_fusion.formats import float8
from npu_fusion.meta_impls._dtypes import HIFLOAT8_DTYPE

INT8_MAX = 127.0
_FLOATS = {HIFLOAT8_DTYPE: "hifloat8", **{dtype: name for name, dtype in float8.DTYPES.items()}}
DTYPE_MAX = {
    torch.int8: INT8_MAX,
    torch.quint4x2: 7.0,
    **{dtype: formats.MAXIMUM[name] for dtype, name in _FLOATS.items()},
}
"""The largest magnitude in symmetric dynamic quantization: amax divided by it is the scale."""

_INT4_MIN, _INT4_MAX = -8, 7
INT4_PER_INT32 = 8
_SIGN = 1 << 31


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``: rounded half to even where ``dtype`` is an integer, clamped to its finite range.

    Integer targets (up to 32 bits) turn NaN into 0; float8 targets keep it. ``torch.quint4x2`` means int4,
    packed into int32 by :func:`pack_int4`; ``HIFLOAT8_DTYPE`` means hifloat8 in uint8, rounded half away from
    zero, where infinity stays. The result is a new tensor.
    """
    if dtype == torch.quint4x2:
        return pack_int4(saturate(x, torch.int8).clamp(_INT4_MIN, _INT4_MAX))
    if dtype in _FLOATS:
        return formats.encode(x, _FLOATS[dtype])
    limits = torch.iinfo(dtype)
    if x.dtype.is_floating_point:
        # fp32 cannot hold 2**31 - 1: clamping to it there would round up to 2**31, which wraps.
        wide = x.to(torch.float64) if limits.bits > 16 else x
        x = torch.nan_to_num(wide.round(), nan=0.0)
    return x.clamp(limits.min, limits.max).to(dtype, copy=True)


def divide_rows(x_fp32: Tensor, dtype_max: float) -> tuple[Tensor, Tensor]:
    """Each row (last dimension) divided by its symmetric scale, not yet rounded; and the scales.

    ``scale = amax|row| / dtype_max`` is fp32 without the last dimension. A row whose scale is 0 (all zero, or
    so small that the quotient underflows) gives 0, as the device does; an empty row has scale 0.
    """
    if x_fp32.size(-1) == 0:
        scale = x_fp32.new_zeros(x_fp32.shape[:-1])
    else:
        scale = x_fp32.abs().amax(dim=-1) / dtype_max
    divisor = scale.unsqueeze(-1)
    return (x_fp32 / divisor).masked_fill(divisor == 0, 0.0), scale


def symmetric_rows(x_fp32: Tensor, dtype_max: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize each row (last dimension) of ``x_fp32`` symmetrically: :func:`divide_rows`, then saturate."""
    quotient, scale = divide_rows(x_fp32, dtype_max)
    return saturate(quotient, dtype), scale


def dequantize(acc: Tensor, channel_scale: Tensor, row_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """The fp32 value of int32 accumulators [..., m, n]: first the channel scale, then the row scale.

    ``channel_scale`` is [n] or [1], ``row_scale`` [m]; an int32 bias is added to the accumulators (int32
    arithmetic), a floating-point one after the scales.
    """
    if bias is not None and bias.dtype == torch.int32:
        acc = acc + bias
    x = acc.to(torch.float32) * channel_scale.to(torch.float32)
    if row_scale is not None:
        x = x * row_scale.to(torch.float32).unsqueeze(-1)
    if bias is not None and bias.dtype != torch.int32:
        x = x + bias.to(torch.float32)
    return x


def pack_int4(y_int8: Tensor) -> Tensor:
    """Pack int8 [..., 8n] with values in [-8, 7] into int32 [..., n]: eight nibbles each, lowest first."""
    count = y_int8.size(-1) // INT4_PER_INT32
    nibbles = y_int8.unflatten(-1, (count, INT4_PER_INT32)).to(torch.int64) & 0xF
    shifts = torch.arange(0, 32, 4, device=y_int8.device)
    # Unsigned 32-bit value to the int32 with the same bits: torch's narrowing integer cast wraps.
    return (nibbles << shifts).sum(dim=-1).to(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_int4`: int32 [..., n] to int8 [..., 8n] with values in [-8, 7]."""
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    nibbles = (packed.unsqueeze(-1) >> shifts) & 0xF
    return ((nibbles ^ 8) - 8).to(torch.int8).flatten(-2)


def pack_quant_param(scale: Tensor, offset: Tensor | None = None, rounded: bool = False) -> Tensor:
    """The int64 that torch_npu's ``npu_trans_quant_param`` makes of an fp32 ``scale`` and ``offset``.

    The low 13 mantissa bits are cut off, or rounded away half to even (``rounded``), where a denormal scale
    becomes zero: :func:`unpack_quant_param` tells the scale that is left. The offset is rounded half to even
    and saturates at -256 and 255.
    """
    bits = scale.to(torch.float32).contiguous().view(torch.int32).to(torch.int64)
    if rounded:
        exponent = bits & 0x7F800000
        nearest = bits + 0xFFF + (bits >> 13 & 1)
        bits = torch.where(exponent == 0x7F800000, bits, torch.where(exponent == 0, bits & _SIGN, nearest))
    packed = bits & 0xFFFFE000 | 1 << 46
    if offset is not None:
        packed = packed | (saturate(offset, torch.int32).clamp(-256, 255).to(torch.int64) & 0x1FF) << 37
    return packed


def unpack_quant_param(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset, both fp32, of the int64 that torch_npu's ``npu_trans_quant_param`` packs.

    Bits 0-31 are the fp32 scale with its low 13 mantissa bits cut off (so it is not the scale that was
    packed), bits 37-45 the offset as a 9-bit two's complement integer.
    """
    scale = (packed & 0xFFFFFFFF).to(torch.int32).view(torch.float32)
    field = (packed >> 37) & 0x1FF
    return scale, ((field ^ 0x100) - 0x100).to(torch.float32)


def group_counts(ends: Tensor) -> Tensor:
    """The sizes (int64) of consecutive groups of rows from their cumulative ends."""
    ends = ends.to(torch.int64)
    return ends.diff(prepend=ends.new_zeros(1))


def group_rows(counts: Tensor, total_rows: int) -> Tensor:
    """The group of each row, int64 [total_rows], for groups of consecutive rows of the given sizes.

    A count of 0 or less is an empty group; rows beyond the sum of the counts belong to group -1.
    """
    ends = counts.to(torch.int64).clamp(min=0).cumsum(0)
    rows = torch.arange(total_rows, device=counts.device)
    group = torch.searchsorted(ends, rows, right=True)
    return group.masked_fill(group == counts.numel(), -1)
