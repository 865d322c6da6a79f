"""What a deployed layer writes about itself into a file, and how it is read back without trusting the file.

A description is a dict of JSON values. :class:`Fields` takes it apart: every value is asked for by name and
type, and what nobody asked for is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import torch

from npu_fusion.quantization.scheme import INPUT_TYPES, WEIGHT_TYPES, InputScheme, Scheme, WeightScheme

Value = TypeVar("Value")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Of models."""


class Fields:
    """The entries of a description, to be taken out one by one.

    Every method raises ``TypeError`` for a value of another type and ``ValueError`` for one that is not
    accepted or missing; the message begins with ``where``.
    """

    def __init__(self, where: str, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise TypeError(f"{where}: is a {type(values).__name__}; accepted: a dict")
        self.where = where
        self._left = dict(values)

    def take(self, name: str, kind: type[Value]) -> Value:
        if name not in self._left:
            raise ValueError(f"{self.where}: {name} is missing")
        value = self._left.pop(name)
        # True is an int to Python, not here.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{self.where}: {name} is {value!r}; accepted: {kind.__name__}")
        return value

    def size(self, name: str) -> int:
        """A whole number of at least 1."""
        value = self.take(name, int)
        if value < 1:
            raise ValueError(f"{self.where}: {name} is {value}; accepted: at least 1")
        return value

    def pair(self, name: str, least: int) -> tuple[int, int]:
        """Two whole numbers of at least ``least``, in a list."""
        value = self.take(name, list)
        if len(value) != 2 or not all(type(v) is int and v >= least for v in value):
            raise ValueError(f"{self.where}: {name} is {value}; accepted: two numbers of at least {least}")
        return value[0], value[1]

    def choice(self, name: str, accepted: Collection[str]) -> str:
        value = self.take(name, str)
        if value not in accepted:
            raise ValueError(f"{self.where}: {name} is {value!r}; accepted: {', '.join(accepted)}")
        return value

    def dtype(self, name: str, accepted: Collection[torch.dtype] = DTYPES) -> torch.dtype:
        by_name = {dtype_name(dtype): dtype for dtype in accepted}
        return by_name[self.choice(name, by_name)]

    def optional_dtype(self, name: str, accepted: Collection[torch.dtype] = DTYPES) -> torch.dtype | None:
        """A dtype, or None where the entry is None."""
        if self._left.get(name, "") is None:
            del self._left[name]
            return None
        return self.dtype(name, accepted)

    def nothing_left(self) -> None:
        if self._left:
            raise ValueError(f"{self.where}: has no entry {next(iter(self._left))!r}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_scheme(scheme: Scheme) -> dict[str, Any]:
    """``scheme`` as JSON values; :func:`read_scheme` reads them."""
    weights, inputs = scheme.weights, scheme.inputs
    written: dict[str, Any] = {
        "weights": {"type": weights.type, "symmetric": weights.symmetric, "strategy": weights.strategy},
        "inputs": None,
        "algorithm": scheme.algorithm,
        "options": dict(scheme.options),
    }
    if weights.group_size is not None:
        written["weights"]["group_size"] = weights.group_size
    if inputs is not None:
        written["inputs"] = {"type": inputs.type, "symmetric": inputs.symmetric, "strategy": inputs.strategy}
    return written


def read_scheme(where: str, values: Any) -> Scheme:
    """The scheme that :func:`write_scheme` wrote; ``TypeError`` and ``ValueError`` for anything else."""
    fields = Fields(where, values)
    weights = _read_weights(f"{where}.weights", fields.take("weights", dict))
    inputs = None
    if fields.take("inputs", object) is not None:
        inputs = _read_inputs(f"{where}.inputs", values["inputs"])
    algorithm, options = fields.take("algorithm", str), fields.take("options", dict)
    fields.nothing_left()
    return Scheme(weights, inputs, algorithm, options)


def _read_weights(where: str, values: Any) -> WeightScheme:
    fields = Fields(where, values)
    kind = fields.choice("type", WEIGHT_TYPES)
    symmetric = fields.take("symmetric", bool)
    strategy = fields.choice("strategy", ("tensor", "channel", "group"))
    size = fields.size("group_size") if strategy == "group" else None
    fields.nothing_left()
    return WeightScheme(kind, symmetric, strategy, size)


def _read_inputs(where: str, values: Any) -> InputScheme:
    fields = Fields(where, values)
    kind = fields.choice("type", INPUT_TYPES)
    symmetric = fields.take("symmetric", bool)
    strategy = fields.choice("strategy", ("tensor", "token", "group"))
    fields.nothing_left()
    return InputScheme(kind, symmetric, strategy)
