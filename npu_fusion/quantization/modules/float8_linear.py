"""Linear layers whose weights and inputs are 8-bit floats: float8_e4m3fn or hifloat8 (Ascend 950).

::

    static    x ─ npu_quantize(input_scale) ────────── q ─ npu_quant_matmul(weight, weight_scale, ..) ─ y
                                       pertoken_scale ─────────────────────────────────┘
    dynamic   x ─ npu_dynamic_quant(smooth_scales) ─── q ─ npu_quant_matmul(weight, weight_scale, ..) ─ y
                                                └───── scale per token ────────────────┘

    y[t, n] = (Σₖ q[t, k] · weight[n, k]) · weight_scale[n] · s[t] + b[n]

in fp32, with one rounding to the dtype of x. There is no form of it in plain ATen that an NPU takes, so the
operators are called as they are.

Static: s is the one scale of the input (``pertoken_scale`` [1]), and ``input_scale`` [1] the same; or with
smooth scales f, which cost nothing here, ``input_scale[k] = s / f[k]``. Passing s per token keeps it and the
bias exact: AMCT's form of the call multiplies the scales into one that the operator packs, with 10 bits of
mantissa.

Dynamic: ``s[t] = max|x[t] · f| / 448``, for hifloat8 ``/ 15``: that format has four significant bits up to
16, and two at its maximum. ``npu_dynamic_quant`` takes 16-bit inputs; a float32 one is rounded to bfloat16
first, which keeps 8 significant bits of which 4 are left afterwards.

Source: documentation of npu_quantize, npu_dynamic_quant and npu_quant_matmul (torch_npu 2.13.0).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from npu_fusion._mergeable import mergeable
from npu_fusion.meta_impls._dtypes import HIFLOAT8, enum_value
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules._deployed import Spec, deployed
from npu_fusion.quantization.modules._description import DTYPES
from npu_fusion.quantization.modules._linear import (
    DeployedLinear,
    as_given,
    bias_fp32,
    doubled,
    dtype_or_none,
    flag,
    for_each_output,
)
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import FLOAT8_TYPES, Scheme

_npu = torch.ops.npu

CODES = {"float8_e4m3fn": torch.float8_e4m3fn, "hifloat8": torch.uint8}
"""Type -> dtype of the tensor that carries its codes."""
HIFLOAT8_TARGET = 15.0
"""What the largest magnitude of a token becomes in hifloat8."""


def result_number(type: str) -> int:
    """The operators' number of a type to quantize to."""
    return HIFLOAT8 if type == "hifloat8" else enum_value(torch.float8_e4m3fn)


def operand_number(type: str) -> int | None:
    """The operators' number of an operand's type, where its dtype does not say it."""
    return HIFLOAT8 if type == "hifloat8" else None


def takes_float8(scheme: Scheme, input_strategy: str) -> bool:
    weights, inputs = scheme.weights, scheme.inputs
    return (
        inputs is not None
        and weights.type in FLOAT8_TYPES
        and inputs.type == weights.type
        and weights.symmetric
        and inputs.symmetric
        and weights.strategy in ("tensor", "channel")
        and inputs.strategy == input_strategy
    )


class _Float8Linear(DeployedLinear):
    """What the two kinds have in common.

    Buffers: ``weight`` [out_features, in_features] in float8_e4m3fn, or uint8 (hifloat8); ``weight_scale``
    fp32 [out_features] (equal numbers where the scheme has one for the whole weight); ``bias`` fp32
    [out_features] or None.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        own: dict[str, Spec | None],
        device: torch.device | str | None,
        *,
        bias: bool,
        **options: object,
    ) -> None:
        specs = {
            "weight": Spec(CODES[scheme.weights.type], (out_features, in_features)),
            "weight_scale": Spec(torch.float32, (out_features,)),
            **own,
            "bias": Spec(torch.float32, (out_features,)) if bias else None,
        }
        super().__init__(in_features, out_features, scheme, specs, device, {"bias": bias, **options})

    def quantized_weight(self) -> QuantizedWeight:
        return as_given(self.scheme, self.weight, self.weight_scale)

    def give(self, layer: nn.Linear, weight: QuantizedWeight) -> None:
        """Fill what both kinds have."""
        self.fill(weight=weight.codes, weight_scale=for_each_output(weight), bias=bias_fp32(layer))

    def product(self, q: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        """``q`` [T, in_features] times the weight, with one ``scale`` or one for each row, like ``x``."""
        number = operand_number(self.scheme.weights.type)
        y = _npu.npu_quant_matmul(
            q,
            self.weight.t(),
            self.weight_scale,
            pertoken_scale=scale,
            bias=self.bias,
            output_dtype=enum_value(x.dtype),
            x1_dtype=number,
            x2_dtype=number,
        )
        return self.unrows(y, x)


@deployed
class Float8StaticLinear(_Float8Linear):
    """``y = x Wᵀ + b`` with 8-bit floats and a given scale of the input; see the module's docstring.

    Buffers besides: ``input_scale`` fp32, [1] or [in_features] (smoothing), ``pertoken_scale`` fp32 [1].

    Args:
        per_channel: the input has a scale for each channel.
    """

    kind = "float8_static_linear"
    shared = ("input_scale", "pertoken_scale")
    reads: ClassVar = {"bias": flag, "per_channel": flag}

    input_scale: Tensor
    pertoken_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool,
        per_channel: bool,
        device: torch.device | str | None = None,
    ) -> None:
        own: dict[str, Spec | None] = {
            "input_scale": Spec(torch.float32, (in_features if per_channel else 1,)),
            "pertoken_scale": Spec(torch.float32, (1,)),
        }
        super().__init__(in_features, out_features, scheme, own, device, bias=bias, per_channel=per_channel)

    @classmethod
    def takes(cls, scheme: Scheme) -> bool:
        return takes_float8(scheme, "tensor")

    @classmethod
    def of(
        cls,
        layer: nn.Linear,
        scheme: Scheme,
        weight: QuantizedWeight,
        inputs: InputParameters | None,
        smooth_scales: Tensor | None,
    ) -> Float8StaticLinear:
        assert inputs is not None
        made = cls.like(layer, scheme, bias=layer.bias is not None, per_channel=smooth_scales is not None)
        made.give(layer, weight)
        scale = inputs.scale
        made.fill(
            input_scale=scale if smooth_scales is None else scale / smooth_scales.float(),
            pertoken_scale=scale,
        )
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] in the dtype of ``x`` [..., in_features].

        Raises:
            ValueError: ``x`` is not float16, bfloat16 or float32, or its last size is not ``in_features``.
        """
        number = result_number(self.scheme.weights.type)
        q = _npu.npu_quantize(self.rows(x), self.input_scale, None, number, -1, True)
        return self.product(q, self.pertoken_scale, x)


@deployed
class Float8DynamicLinear(_Float8Linear):
    """``y = x Wᵀ + b`` with 8-bit floats and a scale for each token; see the module's docstring.

    Buffers besides: ``smooth_scales`` [in_features] or None.

    Args:
        smooth_scales: their dtype, or None.
    """

    kind = "float8_dynamic_linear"
    shared = ("smooth_scales",)
    reads: ClassVar = {"bias": flag, "smooth_scales": dtype_or_none(DTYPES)}

    smooth_scales: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool,
        smooth_scales: torch.dtype | None,
        device: torch.device | str | None = None,
    ) -> None:
        own = {"smooth_scales": None if smooth_scales is None else Spec(smooth_scales, (in_features,))}
        super().__init__(
            in_features, out_features, scheme, own, device, bias=bias, smooth_scales=smooth_scales
        )

    @classmethod
    def takes(cls, scheme: Scheme) -> bool:
        return takes_float8(scheme, "token")

    @classmethod
    def of(
        cls,
        layer: nn.Linear,
        scheme: Scheme,
        weight: QuantizedWeight,
        inputs: InputParameters | None,
        smooth_scales: Tensor | None,
    ) -> Float8DynamicLinear:
        dtype = None if smooth_scales is None else smooth_scales.dtype
        made = cls.like(layer, scheme, bias=layer.bias is not None, smooth_scales=dtype)
        made.give(layer, weight)
        made.fill(smooth_scales=smooth_scales)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] in the dtype of ``x`` [..., in_features].

        Raises:
            ValueError: ``x`` is not float16, bfloat16 or float32, or its last size is not ``in_features``.
        """
        rows = self.rows(x)
        if rows.dtype == torch.float32:
            rows = rows.to(torch.bfloat16)
        hifloat8 = self.scheme.weights.type == "hifloat8"
        q, scale = _npu.npu_dynamic_quant(
            rows,
            smooth_scales=self.smooth_scales,
            dst_type=result_number(self.scheme.weights.type),
            dst_type_max=HIFLOAT8_TARGET if hifloat8 else 0.0,
        )
        return self.product(q, scale, x)


mergeable(Float8StaticLinear, shared=Float8StaticLinear.shared)(doubled)
mergeable(Float8DynamicLinear, shared=Float8DynamicLinear.shared)(doubled)
