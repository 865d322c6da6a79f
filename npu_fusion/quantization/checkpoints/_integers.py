"""From unsigned integers with zero points, as files have them, to a :class:`QuantizedWeight`."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.quantization.checkpoints._packing import signed
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import WeightScheme


def grouped_weight(
    values: Tensor, zeros: Tensor | None, scale: Tensor, bits: int, size: int
) -> QuantizedWeight:
    """The weight ``(values - zeros) * scale``, exactly.

    Codes and offset are less by half of the range, which makes them signed. Fewer than 4 bits become int4, of
    which they use a part.

    Args:
        values: uint8 [N, K], 0 to 2^bits - 1.
        zeros: integers [N, G] of the same range; None: the middle of it everywhere.
        scale: fp32 [N, G], G = ceil(K / size). One group is a scale for each channel.
    """
    half = 2 ** (bits - 1)
    offset = None if zeros is None else (zeros.to(torch.int32) - half)
    if offset is not None and not bool(offset.any()):
        offset = None
    channel = scale.size(1) == 1
    scheme = WeightScheme(
        "int8" if bits > 4 else "int4",
        symmetric=offset is None,
        strategy="channel" if channel else "group",
        group_size=None if channel else size,
    )
    if channel:
        scale, offset = scale.squeeze(1), None if offset is None else offset.squeeze(1)
    offset = None if offset is None else offset.contiguous()
    return QuantizedWeight(scheme, signed(values, bits).contiguous(), scale.contiguous(), offset)
