"""A linear layer from int8 to floating point: int8 weights and inputs, a floating bias and result.

::

    x ─ _int_mm(weight) ─ float ─ × dequant_scale ─ + bias ─ to(dtype) ─ y

which in a compiled graph is one ``npu_quant_matmul`` if ``dtype`` has 16 bits. The name is torch_int's.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from npu_fusion.quantization.modules.smoothquant._checks import (
    FLOATS,
    WEIGHT_QUANT,
    check_choice,
    check_linear,
    check_sizes,
    one_scale,
    zero_point,
)
from npu_fusion.quantization.modules.smoothquant._int8_linear import Int8Linear
from npu_fusion.quantization.modules.smoothquant._int8_parameters import int8_weight


class W8A8BFP32OFP32Linear(Int8Linear):
    """Int8 to floating point. With S_x and S_w the scales of input and weight, and z_x a zero point::

        dequant_scale = S_x * S_w               bias = b - z_x * dequant_scale * sum(weight)
        y = (x · weightᵀ) * dequant_scale + bias

    The sum is an exact int32, the rest fp32, rounded once to ``dtype``.

    Buffers: ``weight`` int8 [out_features, in_features], ``bias`` fp32 [out_features] or None,
    ``dequant_scale`` fp32 [out_features] or [1] (``weight_quant="per_tensor"``). ``Module.to(dtype)`` leaves
    their dtypes, and that of the result, as they are. A new layer has zeros: make it with :meth:`from_float`
    or load a state dict. On CUDA ``torch._int_mm`` itself wants more than 16 rows and features in multiples
    of 8.

    Args:
        bias: there is one, also of a layer without bias whose input has a zero point.
        weight_quant: ``"per_channel"`` or ``"per_tensor"``.
        dtype: of the result: float32, or float16 or bfloat16.

    Raises:
        ValueError: ``in_features`` is not between 2 and 131,071 or ``out_features`` less than 1; or another
            ``weight_quant`` or ``dtype``.
    """

    fixed: ClassVar = ("bias", "dequant_scale")

    dequant_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_quant: str = "per_channel",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, torch.float32 if bias else None, weight_quant, device)
        check_choice("W8A8BFP32OFP32Linear", "dtype", dtype, FLOATS)
        self.dtype = dtype
        self.register_buffer("dequant_scale", self.no_scale(device))

    @classmethod
    @torch.no_grad()
    def from_float(
        cls,
        module: nn.Linear,
        input_scale: float | Tensor,
        *,
        weight_quant: str = "per_channel",
        input_offset: int | Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> W8A8BFP32OFP32Linear:
        """Quantize a float layer; it is left as it is.

        Args:
            input_scale: positive, of the int8 inputs: the largest magnitude divided by 127, say.
            input_offset: their zero point, -128 to 127; None: symmetric.
            dtype: of the result.

        Raises:
            TypeError: ``module`` is not a ``torch.nn.Linear``, or a scale or zero point is no number.
            ValueError: a scale or zero point out of range, another ``weight_quant`` or ``dtype``, or a layer
                that is not finite or too large.
        """
        who = "W8A8BFP32OFP32Linear.from_float"
        module = check_linear(who, module)
        check_sizes(who, module.in_features, module.out_features)
        check_choice(who, "weight_quant", weight_quant, WEIGHT_QUANT)
        check_choice(who, "dtype", dtype, FLOATS)
        scale = one_scale(who, "input_scale", input_scale)
        offset = zero_point(who, "input_offset", input_offset)
        weight = int8_weight(module.weight, weight_quant)
        quantized = cls(
            module.in_features,
            module.out_features,
            module.bias is not None or offset is not None,
            weight_quant=weight_quant,
            dtype=dtype,
            device=module.weight.device,
        )
        step = scale * weight.scale.double()
        quantized.weight.copy_(weight.codes)
        quantized.dequant_scale.copy_(step)
        if quantized.bias is not None:
            bias = torch.zeros_like(step) if module.bias is None else module.bias.double()
            quantized.bias.copy_(bias if offset is None else bias - offset * step * weight.sums())
        return quantized.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out_features] in ``dtype`` of int8 [..., in_features]; no rows are fine.

        Raises:
            ValueError: ``x`` has another dtype or last size.
        """
        y = self.sums(x).float() * self.dequant_scale
        if self.bias is not None:
            y = y + self.bias
        return self.unrows(y.to(self.dtype), x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dtype={self.dtype}"
