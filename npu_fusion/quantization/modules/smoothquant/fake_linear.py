"""A linear layer with fake-quantized weights, inputs and, if wanted, results: what W8A8 costs in accuracy.

::

    x ─ quantize, dequantize ─ linear(fake-quantized W, b) ─ [quantize, dequantize] ─ y

Source: SmoothQuant's ``fake_quant.py``. The products are floating ones, so nothing here fuses to an int8
operator: that is for the layers with real int8 weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npu_fusion.quantization.modules.smoothquant._checks import (
    WEIGHT_QUANT,
    check_choice,
    check_linear,
    check_rows,
)
from npu_fusion.quantization.modules.smoothquant.fake_quantization import (
    quantize_activation_per_tensor_absmax,
    quantize_activation_per_token_absmax,
    quantize_weight_per_channel_absmax,
    quantize_weight_per_tensor_absmax,
)

_WEIGHTS = dict(
    zip(WEIGHT_QUANT, (quantize_weight_per_channel_absmax, quantize_weight_per_tensor_absmax), strict=True)
)
_ACTIVATIONS = {
    "per_token": quantize_activation_per_token_absmax,
    "per_tensor": quantize_activation_per_tensor_absmax,
}


class W8A8Linear(nn.Module):
    """``y = q(q(x) · weightᵀ + bias)`` with q the 8-bit fake quantization; the outer one only if wanted.

    Buffers: ``weight`` [out_features, in_features], fake-quantized, and ``bias`` [out_features] or None, both
    in the dtype of the model. A new layer has zeros: make it with :meth:`from_float` or load a state dict.
    Converted to 16 bits afterwards, the weight is rounded again; convert the model first.

    Args:
        act_quant: ``"per_token"`` or ``"per_tensor"``, for inputs and results.
        quantize_output: quantize the results, too (of the q, k and v projections, whose results are operands
            of the batched products of attention).
        weight_quant: ``"per_channel"`` or ``"per_tensor"``: how the weight was quantized; shown only.

    Raises:
        ValueError: another ``act_quant`` or ``weight_quant``.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        act_quant: str = "per_token",
        quantize_output: bool = False,
        *,
        weight_quant: str = "per_channel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("W8A8Linear", "act_quant", act_quant, _ACTIVATIONS)
        check_choice("W8A8Linear", "weight_quant", weight_quant, _WEIGHTS)
        self.in_features = in_features
        self.out_features = out_features
        self.act_quant = act_quant
        self.quantize_output = quantize_output
        self.weight_quant = weight_quant
        self.register_buffer("weight", torch.zeros(out_features, in_features, device=device, dtype=dtype))
        zero_bias = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_buffer("bias", zero_bias)

    @classmethod
    @torch.no_grad()
    def from_float(
        cls,
        module: nn.Linear,
        weight_quant: str = "per_channel",
        act_quant: str = "per_token",
        quantize_output: bool = False,
    ) -> W8A8Linear:
        """Quantize a float layer; it is left as it is.

        Raises:
            TypeError: ``module`` is not a ``torch.nn.Linear``.
            ValueError: another ``weight_quant`` or ``act_quant``; or the weight is not float16, bfloat16 or
                float32, or it or the bias has an infinity or a NaN.
        """
        who = "W8A8Linear.from_float"
        module = check_linear(who, module)
        check_choice(who, "weight_quant", weight_quant, _WEIGHTS)
        check_choice(who, "act_quant", act_quant, _ACTIVATIONS)
        quantized = cls(
            module.in_features,
            module.out_features,
            module.bias is not None,
            act_quant,
            quantize_output,
            weight_quant=weight_quant,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        quantized.weight.copy_(_WEIGHTS[weight_quant](module.weight))
        if quantized.bias is not None:
            quantized.bias.copy_(module.bias)
        return quantized.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] of ``x`` [..., in_features]; both in the dtype of the weight.

        Raises:
            ValueError: ``x`` has another dtype or last size.
        """
        if x.dtype != self.weight.dtype:
            raise ValueError(
                f"W8A8Linear: x has dtype {x.dtype}; accepted: {self.weight.dtype} (that of the weight)"
            )
        check_rows("W8A8Linear", x, self.in_features)
        quantize = _ACTIVATIONS[self.act_quant]
        y = F.linear(quantize(x), self.weight, self.bias)
        return quantize(y) if self.quantize_output else y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight_quant={self.weight_quant}, act_quant={self.act_quant}, "
            f"quantize_output={self.quantize_output}"
        )
