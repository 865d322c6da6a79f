"""ofmr: output feature map reconstruction, a search for the scale with the least error of the output.

::

    scale = 2^k * scale by the range,  k = -5 ... 5

Weights first, with the original input: one k for each output (for the weight, if it has one scale), by the
squared error of that output. Then the input, if it has a calibrated scale, with the quantized weights: one
k, by the squared error of all outputs of all layers that read it. A smaller k saturates more and resolves
small numbers better.

The outputs are those for ``statistics.sample``; convolutions are computed by ``Problem.apply``. k = 0 is
minmax, so neither search makes that worse on the sample.

Source: documents of AMCT.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.quantization.algorithms._base import Algorithm, Problem, Solution, algorithm
from npu_fusion.quantization.algorithms._nearest import input_needs, round_all, static_inputs
from npu_fusion.quantization.inner_scale import nearest_inner_scale
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.qparams import all_parameters, encode_weight, quantize_dequantize
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import Scheme
from npu_fusion.quantization.statistics import SAMPLE

# 0 first: of equal errors, that of the range is kept.
_EXPONENTS = (0, *range(-5, 0), *range(1, 6))


@algorithm
class OFMR(Algorithm):
    name = "ofmr"

    def needs(self, scheme: Scheme) -> frozenset[str]:
        return frozenset({SAMPLE}) | input_needs(scheme)

    def solve(self, problem: Problem) -> Solution:
        x = _sample(problem)
        if x is None:
            return round_all(problem)
        weights = tuple(_search_weight(problem, x, weight) for weight in problem.weights)
        inputs = static_inputs(problem)
        if inputs is not None:
            inputs = _search_input(problem, x, weights, inputs)
        return Solution(weights, inputs)


def _sample(problem: Problem) -> Tensor | None:
    """Rows (or images) of the input that are finite, in fp32; None if there are none."""
    if problem.statistics.rows == 0:
        return None
    x = problem.statistics.sample.float()
    x = x[x.flatten(1).isfinite().all(1)]
    return x if x.size(0) else None


def _search_weight(problem: Problem, x: Tensor, weight: Tensor) -> QuantizedWeight:
    scheme = problem.scheme.weights
    scale, offset, channel_scale = all_parameters(weight, scheme, problem.scheme.inputs)
    target = problem.apply(x, weight)
    best = torch.zeros_like(weight[:, 0])
    least = torch.full_like(best, torch.inf)
    for exponent in _EXPONENTS:
        candidate = _times(scale, torch.tensor(2.0**exponent), channel_scale)
        quantized = encode_weight(weight, scheme, candidate, offset, channel_scale)
        error = _error(problem, x, quantized.dequantize(), target)
        if scheme.strategy == "tensor":
            error = error.sum().expand_as(error)
        better = error < least
        best, least = torch.where(better, float(exponent), best), torch.where(better, error, least)
    factor = torch.exp2(best[:1] if scheme.strategy == "tensor" else best)
    scale = _times(scale, factor if scale.dim() == 1 else factor.unsqueeze(1), channel_scale)
    return encode_weight(weight, scheme, scale, offset, channel_scale)


def _times(scale: Tensor, factor: Tensor, channel_scale: Tensor | None) -> Tensor:
    """The scale, as large as it may be beside a channel scale."""
    return scale * factor if channel_scale is None else nearest_inner_scale(scale * factor)


def _search_input(
    problem: Problem, x: Tensor, weights: tuple[QuantizedWeight, ...], start: InputParameters
) -> InputParameters:
    assert problem.scheme.inputs is not None, "start is of an input scheme"
    values = [weight.dequantize() for weight in weights]
    targets = [problem.apply(x, weight) for weight in problem.weights]
    best, least = start, torch.inf
    for exponent in _EXPONENTS:
        candidate = InputParameters(start.scale * 2.0**exponent, start.offset)
        quantized = quantize_dequantize(x, problem.scheme.inputs.type, candidate)
        errors = [_error(problem, quantized, v, t).sum() for v, t in zip(values, targets, strict=True)]
        error = torch.stack(errors).sum().item()
        if error < least:
            best, least = candidate, error
    return best


def _error(problem: Problem, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The squared error of each output (channel), [N]."""
    difference = problem.apply(x, weight).sub_(target)
    channels = difference.transpose(0, 1).flatten(1) if problem.statistics.images else difference.t()
    return channels.square().sum(1)
