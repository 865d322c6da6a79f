"""A convolution whose weights and inputs are 8-bit floats: float8_e4m3fn or hifloat8 (Ascend 950).

::

    x ─ npu_quantize(input_scale) ─ q ─ npu_quant_conv2d(weight, scale, bias, ..) ─ y

    y[b, o] = (conv2d(q, weight)[b, o] + bias[o]) · scale[o]        scale[o] = s · weight_scale[o]

in fp32, with one rounding to the dtype of x; s is the one scale of the input.

Traps:

* ``scale`` is the bit pattern of ``npu_trans_quant_param``, with 10 bits of mantissa. It is rounded to the
  nearest such number here (the operator that packs it cuts off), the bias is divided by that, and
  :meth:`QuantizedConv2d.quantized_weight` has the scales that are left.
* The bias comes before the scale.
* Padding is the same on both sides and of zeros: "same" with an even kernel is not.

Source: documentation of npu_quantize and npu_quant_conv2d (torch_npu 2.13.0).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from npu_fusion.kernels.reference._quant import pack_quant_param, unpack_quant_param
from npu_fusion.meta_impls._dtypes import enum_value
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules._deployed import Deployed, Spec, deployed
from npu_fusion.quantization.modules._description import DTYPES, Fields
from npu_fusion.quantization.modules.float8_linear import (
    CODES,
    operand_number,
    result_number,
    takes_float8,
)
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import Scheme

_npu = torch.ops.npu

Pair = tuple[int, int]


@deployed
class QuantizedConv2d(Deployed):
    """``y = conv2d(x, W) + b`` with 8-bit floats and a given scale of the input; see the module's docstring.

    Buffers: ``weight`` [out_channels, in_channels / groups, kh, kw] in float8_e4m3fn, or uint8 (hifloat8);
    ``scale`` int64 [out_channels]; ``input_scale`` fp32 [1]; ``bias`` fp32 [out_channels] or None.
    """

    kind = "quantized_conv2d"
    stands_for = nn.Conv2d
    shared = ("input_scale",)

    weight: Tensor
    scale: Tensor
    input_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        bias: bool,
        scheme: Scheme,
        *,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        device: torch.device | str | None = None,
    ) -> None:
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"QuantizedConv2d: groups is {groups} with {in_channels} input and {out_channels} output "
                f"channels; accepted: a divisor of both"
            )
        weight = (out_channels, in_channels // groups, *kernel_size)
        specs = {
            "weight": Spec(CODES[scheme.weights.type], weight),
            "scale": Spec(torch.int64, (out_channels,)),
            "input_scale": Spec(torch.float32, (1,)),
            "bias": Spec(torch.float32, (out_channels,)) if bias else None,
        }
        super().__init__(scheme, specs, device)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    @classmethod
    def takes(cls, scheme: Scheme) -> bool:
        return takes_float8(scheme, "tensor")

    @classmethod
    def of(
        cls,
        layer: nn.Conv2d,
        scheme: Scheme,
        weight: QuantizedWeight,
        inputs: InputParameters | None,
        smooth_scales: Tensor | None,
    ) -> QuantizedConv2d:
        assert inputs is not None
        if layer.padding_mode != "zeros":
            raise ValueError(f"deploy: padding_mode is {layer.padding_mode!r}; accepted: 'zeros'")
        made = cls(
            layer.in_channels,
            layer.out_channels,
            _pair(layer.kernel_size),
            layer.bias is not None,
            scheme,
            stride=_pair(layer.stride),
            padding=symmetric_padding(layer),
            dilation=_pair(layer.dilation),
            groups=layer.groups,
            device="meta",
        )
        packed = pack_quant_param((inputs.scale * weight.scale).expand(layer.out_channels), rounded=True)
        bias = None if layer.bias is None else layer.bias.detach().float() / unpack_quant_param(packed)[0]
        codes = weight.codes.unflatten(1, tuple(layer.weight.shape[1:]))
        made.fill(weight=codes, scale=packed, input_scale=inputs.scale, bias=bias)
        return made

    @classmethod
    def read(cls, fields: Fields, scheme: Scheme) -> QuantizedConv2d:
        return cls(
            fields.size("in_channels"),
            fields.size("out_channels"),
            fields.pair("kernel_size", 1),
            fields.take("bias", bool),
            scheme,
            stride=fields.pair("stride", 1),
            padding=fields.pair("padding", 0),
            dilation=fields.pair("dilation", 1),
            groups=fields.size("groups"),
        )

    def settings(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": [*self.kernel_size],
            "bias": self.bias is not None,
            "stride": [*self.stride],
            "padding": [*self.padding],
            "dilation": [*self.dilation],
            "groups": self.groups,
        }

    def quantized_weight(self) -> QuantizedWeight:
        scale = unpack_quant_param(self.scale)[0] / self.input_scale
        weights = self.scheme.weights
        codes = self.weight.flatten(1)
        return QuantizedWeight(weights, codes, scale[:1] if weights.strategy == "tensor" else scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [B, out_channels, Ho, Wo] in the dtype of ``x`` [B, in_channels, H, W]; without B, too.

        Raises:
            ValueError: ``x`` is not float16, bfloat16 or float32, or has not ``in_channels`` channels.
        """
        if x.dtype not in DTYPES:
            accepted = ", ".join(map(str, DTYPES))
            raise ValueError(f"QuantizedConv2d: x has dtype {x.dtype}; accepted: {accepted}")
        if x.dim() not in (3, 4) or x.size(-3) != self.in_channels:
            raise ValueError(
                f"QuantizedConv2d: x has shape {list(x.shape)}; "
                f"accepted: [B, {self.in_channels}, H, W] or [{self.in_channels}, H, W]"
            )
        images = x if x.dim() == 4 else x.unsqueeze(0)
        type = self.scheme.weights.type
        q = _npu.npu_quantize(images, self.input_scale, None, result_number(type), 1, True)
        number = operand_number(type)
        # By position: the converter of torchair has another name for one of the last two.
        y = _npu.npu_quant_conv2d(
            q,
            self.weight,
            self.scale,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            0,
            "rint",
            enum_value(x.dtype),
            self.bias,
            None,
            number,
            number,
        )
        return y if x.dim() == 4 else y.squeeze(0)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}"
        )


def symmetric_padding(layer: nn.Conv2d) -> Pair:
    """Rows and columns of zeros on each side.

    Raises:
        ValueError: it is "same" and another number on the two sides.
    """
    if not isinstance(layer.padding, str):
        return _pair(layer.padding)
    if layer.padding == "valid":
        return 0, 0
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if any(t % 2 for t in total):
        raise ValueError(
            f"deploy: padding is 'same' with kernel_size {layer.kernel_size}; accepted: as much on both sides"
        )
    return total[0] // 2, total[1] // 2


def _pair(sizes: tuple[int, ...]) -> Pair:
    first, second = sizes
    return first, second
