"""Calls that torchair's converters to GE get wrong or refuse, although they are registered.

A converter is registered for many more calls than it can lower. Some raise whatever they are given; worse,
some leave out an argument, and the GE graph computes something else. What is listed here was found by
comparing the converters of the operators that this package emits with their schemas and documentation.

Source: torch_npu 2.13.0, dynamo/torchair/_ge_concrete_graph/ge_converter; the file is named at each limit.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from npu_fusion.meta_impls._dtypes import FLOAT4_E1M2, FLOAT4_E2M1

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
    limit = _LIMITS.get(name)
    return None if limit is None else limit(_arguments(operator, args, kwargs))


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


def _quant_matmul(given: Mapping[str, Any]) -> str | None:
    if given["x1"].meta["val"].dtype != torch.int8:
        return _quant_matmul_of_floats(given)
    # The eager operator packs such a scale by npu_trans_quant_param, custom/quantmatmul.py hands it on as it
    # is; the operator's documentation says that graph mode does not take it.
    result = given["output_dtype"]
    narrow = result in (None, 1, 5, torch.int8, torch.float16)
    if not narrow or given["pertoken_scale"] is not None or given["scale"].meta["val"].dtype != torch.float32:
        return None
    kind = "float16" if result in (5, torch.float16) else "int8"
    return f"in graph mode npu_quant_matmul takes no float32 scale for a result in {kind}"


def _quant_matmul_of_floats(given: Mapping[str, Any]) -> str | None:
    # custom/quantmatmul.py raises below Ascend 950, and for so short rows of microscaled float4; a float32
    # scale is handed on as for int8, and a device knows it only beside a scale for the rows.
    if not _is_950():
        return "torchair lowers npu_quant_matmul of 8-bit and 4-bit floats for Ascend 950 only"
    alone = given["pertoken_scale"] is None
    if alone and given["scale"].meta["val"].dtype == torch.float32:
        return "in graph mode npu_quant_matmul takes no float32 scale of 8-bit floats without one per token"
    if given["x2_dtype"] == FLOAT4_E2M1 and not alone and given["x1"].meta["val"].shape[-1] <= 64:
        return "torchair lowers npu_quant_matmul of microscaled float4 for more than 64 rows only"
    return None


def _weight_quant_batchmatmul(given: Mapping[str, Any]) -> str | None:
    # custom/npu_weight_quant_batchmatmul.py reinterprets the bytes without making two numbers of each, as
    # custom/quantmatmul.py does.
    if given["weight_dtype"] in (FLOAT4_E2M1, FLOAT4_E1M2):
        return "torchair gives a weight of 4-bit floats in uint8 a wrong shape"
    return None


_LIMITS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "npu::npu_quant_matmul": _quant_matmul,
    "npu::npu_rotary_mul": _rotary_mul,
    "npu::npu_weight_quant_batchmatmul": _weight_quant_batchmatmul,
}


def _is_950() -> bool:
    """Does torchair lower for the Ascend 950? It asks the device, or the stand-in for one."""
    return bool(sys.modules["torchair._utils.check_platform"].is_arch35())
