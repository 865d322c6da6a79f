"""Convolutions: a small CNN over scikit-learn's digits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from npu_fusion.quantization.modules.quantized_conv2d import QuantizedConv2d
from tests.quantization._digits import accuracy, digits_cnn, quantized_cnn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("kind", ["hifloat8", "float8_e4m3fn"])
def test_accuracy_stays_within_a_point(kind: str, strategy: str, dtype: torch.dtype) -> None:
    model = quantized_cnn(kind, strategy, dtype)
    assert sum(isinstance(layer, QuantizedConv2d) for layer in model) == 3
    assert not any(type(layer) in (torch.nn.Conv2d, torch.nn.Linear) for layer in model)
    before = accuracy(digits_cnn())
    assert before > 0.96
    assert abs(accuracy(model, dtype) - before) <= 0.01
