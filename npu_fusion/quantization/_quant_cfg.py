"""``quant_cfg`` of a configuration: global weights and inputs, and overrides for some layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from npu_fusion.quantization._schemes import INPUT_FIELDS, WEIGHT_FIELDS, Fields, Readers, merged, read_fields
from npu_fusion.quantization._values import join, strings_as_keys, suggestion
from npu_fusion.quantization.scheme import InputScheme, WeightScheme


@dataclass(frozen=True)
class Override:
    """A key such as ``*down_proj.weights`` of ``quant_cfg``."""

    key: str
    scheme: WeightScheme | InputScheme | None
    """None: not quantized."""

    @property
    def pattern(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def part(self) -> str:
        """``weights`` or ``inputs``."""
        return self.key.rpartition(".")[2]

    @property
    def path(self) -> str:
        return join("quant_cfg", self.key)

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.pattern)


def read_quant_cfg(
    value: Any,
) -> tuple[WeightScheme | None, InputScheme | None, tuple[Override, ...]]:
    """The global weights and inputs, and the overrides in their order; all complete, and accepted alone."""
    fields = strings_as_keys("quant_cfg", value)
    for key in fields:
        _check_key(key)
    weight_fields = _global(fields, "weights", WEIGHT_FIELDS)
    input_fields = _global(fields, "inputs", INPUT_FIELDS)
    weights = None if weight_fields is None else weight_fields.weights()
    inputs = None if input_fields is None else input_fields.inputs()
    overrides = []
    for key in fields:
        pattern, _, part = key.rpartition(".")
        if not pattern:
            continue
        path = join("quant_cfg", key)
        if part == "weights":
            own = read_fields(path, fields[key], WEIGHT_FIELDS)
            overrides.append(Override(key, merged(own, weight_fields).weights()))
        else:
            own = read_fields(path, fields[key], INPUT_FIELDS)
            overrides.append(Override(key, merged(own, input_fields).inputs()))
    if weights is None and not any(isinstance(override.scheme, WeightScheme) for override in overrides):
        raise ValueError(
            "quantize: quant_cfg.weights is missing, or has enable_quant False; accepted: a dict with 'type' "
            "or overrides such as '*down_proj.weights'"
        )
    return weights, inputs, tuple(overrides)


def _check_key(key: str) -> None:
    pattern, _, part = key.rpartition(".")
    path = join("quant_cfg", key)
    if part == "kvcache":
        raise ValueError(
            f"quantize: {path} asks for a quantized KV cache, which is not available; accepted: keys for "
            f"weights and inputs"
        )
    if part in ("weights", "inputs") and (pattern or key == part):
        return
    hint = suggestion(part, ("weights", "inputs"))
    raise ValueError(
        f"quantize: {path} is an unknown key; accepted: 'weights', 'inputs', and for some layers "
        f"'<pattern>.weights', '<pattern>.inputs'{hint}"
    )


def _global(fields: Mapping[str, Any], part: str, readers: Readers) -> Fields | None:
    value = fields.get(part)
    return None if value is None else read_fields(f"quant_cfg.{part}", value, readers)
