"""A quantized weight as plain data: what algorithms give, and what layers and files are made of.

::

    value[n, k] = (codes[n, k] - offset[n, g]) * scale[n, g] * channel_scale[n]        g = k // group_size

where ``codes`` stand for numbers of the weight's type. ``scale`` has one entry (tensor), one for each row
(channel) or one for each row and group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_fusion import formats
from npu_fusion.quantization.scheme import INTEGER_TYPES, WeightScheme


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [N, K] of a scheme. All tensors are on the device of the layer."""

    scheme: WeightScheme
    codes: Tensor
    """[N, K], never packed. int8 and int4: int8 (-8 to 7 for int4). float8_e4m3fn, mxfp8_e4m3fn:
    ``torch.float8_e4m3fn``. hifloat8: uint8 bit patterns. 4-bit floats: uint8 with the bit pattern in the low
    nibble."""
    scale: Tensor
    """fp32; [1] (tensor), [N] (channel) or [N, ceil(K / group_size)]. For mx types a power of two."""
    offset: Tensor | None = None
    """int32 zero points in the shape of ``scale``; asymmetric integers only."""
    channel_scale: Tensor | None = None
    """fp32 [N]: the outer scale of float4_e2m1 beside float8 inputs, whose ``scale`` per group is inner."""

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def numbers(self) -> Tensor:
        """The numbers that the codes stand for, fp32 [N, K], without scale and offset."""
        if self.scheme.type in INTEGER_TYPES:
            return self.codes.to(torch.float32)
        return formats.decode(self.codes, self.scheme.type)

    def dequantize(self) -> Tensor:
        """fp32 [N, K]."""
        numbers = self.numbers()
        if self.offset is not None:
            numbers = numbers - self.spread(self.offset).to(torch.float32)
        value = numbers * self.spread(self.scale)
        return value if self.channel_scale is None else value * self.channel_scale.unsqueeze(-1)

    def spread(self, parameter: Tensor) -> Tensor:
        """``scale`` or ``offset`` in a form that broadcasts over [N, K]."""
        if parameter.dim() == 1:
            return parameter.unsqueeze(-1)
        size = self.scheme.group_size
        assert size is not None, "a parameter for each group has a group_size"
        return parameter.repeat_interleave(size, dim=1)[:, : self.codes.size(1)]
