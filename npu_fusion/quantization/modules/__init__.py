"""Quantized layers."""

from __future__ import annotations

from npu_fusion.quantization.modules.w8a8_linear import W8A8DynamicLinear, quantize_linears, quantize_rows

__all__ = ["W8A8DynamicLinear", "quantize_linears", "quantize_rows"]
