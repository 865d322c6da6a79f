"""Which layers of a model can be quantized as the configuration asks, and why the others cannot.

A layer that a rule leaves out stays in float, is listed with the reason, and is part of one warning. Rules
that depend on the types are in ``_combinations.py``; those here are the same for all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from npu_fusion._prepared_layers import PreparedLinear
from npu_fusion.quantization._combinations import TABLE, combination, dtype_names
from npu_fusion.quantization._options import Chosen
from npu_fusion.quantization._values import listed
from npu_fusion.quantization.config import QuantizationConfig, skips
from npu_fusion.quantization.scheme import Scheme

_BUILT_IN = {nn.Linear: "Linear", nn.Conv2d: "Conv2d"}
_MOST_REASONS = 8
_MOST_NAMES = 3
_USUAL_HEAD = "lm_head"
"""Every preset but one skips it, and not every model has one."""


@dataclass(frozen=True)
class Skipped:
    """A layer that a rule leaves in float."""

    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What becomes of each layer of a model."""

    schemes: dict[str, Scheme]
    """Layer -> how it is quantized, in the order of ``named_modules``. A layer with several names is here
    once, under the first of them."""
    skipped: tuple[Skipped, ...]
    """Left out by a rule."""
    excluded: tuple[str, ...]
    """Left out by the configuration."""
    unmatched: tuple[str, ...]
    """Overrides and ``skip_layers`` of the configuration that are for nothing in the model."""

    def warning(self) -> str | None:
        """One text about layers that rules left out and about patterns that match nothing, or None."""
        lines = []
        reasons: dict[str, list[str]] = {}
        for layer in self.skipped:
            reasons.setdefault(layer.reason, []).append(layer.name)
        if reasons:
            total = len(self.schemes) + len(self.skipped)
            lines.append(f"{len(self.skipped)} of {total} layers stay in float:")
        by_count = sorted(reasons.items(), key=lambda item: -len(item[1]))
        for reason, names in by_count[:_MOST_REASONS]:
            more = ", ..." if len(names) > _MOST_NAMES else ""
            lines.append(f"  {len(names)} ({', '.join(names[:_MOST_NAMES])}{more}): {reason}")
        rest = by_count[_MOST_REASONS:]
        if rest:
            lines.append(f"  {sum(len(names) for _, names in rest)} for {len(rest)} other reasons")
        unmatched = [text for text in self.unmatched if text != _skip_path(_USUAL_HEAD)]
        if unmatched:
            lines.append(f"no layer matches {', '.join(unmatched)}")
        return "\n".join(lines) or None


def why_not(name: str, layer: nn.Module, scheme: Scheme) -> str | None:
    """Why a built-in algorithm cannot quantize a layer as ``scheme`` asks, with the values; None if it can.

    Args:
        name: its full name; empty for the model itself.
        layer: any module. Its weight is only read.
        scheme: one that :meth:`QuantizationConfig.scheme_for` gave.
    """
    reason = _unusable(name, layer)
    if reason is not None:
        return reason
    kind = _BUILT_IN[type(layer)]
    row = combination(kind, scheme.weights, scheme.inputs)
    if row is None or scheme.algorithm not in row.algorithms:
        return _not_for(kind, scheme)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.dtype not in row.dtypes:
        return (
            f"its weight is {dtype_names([weight.dtype])}; accepted for {_types(scheme)}: "
            f"{dtype_names(row.dtypes)}; convert the model with .to(torch.bfloat16)"
        )
    for limit in row.limits:
        if not limit.holds(layer):
            return f"{limit.given(layer)}; accepted for {_types(scheme)}: {limit.text}"
    group_size = scheme.weights.group_size
    if group_size is not None and group_size >= weight.size(1):
        return f"K is {weight.size(1)} and group_size {group_size}; accepted: group_size less than K"
    return _not_finite(layer)


def plan(model: nn.Module, config: QuantizationConfig) -> Plan:
    """Find the layers of a model and what becomes of each. Nothing is changed.

    Layers of which an algorithm of the user takes the place are not held to any rule but the names.

    Raises:
        ValueError: overrides give a layer a combination of types, granularity and algorithm that does not
            exist, or different schemes to the names of one layer.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    schemes: dict[str, Scheme] = {}
    skipped: list[Skipped] = []
    excluded: list[str] = []
    layers = {module: own for module, own in names.items() if _class_name(module, config) is not None}
    replaced: list[str] = []
    for module, own in layers.items():
        outcome = _inside(own, replaced) or _decide(module, own, config)
        if outcome is None:
            excluded.append(own[0])
        elif isinstance(outcome, Scheme):
            schemes[own[0]] = outcome
            if type(module) not in _BUILT_IN:
                replaced += own
        else:
            skipped.append(Skipped(own[0], outcome))
    # Of a container that a pattern matches, the layers need not match; so that is no use of the pattern.
    leaves = [own for module, own in names.items() if module in layers or not list(module.children())]
    unmatched = _unmatched(config, leaves, layers.values())
    return Plan(schemes, tuple(skipped), tuple(excluded), unmatched)


def _class_name(module: nn.Module, config: QuantizationConfig) -> str | None:
    """The name under which an algorithm may take the module, None if none ever would."""
    name = type(module).__name__
    algorithm = config.algorithm_for(name)
    if algorithm is not None and not algorithm.built_in:
        return name
    linear = isinstance(module, PreparedLinear)  # was one
    return (
        "Linear" if linear else next((k for base, k in _BUILT_IN.items() if isinstance(module, base)), None)
    )


def _inside(names: list[str], replaced: list[str]) -> str | None:
    for outer in replaced:
        if any(name.startswith(f"{outer}.") for name in names):
            return f"it is a part of {outer!r}, which is replaced as a whole"
    return None


def _decide(module: nn.Module, names: list[str], config: QuantizationConfig) -> Scheme | str | None:
    """The scheme of a layer, the reason why it is skipped, or None if the configuration excludes it."""
    kind = _class_name(module, config)
    assert kind is not None
    if any(config.excludes(name) for name in names):
        return None
    first, *others = names
    algorithm = config.algorithm_for(kind)
    if algorithm is None:
        return _unusable(first, module) or _no_algorithm(kind, config.algorithms)
    if not algorithm.built_in and type(module).__name__ != kind:
        return _unusable(first, module)
    scheme = config.scheme_for(first, kind)
    assert scheme is not None
    for other in others:
        if config.scheme_for(other, kind) != scheme:
            raise ValueError(
                f"quantize: quant_cfg gives {first!r} and {other!r} different schemes; accepted: one, since "
                f"they are one layer"
            )
    if algorithm.built_in:
        return why_not(first, module, scheme) or scheme
    return _ITSELF if first == "" else scheme


def _unmatched(
    config: QuantizationConfig, leaves: Iterable[list[str]], layers: Iterable[list[str]]
) -> tuple[str, ...]:
    every_leaf = [name for names in leaves for name in names]
    every_layer = [name for names in layers for name in names]
    overrides = [
        override.path
        for override in config.overrides
        if not any(override.matches(name) for name in every_layer)
    ]
    # Whoever skips an embedding, say, has what was asked for.
    patterns = [
        _skip_path(pattern)
        for pattern in config.skip_layers
        if not any(skips(pattern, name) for name in every_leaf)
    ]
    return (*overrides, *patterns)


def _skip_path(pattern: str) -> str:
    return f"skip_layers {pattern!r}"


_ITSELF = "it is the model itself, which cannot be replaced in place"


def _unusable(name: str, layer: nn.Module) -> str | None:
    """What rules a module out whatever the scheme is."""
    if isinstance(layer, PreparedLinear):
        return "npu_fusion.prepare has rearranged it; accepted: a model before that (convert prepares it)"
    if type(layer) not in _BUILT_IN:
        cls = type(layer)
        return (
            f"its class is {cls.__module__}.{cls.__qualname__}; accepted: torch.nn.Linear and "
            f"torch.nn.Conv2d themselves, since a subclass may use its weight in another way"
        )
    if name == "":
        return _ITSELF
    if "forward" in vars(layer):
        return "its forward was replaced by another; accepted: that of its class"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter (weight_norm, say, computes it); accepted: a parameter"
    if weight.is_meta:
        return "its weight is on the meta device; accepted: a weight with data"
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}; accepted: a torch.Tensor"
    if not weight.is_floating_point():
        return f"its weight is {dtype_names([weight.dtype])}; accepted: floating point"
    if weight.numel() == 0:
        return f"its weight has shape {list(weight.shape)}; accepted: no size of 0"
    return None


def _not_finite(layer: nn.Module) -> str | None:
    for name, parameter in layer.named_parameters(recurse=False):
        # The extremes of a tensor with a NaN are NaN; this needs no second tensor of its size.
        low, high = torch.aminmax(parameter.detach())
        if not (low.isfinite() and high.isfinite()):
            return f"its {name} has infinities or NaN; accepted: finite values"
    return None


def _types(scheme: Scheme) -> str:
    if scheme.inputs is None:
        return f"weights {scheme.weights.type} alone"
    return f"weights {scheme.weights.type} with inputs {scheme.inputs.type} per {scheme.inputs.strategy}"


def _not_for(kind: str, scheme: Scheme) -> str:
    rows = [row for row in TABLE if row.layer == kind]
    accepted = "; ".join(
        f"{row.weights} with inputs {row.inputs} per {row.input_strategy} by {', '.join(row.algorithms)}"
        for row in rows
    )
    return f"{kind} is not quantized as {_types(scheme)} by {scheme.algorithm}; accepted: {accepted}"


def _no_algorithm(kind: str, chosen: tuple[Chosen, ...]) -> str:
    accepted = sorted({name for row in TABLE if row.layer == kind for name in row.algorithms})
    return f"{kind} is not quantized by {listed([c.name for c in chosen])}; accepted: {listed(accepted)}"
