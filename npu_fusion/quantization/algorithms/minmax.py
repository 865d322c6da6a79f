"""minmax: scales from the range of the weight and of the calibrated input, then rounding to nearest.

::

    scale, offset = npu_fusion.quantization.qparams (weight)        codes = round to nearest
    static inputs: the same rules for the smallest and the largest value that calibration saw
"""

from __future__ import annotations

from npu_fusion.quantization.algorithms._base import Algorithm, Problem, Solution, algorithm
from npu_fusion.quantization.algorithms._nearest import input_needs, round_all
from npu_fusion.quantization.scheme import Scheme


@algorithm
class MinMax(Algorithm):
    name = "minmax"

    def needs(self, scheme: Scheme) -> frozenset[str]:
        return input_needs(scheme)

    def solve(self, problem: Problem) -> Solution:
        return round_all(problem)
