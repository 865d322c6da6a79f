"""Quantization of models in plain PyTorch, in the forms that the fusions recognize."""

from __future__ import annotations

from npu_fusion.quantization.modules import W8A8DynamicLinear, quantize_linears

__all__ = ["W8A8DynamicLinear", "quantize_linears"]
