"""A linear layer in int8 whose input is quantized with a scale from calibration.

::

    x ─ ÷ input_scale ─ [+ input_offset] ─ round ─ clamp ─ int8 ─ _int_mm ─ [+ int32 bias] ─ × deq_scale ─ y

Plain ATen, in the form of ``npu_quantize`` and ``npu_quant_matmul(bias=int32)``, and behind a norm of
``npu_add_rms_norm_quant``.

Formula, with s the one scale of the input, z its zero point, f the smooth scales (1 where there are none)::

    input_scale[k] = s / f[k]          input_offset[k] = z          deq_scale[n] = s · weight_scale[n]
    bias[n]        = round(b[n] / deq_scale[n]) - z · Σₖ weight[n, k]

    y[t, n] = (Σₖ q[t, k] · weight[n, k] + bias[n]) · deq_scale[n]

which is what the operators document, and AMCT's and msmodelslim's static int8 (``quant_bias``). Smoothing
costs nothing here: it is in the scale. Scale and zero point have an entry for each channel in any case,
because ``npu_add_rms_norm_quant`` wants them so, and what stands in the graph is done at every step.

Traps:

* In a bfloat16 model s is rounded to bfloat16 BEFORE anything is derived of it, and kept so, because
  ``npu_add_rms_norm_quant`` takes scales and zero points of that dtype there. With smooth scales it stays
  fp32: s / f is in no 16-bit type, and rounding it would change f, which is in the weight already.
* An int32 bias has to hold ``b / deq_scale``. A nearly dead channel with a bias is beyond that, where a
  saturated number would be wrong without a sign of it. The layer then has an fp32 bias, which the operators
  add after the scales.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from npu_fusion._mergeable import mergeable
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules._deployed import Spec, deployed
from npu_fusion.quantization.modules._linear import (
    DeployedLinear,
    as_given,
    check_int8_sizes,
    doubled,
    dtype_of,
    dtype_or_none,
    for_each_output,
)
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import Scheme

_SCALES = (torch.bfloat16, torch.float32)
_BIASES = (torch.int32, torch.float32)
_INT32_MAX = torch.iinfo(torch.int32).max


@deployed
class W8A8StaticLinear(DeployedLinear):
    """``y = x Wᵀ + b`` with int8 weights and int8 activations of a given scale; see the module's docstring.

    Buffers: ``weight`` int8 [out_features, in_features]; ``weight_scale`` and ``deq_scale`` fp32
    [out_features]; ``input_scale`` fp32 or bf16 [in_features]; ``input_offset`` [in_features] or None, int32,
    or bf16 beside a bf16 scale; ``bias`` int32 or fp32 [out_features] or None.

    Args:
        bias: the dtype of the bias, or None.
        input_scale: the dtype of the input's scale.

    Raises:
        ValueError: as :class:`W8A8DynamicLinear`.
    """

    kind = "w8a8_static_linear"
    shared = ("input_scale", "input_offset")
    reads: ClassVar = {"bias": dtype_or_none(_BIASES), "input_scale": dtype_of(_SCALES)}

    weight: Tensor
    weight_scale: Tensor
    deq_scale: Tensor
    input_scale: Tensor
    input_offset: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: torch.dtype | None,
        input_scale: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        check_int8_sizes("W8A8StaticLinear", in_features, out_features)
        assert scheme.inputs is not None
        offset = torch.bfloat16 if input_scale == torch.bfloat16 else torch.int32
        specs = {
            "weight": Spec(torch.int8, (out_features, in_features)),
            "weight_scale": Spec(torch.float32, (out_features,)),
            "deq_scale": Spec(torch.float32, (out_features,)),
            "input_scale": Spec(input_scale, (in_features,)),
            "input_offset": None if scheme.inputs.symmetric else Spec(offset, (in_features,)),
            "bias": None if bias is None else Spec(bias, (out_features,)),
        }
        options = {"bias": bias, "input_scale": input_scale}
        super().__init__(in_features, out_features, scheme, specs, device, options)

    @classmethod
    def takes(cls, scheme: Scheme) -> bool:
        weights, inputs = scheme.weights, scheme.inputs
        return (
            inputs is not None
            and (weights.type, weights.symmetric) == ("int8", True)
            and weights.strategy in ("tensor", "channel")
            and (inputs.type, inputs.strategy) == ("int8", "tensor")
        )

    @classmethod
    def of(
        cls,
        layer: nn.Linear,
        scheme: Scheme,
        weight: QuantizedWeight,
        inputs: InputParameters | None,
        smooth_scales: Tensor | None,
    ) -> W8A8StaticLinear:
        assert inputs is not None
        narrow = layer.weight.dtype == torch.bfloat16 and smooth_scales is None
        dtype = torch.bfloat16 if narrow else torch.float32
        scale, offset = inputs.scale.to(dtype), inputs.offset
        weight_scale = for_each_output(weight)
        deq_scale = scale.float() * weight_scale
        bias = _bias(layer.bias, weight.codes, offset, deq_scale)
        made = cls.like(layer, scheme, bias=None if bias is None else bias.dtype, input_scale=dtype)
        of_channels = scale.expand(layer.in_features)
        if smooth_scales is not None:
            of_channels = of_channels / smooth_scales.float()
        if offset is not None:
            offset = offset.expand(layer.in_features).to(dtype if narrow else torch.int32).contiguous()
        made.fill(
            weight=weight.codes,
            weight_scale=weight_scale,
            deq_scale=deq_scale,
            input_scale=of_channels.contiguous(),
            input_offset=offset,
            bias=bias,
        )
        return made

    def quantized_weight(self) -> QuantizedWeight:
        return as_given(self.scheme, self.weight, self.weight_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] in the dtype of ``x`` [..., in_features]; zero tokens are fine.

        Raises:
            ValueError: ``x`` is not float16, bfloat16 or float32, or its last size is not ``in_features``.
        """
        v = self.rows(x).float() / self.input_scale
        if self.input_offset is not None:
            v = v + self.input_offset
        q = v.round().clamp(-128, 127).to(torch.int8)
        product = torch._int_mm(q, self.weight.t())
        if self.bias is not None and self.bias.dtype == torch.int32:
            product = product + self.bias
        y = product.float() * self.deq_scale
        if self.bias is not None and self.bias.dtype != torch.int32:
            y = y + self.bias
        return self.unrows(y, x)


def _bias(bias: Tensor | None, codes: Tensor, offset: Tensor | None, deq_scale: Tensor) -> Tensor | None:
    """What is added to the product: int32, or fp32 after the scales where int32 cannot hold it."""
    if bias is None and offset is None:
        return None
    # float64 holds every number on the way: sums of K int8, and quotients of two fp32.
    total = torch.zeros_like(deq_scale, dtype=torch.float64)
    if offset is not None:
        total -= offset.double() * codes.sum(1, dtype=torch.int64).double()
    if bias is None:
        return total.to(torch.int32)
    whole = total + (bias.detach().double() / deq_scale.double()).round()
    reach = codes.clamp(min=0).sum(1, dtype=torch.int64) - codes.clamp(max=0).sum(1, dtype=torch.int64)
    if bool((whole.abs() + 128 * reach <= _INT32_MAX).all()):
        return whole.to(torch.int32)
    return (total * deq_scale.double() + bias.detach().double()).float()


mergeable(W8A8StaticLinear, shared=W8A8StaticLinear.shared)(doubled)
