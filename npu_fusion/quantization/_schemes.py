"""From ``weights`` and ``inputs`` of a configuration to schemes: each value alone, then together.

What depends on both, and on the algorithm, is in ``_combinations.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from npu_fusion.quantization._values import boolean, integer, join, keyed, listed, one_of, refusal
from npu_fusion.quantization.scheme import (
    FLOAT4_TYPES,
    INPUT_TYPES,
    INTEGER_TYPES,
    MX_BLOCK,
    MX_TYPES,
    WEIGHT_TYPES,
    InputScheme,
    WeightScheme,
)

Readers = Mapping[str, Callable[[str, Any], Any]]

_INPUT_STRATEGIES = ("tensor", "token", "group")


def _group_size(path: str, value: Any) -> int | None:
    return None if value is None else integer(path, value, low=32, multiple=32)


WEIGHT_FIELDS: Readers = {
    "type": lambda path, value: one_of(path, value, WEIGHT_TYPES),
    "symmetric": boolean,
    "strategy": lambda path, value: one_of(path, value, ("tensor", "channel", "group")),
    "group_size": _group_size,
    "enable_quant": boolean,
}
INPUT_FIELDS: Readers = {
    "type": lambda path, value: one_of(path, value, INPUT_TYPES),
    "symmetric": boolean,
    "strategy": lambda path, value: one_of(path, value, _INPUT_STRATEGIES),
    "dynamic": boolean,
    "enable_quant": boolean,
}


@dataclass(frozen=True)
class Fields:
    """Values of ``weights`` or ``inputs``, each of which is accepted by itself."""

    path: str
    values: Mapping[str, Any]
    inherited_from: str | None = None
    """The path that gave what ``path`` leaves out."""

    def weights(self) -> WeightScheme | None:
        """The scheme, or None if ``enable_quant`` is False."""
        if not self._enabled:
            return None
        kind = self._type(WEIGHT_TYPES)
        grouped = kind in (*MX_TYPES, *FLOAT4_TYPES)
        strategy = self.values.get("strategy", "group" if grouped else "channel")
        if grouped and strategy != "group":
            raise self._refused("strategy", f"for {kind!r}", "'group'")
        symmetric = self._symmetric(kind, INTEGER_TYPES)
        size = self.values.get("group_size")
        if strategy != "group":
            if size is not None:
                raise self._refused("group_size", f"with strategy {strategy!r}", "only with strategy 'group'")
            return WeightScheme(kind, symmetric, strategy)
        if kind in MX_TYPES:
            if size not in (None, MX_BLOCK):
                raise self._refused("group_size", f"for {kind!r}", str(MX_BLOCK))
            size = MX_BLOCK
        if size is None:
            raise ValueError(
                f"quantize: {self.path}.group_size is missing with strategy 'group'; "
                f"accepted: a multiple of 32 that is less than the inputs of a layer{self._suffix}"
            )
        return WeightScheme(kind, symmetric, strategy, size)

    def inputs(self) -> InputScheme | None:
        """The scheme, or None if ``enable_quant`` is False."""
        if not self._enabled:
            return None
        kind = self._type(INPUT_TYPES)
        strategy = self.values.get("strategy", "group" if kind in MX_TYPES else "tensor")
        strategies = ("group",) if kind in MX_TYPES else ("tensor", "token")
        if strategy not in strategies:
            raise self._refused("strategy", f"for {kind!r}", listed(strategies))
        symmetric = self._symmetric(kind, ("int8",))
        if not symmetric and strategy == "token":
            raise self._refused("symmetric", "with strategy 'token'", "True")
        dynamic = {"token": True, "tensor": False}.get(strategy)
        if self.values.get("dynamic", dynamic) is not dynamic:
            only = "True with strategy 'token', False with strategy 'tensor'"
            raise self._refused("dynamic", f"with strategy {strategy!r}", only)
        return InputScheme(kind, symmetric, strategy)

    @property
    def _enabled(self) -> bool:
        return bool(self.values.get("enable_quant", True))

    def _type(self, accepted: tuple[str, ...]) -> str:
        if "type" not in self.values:
            raise ValueError(
                f"quantize: {self.path}.type is missing; accepted: {listed(accepted)}{self._suffix}"
            )
        return str(self.values["type"])

    def _symmetric(self, kind: str, may_be_asymmetric: tuple[str, ...]) -> bool:
        symmetric = bool(self.values.get("symmetric", True))
        if not symmetric and kind not in may_be_asymmetric:
            accepted = f"True (False only for {listed(may_be_asymmetric)})"
            raise self._refused("symmetric", f"for {kind!r}", accepted)
        return symmetric

    def _refused(self, key: str, where: str, accepted: str) -> ValueError:
        return ValueError(refusal(join(self.path, key), self.values[key], accepted, self._suffix, where))

    @property
    def _suffix(self) -> str:
        return "" if self.inherited_from is None else f" (the rest is from {self.inherited_from})"


def read_fields(path: str, value: Any, readers: Readers) -> Fields:
    """Check the keys of a dict, and each value alone."""
    given = keyed(path, value, tuple(readers))
    return Fields(path, {key: readers[key](join(path, key), given[key]) for key in given})


def merged(own: Fields, base: Fields | None) -> Fields:
    """``own``, and what it lacks from ``base``; ``group_size`` and ``dynamic`` come with ``strategy``."""
    if base is None:
        return own
    inherited = {key: value for key, value in base.values.items() if key != "enable_quant"}
    if "strategy" in own.values:
        inherited.pop("group_size", None)
        inherited.pop("dynamic", None)
    elif own.values.get("type") in MX_TYPES:
        inherited.pop("group_size", None)
    return replace(own, values={**inherited, **own.values}, inherited_from=base.path if inherited else None)
