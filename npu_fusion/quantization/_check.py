"""Whether weights, inputs and an algorithm go together, by the table in ``_combinations.py``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from npu_fusion.quantization._combinations import TABLE, rows
from npu_fusion.quantization._values import listed
from npu_fusion.quantization.scheme import InputScheme, WeightScheme


@dataclass(frozen=True)
class Origin:
    """Which keys gave the weights and inputs that are checked."""

    weights: str
    inputs: str
    layer: str | None = None

    @property
    def suffix(self) -> str:
        return "" if self.layer is None else f" (layer {self.layer!r})"


def check(weights: WeightScheme, inputs: InputScheme | None, algorithm: str, origin: Origin) -> None:
    """Raise ``ValueError`` unless linear layers can be quantized so, with the first of the reasons.

    What can be said of inputs alone, such as which may be asymmetric, was checked when they were read.
    """
    strategies = {row.input_strategy: row for row in rows("Linear", weights.type, inputs)}
    beside = _beside(inputs, origin)
    if not strategies:
        raise ValueError(_unknown_pair(weights, inputs, origin))
    if inputs is not None and inputs.strategy not in strategies:
        raise ValueError(
            f"quantize: {origin.inputs}.strategy is {inputs.strategy!r} for {inputs.type!r} with weights "
            f"{weights.type!r}; accepted: {_unique(strategies)}{origin.suffix}"
        )
    row = strategies[None if inputs is None else inputs.strategy]
    if weights.strategy not in row.weight_strategies:
        raise ValueError(
            f"quantize: {origin.weights}.strategy is {weights.strategy!r} for {weights.type!r}{beside}; "
            f"accepted: {listed(row.weight_strategies)}{origin.suffix}"
        )
    if not weights.symmetric and row.asymmetric != "weights":
        raise ValueError(
            f"quantize: {origin.weights}.symmetric is False for {weights.type!r}{beside}; accepted: True"
            f"{origin.suffix}"
        )
    if algorithm not in row.algorithms:
        raise ValueError(
            f"quantize: algorithm is {algorithm!r} for {origin.weights} {weights.type!r}{beside}; "
            f"accepted: {listed(row.algorithms)}{origin.suffix}"
        )


def _beside(inputs: InputScheme | None, origin: Origin) -> str:
    if inputs is None:
        return f" without quantized {origin.inputs}"
    return f" with {origin.inputs} {inputs.type!r} per {inputs.strategy}"


def _unknown_pair(weights: WeightScheme, inputs: InputScheme | None, origin: Origin) -> str:
    linear = [row for row in TABLE if row.layer == "Linear"]
    other_inputs = _unique(row.inputs for row in linear if row.weights == weights.type)
    kind = None if inputs is None else inputs.type
    other_weights = _unique(row.weights for row in linear if row.inputs == kind)
    given = f"{origin.inputs}.type {kind!r}" if inputs is not None else f"no quantized {origin.inputs}"
    return (
        f"quantize: {origin.weights}.type is {weights.type!r} with {given}; accepted with these inputs: "
        f"weights {other_weights}; with these weights: inputs {other_inputs}{origin.suffix}"
    )


def _unique(names: Iterable[str | None]) -> str:
    return ", ".join("none" if name is None else repr(name) for name in dict.fromkeys(names))
