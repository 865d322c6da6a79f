"""awq: channels whose inputs are large get finer weights, by a power that a search finds.

::

    x Wᵀ = (x / s) (W s)ᵀ        s = mean|x|^r, at least 1e-4, divided by sqrt(max(s) min(s))
    r = 0, 1/n, ..., (n - 1)/n   n: ``grids_num``; the one with the least squared error of the output

The error is that over all calibration data and of all layers that read x, computed from the Gram matrix of x
(:mod:`npu_fusion.quantization.algorithms._loss`). r = 0 is rounding to nearest without smoothing, so the
result is never worse than that. The input is multiplied by ``smooth_scales``, 1 / s rounded to the model's
dtype, and the weights are divided by that rounded value. Channels that never were anything but 0 are left
alone (s = 1).

Source: arXiv 2306.00978, section 3.2, and AMCT for the grid. AMCT looks at the first batch and at one layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.quantization.algorithms._base import Algorithm, Problem, Solution, algorithm
from npu_fusion.quantization.algorithms._loss import gram_of, output_error
from npu_fusion.quantization.algorithms._nearest import input_needs, round_all, smooth_scales_of
from npu_fusion.quantization.qparams import round_to_nearest
from npu_fusion.quantization.scheme import Scheme
from npu_fusion.quantization.statistics import ABS_MEAN, GRAM

GRIDS = 20
_SMALLEST = 1e-4


def scaling_factors(abs_mean: Tensor, ratio: float) -> Tensor:
    """s, fp32 [K], for the mean magnitude of each channel of the input, [K]."""
    alive = (abs_mean > 0) & abs_mean.isfinite()
    if not bool(alive.any()):
        return torch.ones_like(abs_mean, dtype=torch.float32)
    factors = abs_mean.float().pow(ratio).clamp(min=_SMALLEST)
    known = factors[alive]
    return torch.where(alive, factors / (known.max().sqrt() * known.min().sqrt()), 1.0)


@algorithm
class AWQ(Algorithm):
    name = "awq"
    smooths = True

    def needs(self, scheme: Scheme) -> frozenset[str]:
        return frozenset({ABS_MEAN, GRAM}) | input_needs(scheme)

    def solve(self, problem: Problem) -> Solution:
        gram = gram_of(problem)
        if gram is None:
            return round_all(problem)
        abs_mean = problem.statistics.abs_mean
        grids = problem.scheme.options.get("grids_num", GRIDS)
        best, least = None, _error(problem, gram, 1.0)
        for k in range(1, grids):
            smooth_scales = smooth_scales_of(scaling_factors(abs_mean, k / grids), problem)
            error = _error(problem, gram, problem.attain(smooth_scales))
            if error < least:
                best, least = smooth_scales, error
        return round_all(problem, best)


def _error(problem: Problem, gram: Tensor, smooth_scales: Tensor | float) -> float:
    """The squared error of all outputs, in terms of the original input: W' stands for W / smooth_scales."""
    scheme = problem.scheme
    total = 0.0
    for weight in problem.weights:
        quantized = round_to_nearest(weight / smooth_scales, scheme.weights, scheme.inputs)
        difference = quantized.dequantize().mul_(smooth_scales).sub_(weight)
        total += output_error(difference, gram).sum().item()
    return total
