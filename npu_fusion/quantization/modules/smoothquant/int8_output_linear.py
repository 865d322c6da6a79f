"""Linear layers from int8 to int8: weights, inputs and results, with an int32 bias.

::

    x ─ _int_mm(weight) ─ + bias ─ float ─ × requant_scale ─ [+ output_offset] ─ round ─ clamp ─ int8 ─ y

which in a compiled graph is one ``npu_quant_matmul`` with an int8 result.

The names are those of torch_int, which stands beside SmoothQuant. What is different: the bias is int32 in
steps of the sums, not int8 with a scale of its own (a form that suits its CUDA kernel and costs accuracy);
weights can have a scale for each output channel, inputs and results a zero point; and no scale is a Python
number, so that a graph has no break.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from npu_fusion.quantization.modules.smoothquant._checks import (
    WEIGHT_QUANT,
    check_choice,
    check_linear,
    check_sizes,
    one_scale,
    zero_point,
)
from npu_fusion.quantization.modules.smoothquant._int8_linear import Int8Linear
from npu_fusion.quantization.modules.smoothquant._int8_parameters import int8_weight_and_bias
from npu_fusion.quantization.modules.smoothquant.requantization import requant_scale, rescaled

Layer = TypeVar("Layer", bound="W8A8B8O8Linear")


class W8A8B8O8Linear(Int8Linear):
    """Int8 to int8. With S_x, S_w, S_y the scales of input, weight and result, and z_x, z_y zero points::

        requant_scale = S_x * S_w / S_y         bias = round(b / (S_x * S_w)) - z_x * sum(weight)
        y = clamp(round((x · weightᵀ + bias) * requant_scale + z_y), -128, 127)

    The sum is an exact int32, the rest fp32, rounded half to even.

    Buffers: ``weight`` int8 [out_features, in_features], ``bias`` int32 [out_features] or None,
    ``requant_scale`` fp32 [out_features] or [1] (``weight_quant="per_tensor"``), ``output_offset`` int32 [1]
    or None. ``Module.to(dtype)`` leaves their dtypes as they are. A new layer has zeros: make it with
    :meth:`from_float` or load a state dict. On CUDA ``torch._int_mm`` itself wants more than 16 rows and
    features in multiples of 8. On an NPU the operator keeps ten bits of the scale's mantissa, so a value next
    to a half may be rounded to the other side.

    Args:
        bias: there is one, also of a layer without bias whose input has a zero point.
        weight_quant: ``"per_channel"`` or ``"per_tensor"``.
        output_offset: the results have a zero point.

    Raises:
        ValueError: ``in_features`` is not between 2 and 131,071 or ``out_features`` less than 1; or another
            ``weight_quant``.
    """

    fixed: ClassVar = ("requant_scale",)

    requant_scale: Tensor
    output_offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_quant: str = "per_channel",
        output_offset: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, torch.int32 if bias else None, weight_quant, device)
        self.register_buffer("requant_scale", self.no_scale(device))
        offset = torch.zeros(1, dtype=torch.int32, device=device) if output_offset else None
        self.register_buffer("output_offset", offset)

    @classmethod
    @torch.no_grad()
    def from_float(
        cls: type[Layer],
        module: nn.Linear,
        input_scale: float | Tensor,
        output_scale: float | Tensor,
        *,
        weight_quant: str = "per_channel",
        input_offset: int | Tensor | None = None,
        output_offset: int | Tensor | None = None,
    ) -> Layer:
        """Quantize a float layer; it is left as it is.

        Args:
            input_scale, output_scale: positive, of the int8 inputs and results: the largest magnitude divided
                by 127, say.
            input_offset, output_offset: zero points of inputs and results, -128 to 127; None: symmetric.

        Raises:
            TypeError: ``module`` is not a ``torch.nn.Linear``, or a scale or zero point is no number.
            ValueError: a scale or zero point out of range, another ``weight_quant``, or a layer that is not
                finite or too large.
        """
        who = f"{cls.__name__}.from_float"
        module = check_linear(who, module)
        check_sizes(who, module.in_features, module.out_features)
        check_choice(who, "weight_quant", weight_quant, WEIGHT_QUANT)
        scale_in = one_scale(who, "input_scale", input_scale)
        scale_out = one_scale(who, "output_scale", output_scale)
        offset_in = zero_point(who, "input_offset", input_offset)
        offset_out = zero_point(who, "output_offset", output_offset)
        try:
            weight, bias = int8_weight_and_bias(module, weight_quant, scale_in, offset_in)
        except ValueError as error:
            raise ValueError(f"{who}: {error}") from error
        factor = requant_scale(scale_in, weight.scale.double(), scale_out)
        if not factor.isfinite().all():
            raise ValueError(
                f"{who}: output_scale is {scale_out}; accepted: one by which input_scale * weight_scale can "
                "be divided in float32"
            )
        quantized = cls(
            module.in_features,
            module.out_features,
            bias is not None,
            weight_quant=weight_quant,
            output_offset=offset_out is not None,
            device=module.weight.device,
        )
        quantized.weight.copy_(weight.codes)
        quantized.requant_scale.copy_(factor)
        if quantized.bias is not None and bias is not None:
            quantized.bias.copy_(bias)
        if quantized.output_offset is not None and offset_out is not None:
            quantized.output_offset.fill_(offset_out)
        return quantized.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return int8 [..., out_features] of int8 [..., in_features]; no rows are fine.

        Raises:
            ValueError: ``x`` has another dtype or last size.
        """
        return self.unrows(self.quantized(x), x)

    def quantized(self, x: Tensor) -> Tensor:
        """The result as rows."""
        acc = self.sums(x)
        if self.bias is not None:
            acc = acc + self.bias
        return rescaled(acc, self.requant_scale, self.output_offset)


class W8A8B8O8LinearReLU(W8A8B8O8Linear):
    """:class:`W8A8B8O8Linear` with a ReLU: no result is below the zero point, which stands for 0.

    That is the quantized ``relu(x Wᵀ + b)`` exactly, because rounding keeps the order. In a compiled graph
    the maximum stays an operator of its own, on int8 values.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return int8 [..., out_features] of int8 [..., in_features], see :class:`W8A8B8O8Linear`."""
        y = self.quantized(x)
        if self.output_offset is None:
            y = y.clamp_min(0)
        else:
            y = torch.maximum(y, self.output_offset.to(torch.int8))
        return self.unrows(y, x)
