"""What a reader of a format finds for one layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import Scheme


@dataclass(frozen=True)
class Quantized:
    """A weight that a deployed layer may be made of."""

    scheme: Scheme
    weight: QuantizedWeight
    inputs: InputParameters | None = None
    smooth_scales: Tensor | None = None
    """[K], of any floating dtype; the input is multiplied by it."""
    bias: Tensor | None = None
    """fp32 [N], where the format keeps another bias than the layer's."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)


@dataclass(frozen=True)
class Dense:
    """A weight that no deployed layer stands for, as numbers."""

    value: Tensor
    """fp32 [N, K]."""
    reason: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)


Found = Quantized | Dense
