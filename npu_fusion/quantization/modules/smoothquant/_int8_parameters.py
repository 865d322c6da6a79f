"""Int8 weights and int32 biases of a linear layer with a given scale of its input.

::

    weight_int = round(W / weight_scale)                              weight_scale = max|W| / 127
    bias_int   = round(b / (input_scale * weight_scale)) - input_offset * sum(weight_int)

so that ``(sum(x_int * weight_int) + bias_int) * input_scale * weight_scale`` is the layer's result in
floating point. A bias that is large beside its weights (of a channel of zeros, in the extreme) does not fit
int32 by that scale: the scale of such a channel is made larger until it does. Its weights are then rounded
more coarsely, by an error that is small beside the bias.

Source: Jacob et al. (arXiv:1712.05877), section 2.4; npu_quant_matmul documents the same int32 bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from npu_fusion.quantization.modules.smoothquant._absmax import absmax_codes

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Int8Weight:
    codes: Tensor
    """int8 [N, K]."""
    scale: Tensor
    """fp32 [N], or [1] for one of the whole weight."""

    def sums(self) -> Tensor:
        """int64 [N], what one step of an offset of the input adds."""
        return self.codes.sum(dim=1, dtype=torch.int64)


def int8_weight(weight: Tensor, weight_quant: str, least: Tensor | None = None) -> Int8Weight:
    """Quantize [N, K]; ``least`` is a lower bound of the scales, fp32 [N]."""
    codes, scale = absmax_codes(weight, weight_quant == "per_channel")
    scale = scale.reshape(-1)
    if least is not None:
        least = least if weight_quant == "per_channel" else least.amax(dim=0, keepdim=True)
        if bool((least > scale).any()):
            scale = torch.maximum(scale, least)
            step = torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
            codes = (weight.detach().float() / step).round().clamp(-127, 127)
    return Int8Weight(codes.to(torch.int8), scale)


def int8_weight_and_bias(
    module: nn.Linear, weight_quant: str, input_scale: float, input_offset: int | None
) -> tuple[Int8Weight, Tensor | None]:
    """The weight, and the bias as int32 [N]; None where the layer has none and needs none.

    Raises:
        ValueError: ``in_features`` is so large that, beside an offset of the input, sums need not fit int32.
    """
    # No sum of products exceeds this, nor does the part of the bias that undoes the offset.
    extent = module.in_features * 127 * (128 if input_offset is None else 255)
    room = _INT32_MAX - extent
    if room < 1:
        most = _INT32_MAX // (127 * 255)
        given = f"in_features is {module.in_features} beside an input_offset"
        raise ValueError(f"{given}; accepted: at most {most}")
    bias = None if module.bias is None else module.bias.detach().double()
    least = None if bias is None else (bias.abs() / (input_scale * room)).float()
    weight = int8_weight(module.weight, weight_quant, least)
    if bias is None and input_offset is None:
        return weight, None
    total = torch.zeros(module.out_features, dtype=torch.int64, device=module.weight.device)
    if bias is not None:
        step = input_scale * torch.where(weight.scale == 0, 1.0, weight.scale).double()
        total = (bias / step).round().clamp(-room, room).to(torch.int64)
    if input_offset is not None:
        total = total - input_offset * weight.sums()
    return weight, total.to(torch.int32)
