"""A linear layer with quantized weights and an input as it is.

::

    x [× smooth_scales] ─ npu_weight_quant_batchmatmul(weight, antiquant_scale, antiquant_offset, bias) ─ y

    w = (weight + antiquant_offset) · antiquant_scale        rounded to the dtype of x
    y = x w + b                                              fp32 sums, rounded to the dtype of x

All tensors have the outputs last, as the operator takes them without a transposition::

    =============  =========================  ==================================================
    weights.type   weight                     antiquant_scale (dtype of x, but for mxfp4)
    =============  =========================  ==================================================
    int8           int8 [K, N]                [N], or [ceil(K / group_size), N]
    int4           int32 [K, N/8]             [N], or [ceil(K / group_size), N]
    float8_e4m3fn  float8_e4m3fn [K, N]       [N]
    hifloat8       uint8 [K, N]               [N]
    float4_e2m1    int32 [K, N/8]             [ceil(K / group_size), N]
    float4_e1m2    uint8 [K, N/2]             [ceil(K / group_size), N]
    mxfp4_e2m1     int32 [K, N/8]             uint8 [ceil(K / 32), N], exponents + 127
    =============  =========================  ==================================================

Traps:

* The operator's scale has the dtype of x. A scale that is not rounded to it before the weight is divided by
  it costs up to one part in 512 (bfloat16): :meth:`WeightOnlyLinear.quantized_weight` has the rounded one.
* ``antiquant_offset`` is minus the zero point.
* Eight 4-bit floats travel in the bits of a float32, as ``npu_convert_weight_to_int4pack`` gives them. The
  buffer is int32 and viewed, because a float buffer would be converted by ``Module.half()``.
* The operator takes no float32 input. int4, which AMCT has for float32 models, is then dequantized by plain
  ATen operators and multiplied by ``torch.nn.functional.linear``, all in fp32.

Source: documentation of npu_weight_quant_batchmatmul (torch_npu 2.13.0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from npu_fusion._mergeable import mergeable
from npu_fusion.meta_impls._dtypes import FLOAT4_E1M2, HIFLOAT8
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules._deployed import Spec, deployed
from npu_fusion.quantization.modules._description import DTYPES
from npu_fusion.quantization.modules._linear import DeployedLinear, doubled, dtype_of, flag
from npu_fusion.quantization.modules._packing import (
    biased_exponents,
    pack_eight,
    pack_two,
    powers_of_two,
    unpack_eight,
    unpack_two,
)
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import INTEGER_TYPES, Scheme

_npu = torch.ops.npu


def _as_it_is(codes: Tensor) -> Tensor:
    return codes


@dataclass(frozen=True)
class _Form:
    """How a type of weights is stored and passed."""

    dtype: torch.dtype
    """Of the buffer."""
    per_element: int = 1
    pack: Callable[[Tensor], Tensor] = _as_it_is
    unpack: Callable[[Tensor], Tensor] = _as_it_is
    carrier: torch.dtype | None = None
    """As which the buffer is passed, where that is not its own dtype."""
    number: int | None = None
    """``weight_dtype`` of the operator."""


def _signed(packed: Tensor) -> Tensor:
    return unpack_eight(packed, True)


def _unsigned(packed: Tensor) -> Tensor:
    return unpack_eight(packed, False)


_FORMS = {
    "int8": _Form(torch.int8),
    "int4": _Form(torch.int32, 8, pack_eight, _signed),
    "float8_e4m3fn": _Form(torch.float8_e4m3fn),
    "hifloat8": _Form(torch.uint8, number=HIFLOAT8),
    "float4_e2m1": _Form(torch.int32, 8, pack_eight, _unsigned, carrier=torch.float32),
    "float4_e1m2": _Form(torch.uint8, 2, pack_two, unpack_two, number=FLOAT4_E1M2),
    "mxfp4_e2m1": _Form(torch.int32, 8, pack_eight, _unsigned, carrier=torch.float32),
}
_EIGHT_BITS = ("float8_e4m3fn", "hifloat8")
_FULL_PRECISION = ("int4",)
"""Types that float32 models have."""


@deployed
class WeightOnlyLinear(DeployedLinear):
    """``y = x Wᵀ + b`` with quantized weights; types, layouts and formula in the module's docstring.

    Buffers: ``weight`` and ``antiquant_scale`` as in the table; ``antiquant_offset`` of the shape and dtype
    of the scale, or None (symmetric); ``smooth_scales`` [K] in the dtype of x, or None; ``bias`` [N] or None,
    in the dtype of x, but fp32 for integer weights beside bfloat16.

    Smoothing is a product in the dtype of x before the operator, which has no argument for it.

    Args:
        dtype: of x.

    Raises:
        ValueError: ``out_features`` is no multiple of what one element of the weight holds, or a group holds
            all inputs (4-bit floats), or the operator does not take the dtype with these weights.
    """

    kind = "weight_only_linear"
    shared = ("smooth_scales",)
    reads: ClassVar = {"bias": flag, "dtype": dtype_of(DTYPES), "smooth_scales": flag}

    weight: Tensor
    antiquant_scale: Tensor
    antiquant_offset: Tensor | None
    smooth_scales: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool,
        dtype: torch.dtype,
        smooth_scales: bool,
        device: torch.device | str | None = None,
    ) -> None:
        weights = scheme.weights
        _check_sizes(in_features, out_features, scheme, dtype)
        form = _FORMS[weights.type]
        grouped = weights.group_size is not None
        groups = -(-in_features // weights.group_size) if weights.group_size is not None else 1
        scale = Spec(
            torch.uint8 if weights.type == "mxfp4_e2m1" else dtype,
            (groups, out_features) if grouped else (out_features,),
        )
        wide_bias = weights.type in INTEGER_TYPES and dtype == torch.bfloat16
        specs = {
            "weight": Spec(form.dtype, (in_features, out_features // form.per_element)),
            "antiquant_scale": scale,
            "antiquant_offset": None if weights.symmetric else scale,
            "smooth_scales": Spec(dtype, (in_features,)) if smooth_scales else None,
            "bias": Spec(torch.float32 if wide_bias else dtype, (out_features,)) if bias else None,
        }
        options = {"bias": bias, "dtype": dtype, "smooth_scales": smooth_scales}
        super().__init__(in_features, out_features, scheme, specs, device, options)
        self.dtypes = (dtype,)

    @classmethod
    def takes(cls, scheme: Scheme) -> bool:
        weights = scheme.weights
        if scheme.inputs is not None or weights.type not in _FORMS:
            return False
        if weights.type in INTEGER_TYPES:
            return True
        grouped = weights.strategy == "group"
        return weights.symmetric and grouped == (weights.type not in _EIGHT_BITS)

    @classmethod
    def of(
        cls,
        layer: nn.Linear,
        scheme: Scheme,
        weight: QuantizedWeight,
        inputs: InputParameters | None,
        smooth_scales: Tensor | None,
    ) -> WeightOnlyLinear:
        dtype = layer.weight.dtype
        made = cls.like(
            layer, scheme, bias=layer.bias is not None, dtype=dtype, smooth_scales=smooth_scales is not None
        )
        scale = (
            weight.scale.expand(layer.out_features) if scheme.weights.strategy == "tensor" else weight.scale
        )
        offset = weight.offset
        if offset is not None:
            offset = (-offset).expand(scale.shape).t().contiguous().to(dtype)
        scale = scale.t().contiguous()
        bias = made.bias
        made.fill(
            weight=_FORMS[scheme.weights.type].pack(weight.codes.t().contiguous()),
            antiquant_scale=biased_exponents(scale)
            if scheme.weights.type == "mxfp4_e2m1"
            else scale.to(dtype),
            antiquant_offset=offset,
            smooth_scales=smooth_scales,
            bias=None if bias is None else layer.bias.detach().to(bias.dtype, copy=True),
        )
        return made

    def quantized_weight(self) -> QuantizedWeight:
        weights = self.scheme.weights
        codes = _FORMS[weights.type].unpack(self.weight).t().contiguous()
        powers = self.antiquant_scale.dtype == torch.uint8
        scale = powers_of_two(self.antiquant_scale) if powers else self.antiquant_scale.float()
        offset = None if self.antiquant_offset is None else (-self.antiquant_offset).to(torch.int32)
        if weights.strategy == "tensor":
            return QuantizedWeight(weights, codes, scale[:1], None if offset is None else offset[:1])
        return QuantizedWeight(weights, codes, scale.t(), None if offset is None else offset.t())

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] in the dtype of ``x`` [..., in_features].

        Raises:
            ValueError: ``x`` is not of the dtype that the layer was made for, or its last size is not
                ``in_features``.
        """
        rows = self.rows(x)
        if self.smooth_scales is not None:
            rows = rows * self.smooth_scales
        if self.dtypes == (torch.float32,):
            y = torch.nn.functional.linear(rows, self._dequantized().t(), self.bias)
        else:
            form = _FORMS[self.scheme.weights.type]
            y = _npu.npu_weight_quant_batchmatmul(
                rows,
                self.weight if form.carrier is None else self.weight.view(form.carrier),
                self.antiquant_scale,
                self.antiquant_offset,
                bias=self.bias,
                antiquant_group_size=self.scheme.weights.group_size or 0,
                weight_dtype=form.number,
            )
        return self.unrows(y, x)

    def _dequantized(self) -> Tensor:
        """int4 [K, N] in fp32."""
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=self.weight.device)
        nibbles = (self.weight.unsqueeze(-1) >> shifts) & 0xF
        w = ((nibbles ^ 8) - 8).flatten(-2).float()
        if self.antiquant_offset is not None:
            w = w + self._for_rows(self.antiquant_offset)
        return w * self._for_rows(self.antiquant_scale)

    def _for_rows(self, parameter: Tensor) -> Tensor:
        """A scale or offset with a row for each row of the weight, or one that broadcasts over them."""
        size = self.scheme.weights.group_size
        if size is None:
            return parameter
        repeated = parameter.unsqueeze(1).expand(-1, size, -1).reshape(-1, self.out_features)
        return repeated[: self.in_features]


def _check_sizes(in_features: int, out_features: int, scheme: Scheme, dtype: torch.dtype) -> None:
    weights = scheme.weights
    form = _FORMS[weights.type]
    if dtype == torch.float32 and weights.type not in _FULL_PRECISION:
        raise ValueError(
            f"WeightOnlyLinear: dtype is float32 with {weights.type} weights; accepted: float16, bfloat16"
        )
    if out_features % form.per_element:
        raise ValueError(
            f"WeightOnlyLinear: out_features is {out_features} with {weights.type} weights; "
            f"accepted: a multiple of {form.per_element}"
        )
    float4 = form.per_element > 1 and weights.type not in INTEGER_TYPES
    size = weights.group_size
    if float4 and size is not None and (size % 32 or size >= in_features):
        raise ValueError(
            f"WeightOnlyLinear: group_size is {size} with {weights.type} weights and {in_features} inputs; "
            f"accepted: a multiple of 32 below the number of inputs"
        )


def _type(layer: WeightOnlyLinear) -> str:
    """What the shapes and dtypes of two layers do not tell."""
    weights = layer.scheme.weights
    return f"{weights.type} weights" + (f" in groups of {weights.group_size}" if weights.group_size else "")


mergeable(WeightOnlyLinear, shared=WeightOnlyLinear.shared, alike=_type, dim=-1)(doubled)
