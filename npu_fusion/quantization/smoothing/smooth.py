"""SmoothQuant on a float model, in place: it computes the same, and its activations are easier to quantize.

::

    x Wᵀ = (x / s) (W s)ᵀ        s[k] = max|x[:, k]|^alpha / max|W[:, k]|^(1 - alpha)

where x / s costs nothing, because what computes x (a norm, v_proj, up_proj) is divided by s instead. max|W|
is over all layers that read x. Only folded groups are smoothed here; the others need a product with 1 / s at
run time, which quantized layers have (``smooth_scales``) and float layers have not.

Groups are taken from the last to the first. So the maxima of v_proj and up_proj are those of the rows that
the groups after them (o_proj, down_proj) have left, which are the weights that will be quantized.

A larger alpha moves more of the outliers into the weights: 0.5 for OPT and BLOOM, 0.75 for GLM-130B and 0.85
for Llama 2 in the paper and its repository.

Source: arXiv:2211.10438, equations 3 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from npu_fusion.quantization.algorithms.smoothquant import smoothing_factors
from npu_fusion.quantization.smoothing._running import arguments
from npu_fusion.quantization.smoothing.dataflow import trace
from npu_fusion.quantization.smoothing.groups import Group, find_groups
from npu_fusion.quantization.smoothing.producer import Producer, power_of_two

ALPHA = 0.5


@dataclass(frozen=True)
class SmoothedGroup:
    """A group whose factors are in its weights and in its producer now."""

    consumers: tuple[str, ...]
    producer: str
    alpha: float
    scales: Tensor
    """s, fp32 [K]: the activations were divided by it."""


@dataclass(frozen=True)
class Smoothing:
    """What :func:`smooth` did."""

    smoothed: tuple[SmoothedGroup, ...]
    left: Mapping[str, str]
    """Layer that is as it was -> why."""

    def __str__(self) -> str:
        lines = [
            f"{', '.join(group.consumers)}: alpha {group.alpha:g}, into {group.producer}"
            for group in self.smoothed
        ]
        return "\n".join([*lines, *(f"{name}: not smoothed: {reason}" for name, reason in self.left.items())])


@dataclass(frozen=True)
class _Plan:
    group: Group
    producer: Producer
    layers: tuple[nn.Linear, ...]
    alpha: float
    smooth_scales: Tensor
    """fp32 [K]: 1 / s, as the producer can have it."""


@torch.no_grad()
def smooth(
    model: nn.Module,
    act_scales: Mapping[str, Tensor],
    example_inputs: Any,
    alpha: float | Mapping[str, float] = ALPHA,
    *,
    groups: Sequence[Group] | None = None,
    powers_of_two: bool = False,
) -> Smoothing:
    """Move outliers from the inputs of linear layers into their weights, where that can be folded.

    Args:
        model: is changed in place. In float32 its outputs stay the same to rounding; in 16 bits each changed
            weight is rounded once.
        act_scales: layer -> [in_features], of :func:`get_act_scales`. Layers that are not there stay as they
            are.
        example_inputs: what the model can be called with (a tensor, a tuple or list, a mapping), to find out
            what is foldable. A few tokens are enough; their values do not matter. Not used if ``groups`` is
            given.
        alpha: 0 to 1, or patterns (``fnmatch``: ``*.mlp.*``) on the names of layers with an alpha for each.
            The first pattern that matches counts, 0.5 where none does.
        groups: of :func:`find_groups` for this model, if they are known.
        powers_of_two: round s to powers of two. Nothing else is rounded then, and the model gives the very
            same bits in every dtype (not with Gemma's ``1 + w``); quantized it is a little worse.

    Raises:
        TypeError, ValueError: an alpha is no number from 0 to 1, or a pattern matches no layer; an entry of
            ``act_scales`` is of no linear layer, of the wrong size, negative or not finite; layers of one
            group get different alphas; a weight would overflow its dtype. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"smooth: model must be a torch.nn.Module, got {type(model).__name__}")
    linears = {
        name: layer
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, nn.Linear)
    }
    alphas = _alphas(alpha, linears)
    _check_scales(act_scales, linears)
    if groups is None:
        groups = find_groups(
            model, trace(model, *arguments("smooth: example_inputs", example_inputs)), linears
        )
    for name in (name for group in groups for name in group.consumers):
        if name not in linears:
            raise ValueError(f"smooth: groups has {name!r}, which is no linear layer of the model")
    left: dict[str, str] = {}
    plans: list[_Plan] = []
    rows: dict[nn.Module, Tensor] = {}
    for group in reversed(groups):
        plan = _plan(group, act_scales, linears, alphas, rows, powers_of_two)
        if isinstance(plan, str):
            left.update(dict.fromkeys(group.consumers, plan))
        else:
            plans.append(plan)
    plans.reverse()
    for plan in plans:
        plan.producer.fold(plan.smooth_scales)
        for layer in plan.layers:
            layer.weight.copy_(_divided(layer.weight, plan.smooth_scales))
    done = tuple(
        SmoothedGroup(plan.group.consumers, plan.producer.describe(), plan.alpha, 1 / plan.smooth_scales)
        for plan in plans
    )
    return Smoothing(done, {name: left[name] for name in linears if name in left})


def _alphas(alpha: float | Mapping[str, float], linears: Mapping[str, nn.Linear]) -> dict[str, float]:
    """The alpha of every layer."""
    patterns = alpha if isinstance(alpha, Mapping) else {"*": alpha}
    for pattern, value in patterns.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"smooth: alpha of {pattern!r} is a {type(value).__name__}; accepted: a number")
        if not 0 <= value <= 1:
            raise ValueError(f"smooth: alpha of {pattern!r} is {value}; accepted: 0 to 1")
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(
                f"smooth: alpha has the pattern {pattern!r}, which is the name of no linear layer"
            )
    return {
        name: float(next((a for pattern, a in patterns.items() if fnmatchcase(name, pattern)), ALPHA))
        for name in linears
    }


def _check_scales(act_scales: Mapping[str, Tensor], linears: Mapping[str, nn.Linear]) -> None:
    for name, scales in act_scales.items():
        if name not in linears:
            raise ValueError(f"smooth: act_scales has {name!r}, which is no linear layer of the model")
        if not isinstance(scales, Tensor):
            raise TypeError(f"smooth: act_scales[{name!r}] is a {type(scales).__name__}; accepted: a tensor")
        if scales.shape != (linears[name].in_features,):
            raise ValueError(
                f"smooth: act_scales[{name!r}] has shape {list(scales.shape)}; "
                f"accepted: [{linears[name].in_features}] (in_features)"
            )
        if not bool((scales.isfinite() & (scales >= 0)).all()):
            raise ValueError(f"smooth: act_scales[{name!r}] has values that are negative or not finite")


def _plan(
    group: Group,
    act_scales: Mapping[str, Tensor],
    linears: Mapping[str, nn.Linear],
    alphas: Mapping[str, float],
    rows: dict[nn.Module, Tensor],
    powers_of_two: bool,
) -> _Plan | str:
    """What to do with a group, or why it is left alone. ``rows``: factors that producers have got by now."""
    if group.producer is None:
        return group.reason
    known = [act_scales[name] for name in group.consumers if name in act_scales]
    if not known:
        return "act_scales has none of its group"
    given = {alphas[name] for name in group.consumers}
    if len(given) > 1:
        raise ValueError(
            f"smooth: alpha is {sorted(given)} for {', '.join(group.consumers)}, which read one tensor; "
            f"accepted: one value for all of them"
        )
    layers = tuple(linears[name] for name in group.consumers)
    largest = torch.stack([_column_maxima(layer, rows.get(layer)) for layer in layers]).amax(0)
    activations = torch.stack([scales.to("cpu", torch.float32) for scales in known]).amax(0)
    (strength,) = given
    scales = group.producer.reduce(smoothing_factors(activations, largest, strength))
    smooth_scales = group.producer.attainable(1 / (power_of_two(scales) if powers_of_two else scales)).cpu()
    for name, layer in zip(group.consumers, layers, strict=True):
        limit = torch.finfo(layer.weight.dtype).max
        if not bool((_column_maxima(layer, rows.get(layer)) / smooth_scales <= limit).all()):
            raise ValueError(
                f"smooth: the weight of {name} would overflow {layer.weight.dtype} with alpha {strength}"
            )
    if isinstance(group.producer.module, nn.Linear):
        own = rows.setdefault(group.producer.module, torch.ones(group.producer.module.out_features))
        own[group.producer.channel] *= smooth_scales
    return _Plan(group, group.producer, layers, strength, smooth_scales)


def _column_maxima(layer: nn.Linear, rows: Tensor | None) -> Tensor:
    """fp32 [K] on the CPU."""
    weight = layer.weight.detach().abs().float()
    return (weight if rows is None else weight * rows.to(weight.device).unsqueeze(1)).amax(0).cpu()


def _divided(weight: Tensor, smooth_scales: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) / smooth_scales.to(weight.device, wide)).to(weight.dtype)
