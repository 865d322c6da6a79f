"""Quantized layers."""

from __future__ import annotations

from npu_fusion.quantization.modules._deployed import Deployed, deploy, empty, share
from npu_fusion.quantization.modules.float8_float4_linear import Float8Float4Linear
from npu_fusion.quantization.modules.float8_linear import Float8DynamicLinear, Float8StaticLinear
from npu_fusion.quantization.modules.mx_linear import MXLinear
from npu_fusion.quantization.modules.quantized_conv2d import QuantizedConv2d
from npu_fusion.quantization.modules.w8a8_linear import W8A8DynamicLinear, quantize_linears, quantize_rows
from npu_fusion.quantization.modules.w8a8_static_linear import W8A8StaticLinear
from npu_fusion.quantization.modules.weight_only_linear import WeightOnlyLinear

__all__ = [
    "Deployed",
    "Float8DynamicLinear",
    "Float8Float4Linear",
    "Float8StaticLinear",
    "MXLinear",
    "QuantizedConv2d",
    "W8A8DynamicLinear",
    "W8A8StaticLinear",
    "WeightOnlyLinear",
    "deploy",
    "empty",
    "quantize_linears",
    "quantize_rows",
    "share",
]
