"""smoothquant: outliers of the input move into the weights, then both are rounded to nearest.

::

    x Wᵀ = (x / s) (W s)ᵀ        s[k] = max|x[:, k]|^a / max|W[:, k]|^(1 - a)        a: ``smooth_strength``

The larger a is, the more is moved to the weights; models with larger outliers want a larger one (0.5 for OPT
and BLOOM, 0.75 for GLM-130B, in the paper). AMCT's document says the opposite in one place.

max|W| is over all layers that read x, which so share one s, one quantization of x, and may have s folded
into what computes x. The input is multiplied by ``smooth_scales``, 1 / s rounded to the model's dtype, and
the weights are divided by that rounded value: the product stays exact. All of it in fp32, for |x|^a
overflows in fp16.

Channels that never were anything but 0, or whose weights are 0, or where x or s is not finite stay (s = 1).

Source: arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.quantization.algorithms._base import Algorithm, Problem, Solution, algorithm
from npu_fusion.quantization.algorithms._nearest import round_all, smooth_scales_of
from npu_fusion.quantization.scheme import Scheme
from npu_fusion.quantization.statistics import RANGE

STRENGTH = 0.5


def smoothing_factors(input_max: Tensor, weight_max: Tensor, strength: float) -> Tensor:
    """s, fp32 [K], from the largest magnitudes of the channels of input and weight, [K] each.

    Raises:
        ValueError: ``strength`` is not between 0 and 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"smoothing_factors: strength is {strength}; accepted: 0 to 1")
    input_max, weight_max = input_max.float(), weight_max.float()
    factors = input_max.pow(strength) / weight_max.pow(1 - strength)
    alive = (input_max > 0) & (weight_max > 0) & input_max.isfinite() & factors.isfinite() & (factors > 0)
    return torch.where(alive, factors, 1.0)


@algorithm
class SmoothQuant(Algorithm):
    name = "smoothquant"
    smooths = True

    def needs(self, scheme: Scheme) -> frozenset[str]:
        return frozenset({RANGE})

    def solve(self, problem: Problem) -> Solution:
        statistics = problem.statistics
        if statistics.rows == 0 or statistics.images:
            return round_all(problem)
        weight_max = torch.stack([weight.abs().amax(0) for weight in problem.weights]).amax(0)
        strength = problem.scheme.options.get("smooth_strength", STRENGTH)
        factors = smoothing_factors(statistics.abs_max, weight_max, strength)
        return round_all(problem, smooth_scales_of(factors, problem))
