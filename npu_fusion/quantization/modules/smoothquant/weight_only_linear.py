"""A linear layer with int8 weights and 16-bit inputs, under torch_int's name.

::

    x ─ npu_weight_quant_batchmatmul(weight, antiquant_scale, bias) ─ y

It halves the memory of the weight and loses next to no accuracy; products are floating ones. All of it but
the way it is made is :class:`npu_fusion.quantization.modules.WeightOnlyLinear`, which has the other types and
granularities.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from npu_fusion.quantization.modules.smoothquant._absmax import absmax_codes
from npu_fusion.quantization.modules.smoothquant._checks import check_choice, check_linear
from npu_fusion.quantization.modules.weight_only_linear import WeightOnlyLinear
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import Scheme, WeightScheme

_SCHEME = Scheme(WeightScheme("int8", strategy="channel"))

Layer = TypeVar("Layer", bound="W8A16Linear")


class W8A16Linear(WeightOnlyLinear):
    """``y = x (weight * antiquant_scale) + bias``, weights in int8 with a scale for each output channel."""

    @classmethod
    @torch.no_grad()
    def from_float(cls: type[Layer], module: nn.Linear) -> Layer:
        """Quantize a float16 or bfloat16 layer; it is left as it is.

        The scale, max|w| / 127, is rounded to the dtype of the layer before the weights are divided by it,
        because that is how the operator takes it.

        Raises:
            TypeError: ``module`` is not a ``torch.nn.Linear``.
            ValueError: its weight is not float16 or bfloat16, or it or the bias has an infinity or a NaN.
        """
        who = "W8A16Linear.from_float"
        module = check_linear(who, module)
        check_choice(who, "weight.dtype", module.weight.dtype, (torch.float16, torch.bfloat16))
        _, exact = absmax_codes(module.weight, by_row=True)
        scale = exact.to(module.weight.dtype).float()
        codes = (module.weight.float() / torch.where(scale == 0, 1.0, scale)).round().clamp(-127, 127)
        weight = QuantizedWeight(_SCHEME.weights, codes.to(torch.int8), scale.squeeze(-1))
        made = cls.of(module, _SCHEME, weight, None, None)
        assert isinstance(made, cls)
        return made.train(module.training)
