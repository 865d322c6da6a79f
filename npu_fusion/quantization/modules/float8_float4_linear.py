"""A linear layer with float8_e4m3fn inputs and float4_e2m1 weights under two levels of scales (Ascend 950).

::

    x ─ npu_quantize(input_scale) ─ q ─ npu_quant_matmul(weight, weight_scale, y_scale=..) ─ y

    w[n, k] = e4m3(weight[n, k] · weight_scale[n, k // 32])      the inner scale, of blocks
    y[t, n] = (Σₖ q[t, k] · w[n, k]) · y_scale[n]                y_scale[n] = s · channel_scale[n]

with s the scale of the input; the sum is in fp32, rounded once to the dtype of x. The operator has no bias.

Traps:

* The inner product is ROUNDED TO float8_e4m3fn, because two such matrices are multiplied. It is exact where
  the inner scale is one of those in ``npu_fusion.quantization.inner_scale``; another would change weights by
  up to one part in 16 without a sign of it, and is refused.
* ``y_scale`` is the bit pattern of ``npu_trans_quant_param``, with 10 bits of mantissa: it is rounded to the
  nearest such number, and :meth:`Float8Float4Linear.quantized_weight` has the channel scales that are left.
* The operator's groups have 32 inputs. A scale of a larger group is given once for each 32 of it.

Source: documentation of npu_quantize and npu_quant_matmul (torch_npu 2.13.0), and the operator's reference
computation.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from npu_fusion import formats
from npu_fusion._mergeable import mergeable
from npu_fusion.kernels.reference._quant import pack_quant_param, unpack_quant_param
from npu_fusion.meta_impls._dtypes import FLOAT4_E2M1, enum_value
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules._deployed import Spec, deployed
from npu_fusion.quantization.modules._description import dtype_name
from npu_fusion.quantization.modules._linear import DeployedLinear, doubled, dtype_of, flag
from npu_fusion.quantization.modules._packing import pack_two, unpack_two
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import Scheme

_npu = torch.ops.npu

GROUP = 32
DTYPES = (torch.float16, torch.bfloat16)


@deployed
class Float8Float4Linear(DeployedLinear):
    """``y = x Wᵀ`` with fp8 inputs and fp4 weights; formula and traps in the module's docstring.

    Buffers: ``weight`` uint8 [out_features, in_features / 2], the even k in the low nibble; ``weight_scale``
    [out_features, in_features / 32] in the dtype of x; ``y_scale`` int64 [out_features]; ``input_scale``
    fp32, [1] or [in_features] (smoothing); ``pertoken_scale`` fp32 [1], s itself.

    Args:
        dtype: of x, float16 or bfloat16.
        per_channel: the input has a scale for each channel.

    Raises:
        ValueError: another dtype, or ``in_features`` that is no multiple of 32.
    """

    kind = "float8_float4_linear"
    shared = ("input_scale", "pertoken_scale")
    reads: ClassVar = {"dtype": dtype_of(DTYPES), "per_channel": flag}

    weight: Tensor
    weight_scale: Tensor
    y_scale: Tensor
    input_scale: Tensor
    pertoken_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        dtype: torch.dtype,
        per_channel: bool,
        device: torch.device | str | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"Float8Float4Linear: dtype is {dtype_name(dtype)}; accepted: float16, bfloat16")
        if in_features % GROUP:
            raise ValueError(
                f"Float8Float4Linear: in_features is {in_features}; accepted: a multiple of {GROUP}"
            )
        specs = {
            "weight": Spec(torch.uint8, (out_features, in_features // 2)),
            "weight_scale": Spec(dtype, (out_features, in_features // GROUP)),
            "y_scale": Spec(torch.int64, (out_features,)),
            "input_scale": Spec(torch.float32, (in_features if per_channel else 1,)),
            "pertoken_scale": Spec(torch.float32, (1,)),
        }
        options = {"dtype": dtype, "per_channel": per_channel}
        super().__init__(in_features, out_features, scheme, specs, device, options)
        self.dtypes = (dtype,)

    @classmethod
    def takes(cls, scheme: Scheme) -> bool:
        weights, inputs = scheme.weights, scheme.inputs
        return (
            inputs is not None
            and (weights.type, weights.strategy) == ("float4_e2m1", "group")
            and weights.symmetric
            and weights.group_size is not None
            and weights.group_size % GROUP == 0
            and (inputs.type, inputs.strategy, inputs.symmetric) == ("float8_e4m3fn", "tensor", True)
        )

    @classmethod
    def of(
        cls,
        layer: nn.Linear,
        scheme: Scheme,
        weight: QuantizedWeight,
        inputs: InputParameters | None,
        smooth_scales: Tensor | None,
    ) -> Float8Float4Linear:
        assert inputs is not None
        if layer.bias is not None:
            raise ValueError(
                "deploy: layer has a bias; accepted: none with float4_e2m1 weights and fp8 inputs"
            )
        if weight.channel_scale is None:
            raise ValueError("deploy: weight.channel_scale is None; accepted: a tensor, beside fp8 inputs")
        made = cls.like(layer, scheme, dtype=layer.weight.dtype, per_channel=smooth_scales is not None)
        if not bool(_is_exact(weight.scale, layer.weight.dtype).all()):
            raise ValueError(
                "deploy: weight.scale has numbers with which the operator rounds weights to float8_e4m3fn; "
                "accepted: 1, 1.25 or 1.5 times a power of two from 2**-6 to 64 (nearest_inner_scale)"
            )
        scale = inputs.scale
        made.fill(
            weight=pack_two(weight.codes),
            weight_scale=_of_blocks(weight, layer.in_features).to(layer.weight.dtype),
            y_scale=pack_quant_param(scale * weight.channel_scale, rounded=True),
            input_scale=scale if smooth_scales is None else scale / smooth_scales.float(),
            pertoken_scale=scale,
        )
        return made

    def quantized_weight(self) -> QuantizedWeight:
        channel_scale = unpack_quant_param(self.y_scale)[0] / self.pertoken_scale
        assert self.scheme.weights.group_size is not None
        return QuantizedWeight(
            self.scheme.weights,
            unpack_two(self.weight),
            self.weight_scale[:, :: self.scheme.weights.group_size // GROUP].float(),
            channel_scale=channel_scale,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] in the dtype of ``x`` [..., in_features].

        Raises:
            ValueError: ``x`` is not of the dtype that the layer was made for, or its last size is not
                ``in_features``.
        """
        number = enum_value(torch.float8_e4m3fn)
        q = _npu.npu_quantize(self.rows(x), self.input_scale, None, number, -1, True)
        y = _npu.npu_quant_matmul(
            q,
            self.weight.t(),
            self.weight_scale,
            output_dtype=enum_value(x.dtype),
            x2_dtype=FLOAT4_E2M1,
            group_sizes=[0, 0, GROUP],
            y_scale=self.y_scale.unsqueeze(0),
        )
        return self.unrows(y, x)


def _of_blocks(weight: QuantizedWeight, columns: int) -> Tensor:
    """The scale of each block of 32, which is what the operator takes; of larger groups it is repeated."""
    size = weight.scheme.group_size
    assert size is not None
    return weight.scale.repeat_interleave(size // GROUP, dim=1)[:, : columns // GROUP].contiguous()


def _is_exact(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether the operator multiplies the numbers of a block by exactly this scale."""
    numbers = formats.decode(torch.arange(8, dtype=torch.uint8, device=scale.device), "float4_e2m1")
    products = scale.unsqueeze(-1) * numbers
    kept = formats.decode(formats.encode(products, "float8_e4m3fn"), "float8_e4m3fn")
    return (kept == products).all(-1) & (scale.to(dtype).float() == scale)


mergeable(Float8Float4Linear, shared=Float8Float4Linear.shared)(doubled)
