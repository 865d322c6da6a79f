"""cast: inputs are cast to their 8-bit float as they are, weights are scaled.

::

    input scale = 1        weight scale = max|w| / 16 (hifloat8; 448 for float8_e4m3fn)

hifloat8 covers 2^-22 to 2^15, more than most activations need, so nothing has to be calibrated. float8_e4m3fn
saturates at 448.

The rule is AMCT's, except that the magnitude of the weight counts, not its signed maximum.
"""

from __future__ import annotations

import torch

from npu_fusion.quantization.algorithms._base import Algorithm, Problem, Solution, algorithm
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.qparams import round_to_nearest
from npu_fusion.quantization.scheme import Scheme


@algorithm
class Cast(Algorithm):
    name = "cast"

    def needs(self, scheme: Scheme) -> frozenset[str]:
        return frozenset()

    def solve(self, problem: Problem) -> Solution:
        scheme = problem.scheme
        weights = tuple(round_to_nearest(weight, scheme.weights, scheme.inputs) for weight in problem.weights)
        inputs = None
        if scheme.inputs is not None and not scheme.inputs.dynamic:
            inputs = InputParameters(torch.ones(1, device=problem.weights[0].device))
        return Solution(weights, inputs)
