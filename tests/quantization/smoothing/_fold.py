"""Fold random factors into every producer that is found, and compare the model with what it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from npu_fusion.quantization.smoothing import Group, find_groups, trace

LOGITS = "logits"


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Vectors are ones or zeros in a fresh model; wrong factors in them would not be seen."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


@torch.no_grad()
def fold_all(model: nn.Module, groups: list[Group], seed: int = 0) -> int:
    """Give every foldable group random factors from 1/4 to 4; returns how many groups there were."""
    generator = torch.Generator().manual_seed(seed)
    layers, count = linears(model), 0
    for group in groups:
        if group.producer is None:
            continue
        count += 1
        size = layers[group.consumers[0]].in_features
        scales = group.producer.reduce(2 ** (4 * torch.rand(size, generator=generator) - 2))
        smooth_scales = group.producer.attainable(1 / scales)
        group.producer.fold(smooth_scales)
        for name in group.consumers:
            layers[name].weight /= smooth_scales
    return count


def result(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        output = model(*args, **kwargs)
    return getattr(output, LOGITS, output)


def groups_of(model: nn.Module, *args: Any, **kwargs: Any) -> list[Group]:
    return find_groups(model, trace(model, args, kwargs), linears(model))


def producers(groups: list[Group]) -> Mapping[str, str | None]:
    """Consumer -> name of the producer."""
    return {
        name: group.producer.describe() if group.producer else None
        for group in groups
        for name in group.consumers
    }


def assert_exact(
    model: nn.Module, *args: Any, tolerance: float = 1e-12, **kwargs: Any
) -> Mapping[str, str | None]:
    """Find the groups, fold, and compare; returns :func:`producers`."""
    model.eval()
    before = result(model, *args, **kwargs)
    groups = groups_of(model, *args, **kwargs)
    assert fold_all(model, groups) > 0
    after = result(model, *args, **kwargs)
    error = (after.double() - before.double()).abs().max() / before.double().abs().max()
    assert error <= tolerance
    return producers(groups)
