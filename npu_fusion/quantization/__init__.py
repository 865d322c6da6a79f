"""Quantization of models in plain PyTorch, in the forms that the fusions recognize.

``quantize(model, config)``, calibration passes of the user, ``convert(model)``: see docs/quantization.md.
"""

from __future__ import annotations

from npu_fusion.quantization.api import Quantization, QuantizationWarning, convert, quantize
from npu_fusion.quantization.checkpoints import Loaded, load_checkpoint, load_model, save_checkpoint
from npu_fusion.quantization.config import QuantizationConfig, parse
from npu_fusion.quantization.modules import W8A8DynamicLinear, quantize_linears
from npu_fusion.quantization.presets import PRESETS
from npu_fusion.quantization.rules import Skipped
from npu_fusion.quantization.smoothing import get_act_scales, smooth
from npu_fusion.quantization.user_algorithms import BaseQuantizeModule, algorithm_register

__all__ = [
    "PRESETS",
    "BaseQuantizeModule",
    "Loaded",
    "Quantization",
    "QuantizationConfig",
    "QuantizationWarning",
    "Skipped",
    "W8A8DynamicLinear",
    "algorithm_register",
    "convert",
    "get_act_scales",
    "load_checkpoint",
    "load_model",
    "parse",
    "quantize",
    "quantize_linears",
    "save_checkpoint",
    "smooth",
]
