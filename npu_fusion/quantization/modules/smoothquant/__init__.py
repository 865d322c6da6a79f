"""The layers of SmoothQuant's and torch_int's code, by their names: fake quantization and real int8.

Smoothing itself is :mod:`npu_fusion.quantization.smoothing`. The layers that ``npu_fusion.convert`` makes are
:class:`npu_fusion.quantization.modules.Deployed`; those here are for models that are put together by hand.
"""

from __future__ import annotations

from npu_fusion.quantization.modules.smoothquant.fake_linear import W8A8Linear
from npu_fusion.quantization.modules.smoothquant.fake_model import quantize_model
from npu_fusion.quantization.modules.smoothquant.fake_quantization import (
    quantize_activation_per_tensor_absmax,
    quantize_activation_per_token_absmax,
    quantize_weight_per_channel_absmax,
    quantize_weight_per_tensor_absmax,
)
from npu_fusion.quantization.modules.smoothquant.float_output_linear import W8A8BFP32OFP32Linear
from npu_fusion.quantization.modules.smoothquant.int8_output_linear import W8A8B8O8Linear, W8A8B8O8LinearReLU
from npu_fusion.quantization.modules.smoothquant.llm_int8_linear import LLMInt8Linear
from npu_fusion.quantization.modules.smoothquant.llm_int8_model import split_outliers
from npu_fusion.quantization.modules.smoothquant.requantization import (
    quantize_static,
    requant_scale,
    requantize,
)
from npu_fusion.quantization.modules.smoothquant.weight_only_linear import W8A16Linear

__all__ = [
    "LLMInt8Linear",
    "W8A8B8O8Linear",
    "W8A8B8O8LinearReLU",
    "W8A8BFP32OFP32Linear",
    "W8A8Linear",
    "W8A16Linear",
    "quantize_activation_per_tensor_absmax",
    "quantize_activation_per_token_absmax",
    "quantize_model",
    "quantize_static",
    "quantize_weight_per_channel_absmax",
    "quantize_weight_per_tensor_absmax",
    "requant_scale",
    "requantize",
    "split_outliers",
]
