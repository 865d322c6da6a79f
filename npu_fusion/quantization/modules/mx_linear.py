"""Linear layers in mx types: blocks of 32 neighbours along K share a power of two (Ascend 950).

::

    x [× smooth_scales] ─ npu_dynamic_mx_quant ─ q ─ npu_quant_matmul(weight, weight_scale, ..) ─ y
                                       └── one power of two for each block ──┘

    y[t, n] = Σₖ q[t, k] · 2^ex[t, k // 32] · weight[n, k] · 2^ew[n, k // 32] + b[n]

in fp32, with one rounding to the dtype of x. Inputs are mxfp8_e4m3fn, their exponents the OCP ones
(``floor(log2(amax)) - 8``), whatever rule the weight's were made by; weights are mxfp8_e4m3fn or mxfp4_e2m1.

Layouts, outputs first, transposed as views in the forward (the operator wants weight and scales to be
transposed both or neither)::

    weight          float8_e4m3fn [N, K], or uint8 [N, K/2] with the even k in the low nibble
    weight_scale    uint8 [N, ceil(K / 64), 2]: exponents + 127 in pairs; an odd number of blocks ends in a 0

Traps: with mxfp4 weights the operator takes a bias of the dtype of the result, otherwise an fp32 one. It has
no argument for smoothing, which is a product in the dtype of x here.

Source: documentation of npu_dynamic_mx_quant and npu_quant_matmul (torch_npu 2.13.0); the OCP specification
of microscaling formats.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npu_fusion._mergeable import mergeable
from npu_fusion.meta_impls._dtypes import E8M0, FLOAT4_E2M1, enum_value
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules._deployed import Spec, deployed
from npu_fusion.quantization.modules._description import dtype_name
from npu_fusion.quantization.modules._linear import DeployedLinear, doubled, dtype_of, flag
from npu_fusion.quantization.modules._packing import biased_exponents, pack_two, powers_of_two, unpack_two
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import MX_BLOCK, MX_TYPES, Scheme

_npu = torch.ops.npu

DTYPES = (torch.float16, torch.bfloat16)
_PAIR = 2 * MX_BLOCK


@deployed
class MXLinear(DeployedLinear):
    """``y = x Wᵀ + b`` in mx types; formula and layouts in the module's docstring.

    Buffers: ``weight``, ``weight_scale``; ``smooth_scales`` [in_features] in the dtype of x, or None;
    ``bias`` [out_features] or None, fp32, or of the dtype of x beside mxfp4 weights.

    Args:
        dtype: of x, float16 or bfloat16.

    Raises:
        ValueError: another dtype; with mxfp4 weights, ``in_features`` that is no multiple of 8 (the
            operator's alignment).
    """

    kind = "mx_linear"
    shared = ("smooth_scales",)
    reads: ClassVar = {"bias": flag, "dtype": dtype_of(DTYPES), "smooth_scales": flag}

    weight: Tensor
    weight_scale: Tensor
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
        mxfp4 = scheme.weights.type == "mxfp4_e2m1"
        if dtype not in DTYPES:
            raise ValueError(f"MXLinear: dtype is {dtype_name(dtype)}; accepted: float16, bfloat16")
        if mxfp4 and in_features % 8:
            raise ValueError(
                f"MXLinear: in_features is {in_features} with mxfp4 weights; accepted: a multiple of 8"
            )
        weight = (out_features, in_features // 2 if mxfp4 else in_features)
        specs = {
            "weight": Spec(torch.uint8 if mxfp4 else torch.float8_e4m3fn, weight),
            "weight_scale": Spec(torch.uint8, (out_features, -(-in_features // _PAIR), 2)),
            "smooth_scales": Spec(dtype, (in_features,)) if smooth_scales else None,
            "bias": Spec(dtype if mxfp4 else torch.float32, (out_features,)) if bias else None,
        }
        options = {"bias": bias, "dtype": dtype, "smooth_scales": smooth_scales}
        super().__init__(in_features, out_features, scheme, specs, device, options)
        self.dtypes = (dtype,)

    @classmethod
    def takes(cls, scheme: Scheme) -> bool:
        weights, inputs = scheme.weights, scheme.inputs
        return (
            inputs is not None
            and weights.type in MX_TYPES
            and (weights.strategy, weights.group_size, weights.symmetric) == ("group", MX_BLOCK, True)
            and (inputs.type, inputs.strategy, inputs.symmetric) == ("mxfp8_e4m3fn", "group", True)
        )

    @classmethod
    def of(
        cls,
        layer: nn.Linear,
        scheme: Scheme,
        weight: QuantizedWeight,
        inputs: InputParameters | None,
        smooth_scales: Tensor | None,
    ) -> MXLinear:
        made = cls.like(
            layer,
            scheme,
            bias=layer.bias is not None,
            dtype=layer.weight.dtype,
            smooth_scales=smooth_scales is not None,
        )
        exponents = biased_exponents(weight.scale)
        odd = exponents.size(1) % 2
        bias = made.bias
        made.fill(
            weight=pack_two(weight.codes) if scheme.weights.type == "mxfp4_e2m1" else weight.codes,
            weight_scale=F.pad(exponents, (0, odd)).unflatten(1, (-1, 2)).contiguous(),
            smooth_scales=smooth_scales,
            bias=None if bias is None else layer.bias.detach().to(bias.dtype, copy=True),
        )
        return made

    def quantized_weight(self) -> QuantizedWeight:
        scheme = self.scheme.weights
        blocks = -(-self.in_features // MX_BLOCK)
        scale = powers_of_two(self.weight_scale.flatten(1)[:, :blocks])
        codes = unpack_two(self.weight) if scheme.type == "mxfp4_e2m1" else self.weight
        return QuantizedWeight(scheme, codes, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] in the dtype of ``x`` [..., in_features].

        Raises:
            ValueError: ``x`` is not of the dtype that the layer was made for, or its last size is not
                ``in_features``.
        """
        rows = self.rows(x)
        if self.smooth_scales is not None:
            rows = rows * self.smooth_scales
        mxfp4 = self.scheme.weights.type == "mxfp4_e2m1"
        q, scale = _npu.npu_dynamic_mx_quant(
            rows, axis=-1, round_mode="rint", dst_type=enum_value(torch.float8_e4m3fn), block_size=MX_BLOCK
        )
        y = _npu.npu_quant_matmul(
            q,
            self.weight.t(),
            self.weight_scale.transpose(0, 1),
            pertoken_scale=scale,
            bias=self.bias.unsqueeze(0) if mxfp4 and self.bias is not None else self.bias,
            output_dtype=enum_value(x.dtype),
            x2_dtype=FLOAT4_E2M1 if mxfp4 else None,
            pertoken_scale_dtype=E8M0,
            scale_dtype=E8M0,
            group_sizes=[1, 1, MX_BLOCK],
        )
        return self.unrows(y, x)


mergeable(MXLinear, shared=MXLinear.shared)(doubled)
