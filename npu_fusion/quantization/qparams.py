"""Scales and zero points, and rounding to nearest with them: the rules that every algorithm starts from.

In fp32, whatever the dtype of the model, and with ``max`` and ``min`` over the tensor, the row or the group::

    b = max(|max|, |min|)
    int, symmetric    scale = b / (2^(bits-1) - 1) if |max| >= |min| else b / 2^(bits-1)
    int, asymmetric   scale = (max - min) / (2^bits - 1),  offset = round(-2^(bits-1) - min / scale),
                      where max and min are made to include 0
    float             scale = b / scope: 448 float8_e4m3fn, 6 float4_e2m1, 1.75 float4_e1m2, 16 hifloat8
    mx                scale = 2^e for 32 neighbours, e = npu_fusion.formats.mx.shared_exponent
    two levels        float4_e2m1 beside float8_e4m3fn inputs: channel_scale = b(row) / 384, and scale = the
                      number nearest to b(group) / channel_scale / 6 whose products are float8_e4m3fn
                      (npu_fusion.quantization.inner_scale)

    codes = round_to_type(w / scale + offset)

The rules are those of Huawei's AMCT (documents of the project hicann/amct). Both weights and calibrated
inputs follow them.

Traps:

* Negative values count. A scale from the signed maximum (as in one of AMCT's paths) is wrong for every row
  whose largest magnitude is negative.
* hifloat8's scope is 16, not its maximum of 32768: that is where it has four significant bits.
* A scale below 1.19e-7 (fp32's eps) becomes 1, so all-zero rows give zeros and never NaN. For mx types only
  all-zero blocks do, whose power of two is free.
* The offset is added before the rounding, as ``npu_quantize`` does; ties then go another way than with
  ``round(w / scale) + offset``.
* The last group is partial if ``group_size`` does not divide K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion import formats
from npu_fusion.quantization.inner_scale import LARGEST, nearest_inner_scale
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import (
    INTEGER_TYPES,
    MX_BLOCK,
    MX_TYPES,
    WEIGHT_TYPES,
    InputScheme,
    WeightScheme,
)
from npu_fusion.quantization.statistics import Statistics

INTEGER_BITS = {"int8": 8, "int4": 4}
FLOAT_SCOPE = {"float8_e4m3fn": 448.0, "hifloat8": 16.0, "float4_e2m1": 6.0, "float4_e1m2": 1.75}
"""What the largest magnitude is scaled to."""

_SMALLEST_SCALE = torch.finfo(torch.float32).eps
_LARGEST_BOUND = torch.finfo(torch.float32).max / 2
"""Magnitudes beyond are treated as this one, so that neither max - min nor code * scale overflows."""


def integer_parameters(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scale (fp32) and offset (int32; None if symmetric) of signed integers for ``low`` to ``high``.

    Args:
        low, high: of one shape, which is that of the results. NaN is taken as 0, infinity as a huge value.
        bits: at least 2.
    """
    low, high = _bounded(low).clamp(max=0), _bounded(high).clamp(min=0)
    half = 2 ** (bits - 1)
    if symmetric:
        bound = torch.maximum(high, -low)
        return _no_tiny(torch.where(high >= -low, bound / (half - 1), bound / half)), None
    scale = _no_tiny((high - low) / (2 * half - 1))
    return scale, (-half - low / scale).round().clamp(-half, half - 1).to(torch.int32)


def float_scale(bound: Tensor, type: str) -> Tensor:
    """The fp32 scale of a float type for magnitudes up to ``bound``; mx types: of one block each."""
    bound = _bounded(bound)
    if type in MX_TYPES:
        exponent = formats.mx.shared_exponent(bound, formats.ELEMENT[type])
        return torch.ldexp(torch.ones_like(bound), exponent.masked_fill(bound == 0, 0))
    return _no_tiny(bound / FLOAT_SCOPE[type])


def weight_range(weight: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each tensor, channel or group of ``weight`` [N, K].

    Both in the shape of ``QuantizedWeight.scale``. A partial last group counts as filled up with zeros.

    Raises:
        ValueError: the weight is not [N, K] with something in it, or has infinities or NaN; or the scheme is
            none (an unknown type, groups without a size, mx types without groups of 32, asymmetric floats).
    """
    check_scheme(scheme)
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}; accepted: [N, K], not empty")
    weight = weight.float()
    if scheme.strategy == "tensor":
        low, high = (extreme.unsqueeze(0) for extreme in torch.aminmax(weight))
    elif scheme.strategy == "channel":
        low, high = torch.aminmax(weight, dim=1)
    else:
        low, high = torch.aminmax(in_groups(weight, scheme), dim=2)
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ValueError("weight has infinities or NaN; accepted: finite values")
    return low, high


def range_parameters(
    low: Tensor, high: Tensor, scheme: WeightScheme, bits: int | None = None, inner: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Scale and offset of weights between ``low`` and ``high``, see :func:`weight_range`.

    Args:
        bits: here and below: of integers, if fewer than the type has.
        inner: the weights have been divided by a channel scale.
    """
    if scheme.type in INTEGER_TYPES:
        return integer_parameters(low, high, bits or INTEGER_BITS[scheme.type], scheme.symmetric)
    scale = float_scale(torch.maximum(low.abs(), high.abs()), scheme.type)
    return nearest_inner_scale(scale) if inner else scale, None


def weight_parameters(
    weight: Tensor, scheme: WeightScheme, bits: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale (fp32) and offset (int32 or None) of a weight [N, K], in the shape of ``QuantizedWeight.scale``.

    Raises ``ValueError`` as :func:`weight_range` does.
    """
    return range_parameters(*weight_range(weight, scheme), scheme, bits)


def two_levels(weights: WeightScheme, inputs: InputScheme | None) -> bool:
    """Has the weight a scale for each channel beside that for each group?"""
    return weights.type == "float4_e2m1" and inputs is not None and inputs.type == "float8_e4m3fn"


def all_parameters(
    weight: Tensor, scheme: WeightScheme, inputs: InputScheme | None = None, bits: int | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scale, offset and channel scale (or None) of a weight [N, K] beside inputs of a scheme."""
    if not two_levels(scheme, inputs):
        return *weight_parameters(weight, scheme, bits), None
    low, high = weight_range(weight, WeightScheme(scheme.type))
    channel_scale = _no_tiny(_bounded(torch.maximum(-low, high)) / LARGEST)
    low, high = weight_range(weight.float() / channel_scale.unsqueeze(1), scheme)
    return *range_parameters(low, high, scheme, inner=True), channel_scale


def encode_weight(
    weight: Tensor,
    scheme: WeightScheme,
    scale: Tensor,
    offset: Tensor | None = None,
    channel_scale: Tensor | None = None,
    bits: int | None = None,
) -> QuantizedWeight:
    """Round a weight [N, K] to nearest with given parameters; what is out of range saturates.

    Args:
        scale, offset: in the shape of ``QuantizedWeight.scale``.
        channel_scale: fp32 [N] or None.
    """
    columns = weight.size(1)
    quotient = weight.float() / spread(step(scale, channel_scale), scheme, columns)
    if offset is not None:
        quotient = quotient + spread(offset, scheme, columns)
    codes = encode_numbers(quotient, scheme.type, bits)
    return QuantizedWeight(scheme, codes, scale, offset, channel_scale)


def round_to_nearest(
    weight: Tensor, scheme: WeightScheme, inputs: InputScheme | None = None, bits: int | None = None
) -> QuantizedWeight:
    """Quantize a weight [N, K] with the parameters of its own range.

    ``inputs`` decides between one and two levels of scales (float4_e2m1 beside float8_e4m3fn inputs). Raises
    ``ValueError`` as :func:`weight_range` does.
    """
    return encode_weight(weight, scheme, *all_parameters(weight, scheme, inputs, bits), bits)


def step(scale: Tensor, channel_scale: Tensor | None) -> Tensor:
    """What a number of the type is worth: both levels of scales in one, in the shape of ``scale``."""
    if channel_scale is None:
        return scale
    return scale * (channel_scale if scale.dim() == 1 else channel_scale.unsqueeze(1))


def spread(parameter: Tensor, scheme: WeightScheme, columns: int) -> Tensor:
    """A scale or an offset in a form that broadcasts over a weight [N, columns]."""
    if parameter.dim() == 1:
        return parameter.unsqueeze(1)
    assert scheme.group_size is not None, "a parameter for each group has a group_size"
    return parameter.repeat_interleave(scheme.group_size, dim=1)[:, :columns]


def in_groups(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """A weight [N, K] as [N, groups, group_size], the last group filled up with zeros."""
    assert scheme.group_size is not None, "the strategy is 'group'"
    missing = -weight.size(1) % scheme.group_size
    if missing:
        weight = torch.nn.functional.pad(weight, (0, missing))
    return weight.unflatten(1, (-1, scheme.group_size))


def nearest_numbers(x: Tensor, type: str, bits: int | None = None) -> Tensor:
    """The numbers of a type that are nearest to ``x``, fp32; saturating. Ties as the type has them."""
    if type in INTEGER_TYPES:
        half = 2 ** ((bits or INTEGER_BITS[type]) - 1)
        return x.round().clamp(-half, half - 1)
    return formats.decode(formats.encode(x, type), type)


def encode_numbers(x: Tensor, type: str, bits: int | None = None) -> Tensor:
    """The codes (see ``QuantizedWeight.codes``) of the numbers of a type that are nearest to ``x``."""
    if type in INTEGER_TYPES:
        return nearest_numbers(x, type, bits).to(torch.int8)
    return formats.encode(x, type)


def input_parameters(
    statistics: Statistics, scheme: InputScheme, smooth_scales: Tensor | None = None
) -> InputParameters:
    """The calibrated parameters of an input, from the range of its channels.

    Args:
        smooth_scales: [K], what the input is multiplied by before it is quantized.

    Channels whose range is not finite (an overflow in the model, or a layer that never ran) do not count.

    Raises:
        ValueError: the scheme is a dynamic one.
    """
    if scheme.dynamic:
        raise ValueError(
            f"input_parameters: inputs.strategy is {scheme.strategy!r}; accepted: 'tensor' (the others have "
            "their scales at run time)"
        )
    low, high = statistics.low.float(), statistics.high.float()
    known = low.isfinite() & high.isfinite()
    if smooth_scales is not None:
        low, high = low * smooth_scales.float(), high * smooth_scales.float()
    low = low.masked_fill(~known, 0).amin().clamp(max=0).unsqueeze(0)
    high = high.masked_fill(~known, 0).amax().clamp(min=0).unsqueeze(0)
    if scheme.type in INTEGER_TYPES:
        return InputParameters(*integer_parameters(low, high, INTEGER_BITS[scheme.type], scheme.symmetric))
    return InputParameters(float_scale(torch.maximum(-low, high), scheme.type))


def quantize_dequantize(x: Tensor, type: str, parameters: InputParameters) -> Tensor:
    """What is left of an input once it has been quantized with static parameters; fp32, any shape."""
    quotient = x.float() / parameters.scale
    if parameters.offset is None:
        return nearest_numbers(quotient, type) * parameters.scale
    return (nearest_numbers(quotient + parameters.offset, type) - parameters.offset) * parameters.scale


def check_scheme(scheme: WeightScheme) -> None:
    """Raise ``ValueError`` for a scheme that describes no weight."""
    if scheme.type not in WEIGHT_TYPES:
        raise ValueError(f"weights.type is {scheme.type!r}; accepted: {', '.join(WEIGHT_TYPES)}")
    if scheme.strategy not in ("tensor", "channel", "group"):
        raise ValueError(f"weights.strategy is {scheme.strategy!r}; accepted: tensor, channel, group")
    size = scheme.group_size
    if (size is not None) != (scheme.strategy == "group") or (size is not None and size < 1):
        raise ValueError(
            f"weights.group_size is {size} with strategy {scheme.strategy!r}; accepted: "
            "at least 1 with 'group', None with others"
        )
    if scheme.type in MX_TYPES and size != MX_BLOCK:
        raise ValueError(
            f"weights.group_size is {size} for {scheme.type}; accepted: {MX_BLOCK} with strategy 'group'"
        )
    if not scheme.symmetric and scheme.type not in INTEGER_TYPES:
        raise ValueError(
            f"weights.symmetric is False for {scheme.type}; accepted: True (floats have no offset)"
        )


def _bounded(x: Tensor) -> Tensor:
    return x.float().nan_to_num(nan=0.0).clamp(-_LARGEST_BOUND, _LARGEST_BOUND)


def _no_tiny(scale: Tensor) -> Tensor:
    return torch.where(scale < _SMALLEST_SCALE, 1.0, scale)
