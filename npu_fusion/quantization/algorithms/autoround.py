"""autoround: SignRound, which learns for each weight whether to round up or down, and how far to clip.

::

    W_q = s (clip(round(W / s + z + V)) - z)        V in [-0.5, 0.5] for each weight, 0 at first
    s, z by the rules of qparams for the range b min .. a max        a, b in [0, 1] for each scale, 1 at first

    V, a, b  <-  V, a, b - rate * sign(gradient)        rate from 1 / steps down to 0

What is minimized is the error of the layer's output over all calibration data, tr(D G Dᵀ) with D = W_q - W
and the Gram matrix G. Its gradient is 2 D G, so no input is kept. ``round`` counts as the identity in the
gradient, ``clip`` as the identity within its limits and as constant outside. All steps are deterministic.
The best state is kept, of each row its own (of the whole weight, if that has one scale), the first one
included: the result is never worse than rounding to nearest.

Floats: V is in units of the distance between the two numbers around W / s, and s follows a and b as that of
symmetric integers does; for mx types that is a power of two, whose gradient is taken as that of its argument.

Source: arXiv 2309.05516, equations 3 to 5. The paper minimizes the error of a whole block of layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from npu_fusion import formats
from npu_fusion.quantization.algorithms._base import Algorithm, Problem, Solution, algorithm
from npu_fusion.quantization.algorithms._loss import gram_of
from npu_fusion.quantization.algorithms._nearest import input_needs, round_all, static_inputs
from npu_fusion.quantization.qparams import (
    INTEGER_BITS,
    all_parameters,
    encode_numbers,
    in_groups,
    nearest_numbers,
    range_parameters,
    spread,
    weight_range,
)
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import INTEGER_TYPES, InputScheme, Scheme, WeightScheme
from npu_fusion.quantization.statistics import GRAM

STEPS = 200


@dataclass(frozen=True)
class Form:
    """What the weight is rounded to."""

    scheme: WeightScheme
    bits: int | None = None
    """Of integers, if fewer than the type has."""
    inner: bool = False
    """The weight has been divided by a channel scale."""


@dataclass
class State:
    """What is learned: V, a and b; and the ranges that a and b are shares of."""

    shift: Tensor
    low: Tensor
    high: Tensor
    low_share: Tensor
    high_share: Tensor


@dataclass
class Rounded:
    """What a state makes of the weight."""

    numbers: Tensor
    """fp32 [N, K], what codes stand for."""
    scale: Tensor
    offset: Tensor | None
    inside: Tensor
    """bool [N, K]: not clipped."""
    difference: Tensor
    """D."""


def signround(
    weight: Tensor,
    gram: Tensor,
    scheme: WeightScheme,
    inputs: InputScheme | None = None,
    bits: int | None = None,
    steps: int = STEPS,
    rate: float | None = None,
) -> QuantizedWeight:
    """Quantize a weight [N, K] for inputs with the Gram matrix ``gram`` [K, K], which may be scaled.

    Args:
        bits: of integers, if fewer than the type has.
        steps: how many times V, a and b are changed.
        rate: how far each of them moves in the first step; None: 1 / steps.

    Raises:
        ValueError: ``steps`` is negative, or the weight is none that ``qparams.weight_range`` takes.
    """
    if steps < 0:
        raise ValueError(f"signround: steps is {steps}; accepted: 0 or more")
    if rate is None:
        rate = 1 / max(1, steps)
    *_, channel_scale = all_parameters(weight, scheme, inputs, bits)
    form = Form(scheme, bits, inner=channel_scale is not None)
    target = weight.float() if channel_scale is None else weight.float() / channel_scale.unsqueeze(1)
    low, high = weight_range(target, scheme)
    state = State(
        torch.zeros_like(target),
        low.clamp(max=0),
        high.clamp(min=0),
        torch.ones_like(low),
        torch.ones_like(high),
    )
    best = apply_state(target, state, form)
    least: Tensor | None = None
    for step in range(steps + 1):
        rounded = best if step == 0 else apply_state(target, state, form)
        # Half of the gradient with respect to W_q.
        pull = rounded.difference @ gram
        error = (pull * rounded.difference).sum(1)
        if scheme.strategy == "tensor":
            error = error.sum(0, keepdim=True)
        if least is None:
            least = error
        else:
            best = _better(best, rounded, error < least)
            least = torch.minimum(error, least)
        if step < steps:
            _descend(target, state, rounded, pull, form, rate * (1 - step / steps))
    codes = encode_numbers(best.numbers, scheme.type, bits)
    return QuantizedWeight(scheme, codes, best.scale, best.offset, channel_scale)


def apply_state(target: Tensor, state: State, form: Form) -> Rounded:
    """Round a weight [N, K] as a state says."""
    scheme, columns = form.scheme, target.size(1)
    low, high = state.low * state.low_share, state.high * state.high_share
    scale, offset = range_parameters(low, high, scheme, form.bits, form.inner)
    step = spread(scale, scheme, columns)
    zero = 0.0 if offset is None else spread(offset.float(), scheme, columns)
    quotient = target / step
    if scheme.type in INTEGER_TYPES:
        shifted = quotient.add_(zero).add_(state.shift)
        numbers = nearest_numbers(shifted, scheme.type, form.bits)
        inside = numbers == shifted.round_()
    else:
        shifted = quotient.addcmul_(state.shift, _distance(quotient, scheme.type))
        numbers = nearest_numbers(shifted, scheme.type)
        inside = shifted.abs_() <= formats.MAXIMUM[formats.ELEMENT[scheme.type]]
    return Rounded(numbers, scale, offset, inside, (numbers - zero).mul_(step).sub_(target))


def _better(best: Rounded, other: Rounded, improved: Tensor) -> Rounded:
    """Row by row (``improved`` [N]) or as a whole ([1]), what is to be kept."""

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(improved.unsqueeze(1) if new.dim() == 2 else improved, new, old)

    best.numbers = choose(other.numbers, best.numbers)
    best.scale = choose(other.scale, best.scale)
    if best.offset is not None and other.offset is not None:
        best.offset = choose(other.offset, best.offset)
    return best


def _descend(
    target: Tensor,
    state: State,
    rounded: Rounded,
    pull: Tensor,
    form: Form,
    rate: float,
) -> None:
    """One step of signed gradient descent, in place."""
    shift, low_share, high_share = gradient(target, state, rounded, pull, form)
    state.shift.sub_(shift.sign_(), alpha=rate).clamp_(-0.5, 0.5)
    state.low_share.sub_(low_share.sign_(), alpha=rate).clamp_(0, 1)
    state.high_share.sub_(high_share.sign_(), alpha=rate).clamp_(0, 1)


def gradient(
    target: Tensor,
    state: State,
    rounded: Rounded,
    pull: Tensor,
    form: Form,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of half the error with respect to V, b and a, up to positive factors: only the signs are right.

    ``pull`` is half the gradient with respect to W_q. Within the limits W_q = W + s V to the gradient, so::

        dW_q/dV = s                                   0 where clipped
        dW_q/ds = (q - z) - W / s                     q - z where clipped
        dW_q/dz = 0                                   -s where clipped
    """
    scheme = form.scheme
    step = spread(rounded.scale, scheme, target.size(1))
    relative = rounded.difference / step  # q - z - W / s
    clipped = ~rounded.inside
    # Where clipped, W / s does not count.
    by_scale = _sum(pull * (relative + (target / step).mul_(clipped)), scheme)
    by_shift = pull.masked_fill(clipped, 0.0)
    if rounded.offset is None:
        # The scale is that of the larger of the two magnitudes.
        high_decides = state.high * state.high_share >= -state.low * state.low_share
        by_high = torch.where(high_decides, by_scale * state.high, 0.0)
        return by_shift, torch.where(high_decides, 0.0, by_scale * -state.low), by_high
    # s = (a max - b min) / n and z = const - b min / s.
    scale, last = rounded.scale, 2 ** (form.bits or INTEGER_BITS[scheme.type]) - 1
    by_zero = -_sum(pull.masked_fill(rounded.inside, 0.0), scheme) * scale
    by_scale = by_scale + by_zero * state.low_share * state.low / scale.square()
    by_low = -state.low * (by_scale / last + by_zero / scale)
    return by_shift, by_low, by_scale * state.high


def _sum(x: Tensor, scheme: WeightScheme) -> Tensor:
    """Over all weights that share a scale; in the shape of ``QuantizedWeight.scale``."""
    if scheme.strategy == "tensor":
        return x.sum().reshape(1)
    return x.sum(1) if scheme.strategy == "channel" else in_groups(x, scheme).sum(2)


def _distance(x: Tensor, type: str) -> Tensor:
    """Between the two numbers of a type around each element of ``x``; beyond the largest, of the last two."""
    table = _distances(formats.ELEMENT[type], x.device)
    index = (x.contiguous().view(torch.int32) >> 16) & 0x7FFF
    return table.index_select(0, index.reshape(-1)).view(x.shape)


@cache
def _distances(element: str, device: torch.device) -> Tensor:
    """fp32 [32768]: the distance for every magnitude, by the upper 16 bits of fp32.

    No number of these formats has more significant bits than those hold, so what is cut off does not matter.
    """
    dtype = getattr(torch, element) if element.startswith("float8") else torch.uint8
    codes = torch.arange(16 if element.startswith("float4") else 256, dtype=torch.uint8).view(dtype)
    numbers = formats.decode(codes, element)
    numbers = numbers[numbers.isfinite() & (numbers >= 0)].unique()
    magnitudes = (torch.arange(1 << 15, dtype=torch.int32) << 16).view(torch.float32)
    above = torch.bucketize(magnitudes, numbers, right=True).clamp(max=numbers.numel() - 1)
    return (numbers[above] - numbers[above - 1]).to(device)


@algorithm
class AutoRound(Algorithm):
    name = "autoround"

    def needs(self, scheme: Scheme) -> frozenset[str]:
        return frozenset({GRAM}) | input_needs(scheme)

    def solve(self, problem: Problem) -> Solution:
        gram = gram_of(problem)
        if gram is None:
            return round_all(problem)
        scheme, options = problem.scheme, problem.scheme.options
        steps, rate = options.get("steps", STEPS), options.get("lr")
        weights = tuple(
            signround(weight, gram, scheme.weights, scheme.inputs, steps=steps, rate=rate)
            for weight in problem.weights
        )
        return Solution(weights, static_inputs(problem))
