"""What a rounded weight costs: the squared error of the layer's output over all calibration data.

::

    sum over rows x of (D x)²  =  D G Dᵀ        D = W - W_quantized,  G = sum of x xᵀ

for each output, so the inputs themselves are not needed.
"""

from __future__ import annotations

from torch import Tensor

from npu_fusion.quantization.algorithms._base import Problem
from npu_fusion.quantization.quantized_weight import QuantizedWeight


def gram_of(problem: Problem) -> Tensor | None:
    """G, fp32 [K, K]; None if nothing, or nothing finite, is known of the input of a linear layer."""
    statistics = problem.statistics
    gram = statistics.gram
    if statistics.rows == 0 or statistics.images or not bool(gram.isfinite().all()):
        return None
    return gram


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """The error of each output, [N], for D [N, K]."""
    return (difference @ gram).mul_(difference).sum(1)


def weight_error(quantized: QuantizedWeight, weight: Tensor, gram: Tensor) -> Tensor:
    """The error of each output, [N], of a quantized weight [N, K] beside the original one."""
    return output_error(quantized.dequantize().sub_(weight), gram)
