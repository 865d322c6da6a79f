"""Rounding to nearest for all layers of a problem: the whole of some algorithms, the last step of others."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.quantization.algorithms._base import Problem, Solution
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.qparams import input_parameters, round_to_nearest
from npu_fusion.quantization.scheme import Scheme
from npu_fusion.quantization.statistics import RANGE


def input_needs(scheme: Scheme) -> frozenset[str]:
    """What :func:`static_inputs` reads: the range, if the input has calibrated scales."""
    return frozenset() if scheme.inputs is None or scheme.inputs.dynamic else frozenset({RANGE})


def static_inputs(problem: Problem, smooth_scales: Tensor | None = None) -> InputParameters | None:
    """The parameters of the input by its range, once it is smoothed; None unless they are static."""
    inputs = problem.scheme.inputs
    if inputs is None or inputs.dynamic:
        return None
    return input_parameters(problem.statistics, inputs, smooth_scales)


def smooth_scales_of(factors: Tensor, problem: Problem) -> Tensor:
    """``1 / factors`` as the model's dtype holds it, tied as the producer of the input needs it.

    Weights are divided by the result, not multiplied by ``factors``: so the error of rounding the reciprocal
    cancels.
    """
    limits = torch.finfo(problem.dtype)
    scales = (1 / problem.tie(factors)).clamp(limits.tiny, limits.max)
    return scales.to(problem.dtype)


def round_all(problem: Problem, smooth_scales: Tensor | None = None) -> Solution:
    """All weights, divided by ``smooth_scales`` if any, rounded to nearest; the input by its range."""
    scheme = problem.scheme
    weights = problem.weights
    if smooth_scales is not None:
        factors = problem.attain(smooth_scales)
        weights = tuple(weight / factors for weight in weights)
    return Solution(
        tuple(round_to_nearest(weight, scheme.weights, scheme.inputs) for weight in weights),
        static_inputs(problem, smooth_scales),
        smooth_scales,
    )
