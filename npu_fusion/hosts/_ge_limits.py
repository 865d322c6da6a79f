"""Calls that torchair's converters to GE get wrong or refuse, although they are registered.

A converter is registered for many more calls than it can lower. Some raise whatever they are given; worse,
some leave out an argument, and the GE graph computes something else. What is listed here was found by
comparing the converters of the operators that this package emits with their schemas and documentation.

Source: torch_npu 2.13.0, dynamo/torchair/_ge_concrete_graph/ge_converter; the file is named at each limit.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_NEVER = {
    # aten/_int_mm.py and prims/iota.py raise NotImplementedError.
    "aten::_int_mm": "torchair's GE converter of aten._int_mm is not implemented",
    "prims::iota": "torchair's GE converter of prims.iota is not implemented",
    # custom/flash_attention.py returns the seven outputs of MlaPrologV3 for the five of the schema.
    "npu::npu_mla_prolog_v3": "torchair's GE converter of npu_mla_prolog_v3 returns seven results, not five",
}


def why_not(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Why torchair must not lower this call to GE, or None; the arguments are those of an FX node."""
    name = operator._schema.name
    if name in _NEVER:
        return _NEVER[name]
    unknown = _unknown(operator, kwargs)
    if unknown is not None:
        return f"torchair's GE converter of {operator} has no argument {unknown!r}"
    return _rotary_mul(_arguments(operator, args, kwargs)) if name == "npu::npu_rotary_mul" else None


def _unknown(operator: Any, kwargs: Mapping[str, Any]) -> str | None:
    """A keyword argument that the converter lacks: the dtypes of npu_kv_rmsnorm_rope_cache_v2_functional."""
    converter = getattr(operator, "_ge_converter", None)
    if converter is None or not kwargs:
        return None
    known = inspect.signature(converter).parameters
    return next((name for name in kwargs if name not in known), None)


def _arguments(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by their names in the schema, defaults filled in."""
    given = operator._schema.arguments
    found = {a.name: kwargs.get(a.name, a.default_value) for a in given}
    return found | {a.name: value for a, value in zip(given, args, strict=False)}


def _rotary_mul(given: Mapping[str, Any]) -> str | None:
    # custom/npu_rotary_mul.py: RotaryMul, which turns halves and has no mode, unless ``rotate`` is given or
    # the chip is an Ascend 950 (RotaryPositionEmbedding).
    mode = given["rotary_mode"]
    if mode == "half" or _is_950() or (given["rotate"] is not None and mode == "interleave"):
        return None
    return f"torchair lowers npu_rotary_mul to 'half', not to {mode!r}"


def _is_950() -> bool:
    """Does torchair lower for the Ascend 950? It asks the device, or the stand-in for one."""
    return bool(sys.modules["torchair._utils.check_platform"].is_arch35())
