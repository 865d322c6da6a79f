"""What torchair's converters to GE make of the operators that the passes emit, and which of them are wrong.

The wrong ones are pinned to what they do, so that a release that mends them shows here, and what
:mod:`npu_fusion.hosts._ge_limits` says of them can go.
"""

from __future__ import annotations

import inspect
from typing import Any
from unittest import mock

import pytest
import torch
import torch_npu
import torchair._ge_concrete_graph.ge_converter.custom  # noqa: F401  (registers the converters)
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses import FakeTensorMode
from torchair.ge._ge_graph import DataType, torch_dtype_value_to_ge_type

from npu_fusion.config import fusion_flags
from npu_fusion.hosts._ge_limits import why_not
from npu_fusion.meta_impls._dtypes import E8M0, FLOAT4_E1M2, FLOAT4_E2M1, HIFLOAT8
from tests.ascend._lowering import Lowered, lower, lower_only
from tests.passes import _mla, test_rotary_mul

npu = torch.ops.npu
EMITTED = (
    "npu_add_rms_norm",
    "npu_add_rms_norm_dynamic_quant",
    "npu_dequant_swiglu_quant",
    "npu_dynamic_quant",
    "npu_interleave_rope",
    "npu_kv_rmsnorm_rope_cache",
    "npu_kv_rmsnorm_rope_cache_v2_functional",
    "npu_mla_prolog",
    "npu_mla_prolog_v2",
    "npu_mla_prolog_v3_functional",
    "npu_quant_matmul",
    "npu_quantize",
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_swiglu",
)
CALLED = ("npu_dynamic_mx_quant", "npu_trans_quant_param")
"""What quantized models call themselves, besides."""
NOT_TAKEN = {
    ("npu_kv_rmsnorm_rope_cache_v2_functional", name) for name in ("k_cache_dtype", "ckv_cache_dtype")
}
OTHER_DEFAULTS = {("npu_dynamic_quant", "dst_type"): (None, 1)}
"""Of the schema and of the converter: int8 either way."""


def untouched(fn: Any, *args: Any, **options: Any) -> Lowered:
    """Lower a function as it is, without any fusion."""
    flags: dict[str, Any] = dict.fromkeys(fusion_flags(), False)
    return lower(fn, args, **flags, **options)


@pytest.mark.parametrize("name", [*EMITTED, *CALLED])
def test_converters_take_what_the_schema_has(name: str) -> None:
    """Same order of positional arguments, same defaults: FX leaves out what is the schema's default."""
    operator = getattr(npu, name).default
    parameters = inspect.signature(operator._ge_converter).parameters
    for position, argument in enumerate(operator._schema.arguments):
        if not argument.kwarg_only:
            parameter = list(parameters.values())[position]
        elif (name, argument.name) in NOT_TAKEN:
            assert argument.name not in parameters
            continue
        else:
            parameter = parameters[argument.name]
        if argument.has_default_value():
            defaults = (argument.default_value, parameter.default)
            expected = OTHER_DEFAULTS.get((name, argument.name), (defaults[0], defaults[0]))
            assert defaults == expected, argument.name


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (23, "FLOAT8_E5M2"),
        (24, "FLOAT8_E4M3FN"),
        (HIFLOAT8, "HIFLOAT8"),
        (291, "FLOAT8_E5M2"),
        (292, "FLOAT8_E4M3FN"),
        (E8M0, "FLOAT8_E8M0"),
        (FLOAT4_E2M1, "FLOAT4_E2M1"),
        (FLOAT4_E1M2, "FLOAT4_E1M2"),
    ],
)
def test_numbers_of_dtypes_mean_the_same(number: int, name: str) -> None:
    assert torch_dtype_value_to_ge_type(number) == getattr(DataType, f"DT_{name}")


def node(*shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
    with FakeTensorMode():
        value = torch.empty(shape, dtype=dtype)
    made = fx.Graph().placeholder("x")
    made.meta["val"] = value
    return made


X, ANGLES = node(2, 3, 5, 16), node(1, 1, 5, 16)


@pytest.mark.parametrize(
    ("args", "wrong"),
    [
        ((X, ANGLES, ANGLES), None),
        ((X, ANGLES, ANGLES, "half"), None),
        ((X, ANGLES, ANGLES, "interleave"), "'half', not to 'interleave'"),
        ((X, ANGLES, ANGLES, "quarter"), "'half', not to 'quarter'"),
        ((X, ANGLES, ANGLES, "interleave", node(16, 16)), None),
        ((X, ANGLES, ANGLES, "quarter", node(16, 16)), "'half', not to 'quarter'"),
    ],
)
def test_rotary_mul_loses_its_mode(args: tuple[Any, ...], wrong: str | None) -> None:
    reason = why_not(npu.npu_rotary_mul.default, args, {})
    assert reason == (None if wrong is None else f"torchair lowers npu_rotary_mul to {wrong}")
    with mock.patch.object(torch_npu.npu, "get_device_name", return_value="Ascend950PR_9599"):
        assert why_not(npu.npu_rotary_mul.default, args, {}) is None


def test_rotary_mul_of_pairs_is_lowered_as_halves() -> None:
    args = test_rotary_mul.data(torch.float32)
    with pytest.raises(AssertionError, match="not close"):  # of the GE graph and the FX graph
        untouched(lambda *a: npu.npu_rotary_mul(*a, "interleave"), *args)
    got = untouched(lambda *a: npu.npu_rotary_mul(*a, "half"), *args)
    assert got.graph.counts["RotaryMul"] == 1


@pytest.mark.parametrize("axis", [-2, -1, 0, 1, 2])
def test_quantize_by_factors_means_the_same_axis(axis: int) -> None:
    x, scale = torch.randn(4, 6, 6), torch.rand(6) * 20
    got = untouched(lambda x, s: npu.npu_quantize(x, s, None, torch.qint8, axis, False), x, scale)
    assert got.graph.only("AscendQuantV2").attribute("axis", None) == (-2 if axis == -2 else -1)


@pytest.mark.parametrize(
    ("scale", "keywords", "result"),
    [
        (torch.float32, {}, "int8"),
        (torch.float32, {"output_dtype": 1}, "int8"),
        (torch.float32, {"output_dtype": torch.int8}, "int8"),
        (torch.float32, {"output_dtype": 5}, "float16"),
        (torch.float32, {"output_dtype": 5, "pertoken_scale": node(2)}, None),
        (torch.float32, {"output_dtype": 15}, None),
        (torch.float32, {"output_dtype": 3}, None),
        (torch.int64, {"output_dtype": 1}, None),
        (torch.int64, {"output_dtype": 5}, None),
    ],
)
def test_quant_matmul_takes_packed_scales(
    scale: torch.dtype, keywords: dict[str, Any], result: str | None
) -> None:
    q, w = node(2, 16, dtype=torch.int8), node(16, 8, dtype=torch.int8)
    reason = why_not(npu.npu_quant_matmul.default, (q, w, node(8, dtype=scale)), keywords)
    expected = f"in graph mode npu_quant_matmul takes no float32 scale for a result in {result}"
    assert reason == (None if result is None else expected)


def test_int_mm_is_not_implemented() -> None:
    operator: Any = torch.ops.aten._int_mm.default
    assert why_not(operator, (X, X), {}) == "torchair's GE converter of aten._int_mm is not implemented"
    with pytest.raises(NotImplementedError):
        operator._ge_converter(None, None)


def test_mla_prolog_v3_in_place_returns_too_much() -> None:
    operator = npu.npu_mla_prolog_v3.default
    assert (
        why_not(operator, (), {})
        == "torchair's GE converter of npu_mla_prolog_v3 returns seven results, not five"
    )
    model = _mla.Prolog(_mla.Spelling())

    def in_place(graph: fx.Graph) -> None:
        (found,) = graph.find_nodes(op="call_function", target=npu.npu_mla_prolog_v3_functional.default)
        found.target = operator
        for item in list(found.users):
            if item.args[1] > 4:  # the caches, which are the arguments 9 and 10
                item.replace_all_uses_with(found.args[item.args[1] + 4])
                graph.erase_node(item)

    with pytest.raises(BackendCompilerFailed, match="length of ge_outputs must be equal to meta_outputs"):
        lower_only("mla_prolog", model, _mla.inputs(model), afterwards=in_place)


def test_an_argument_that_the_converter_does_not_have() -> None:
    operator = npu.npu_kv_rmsnorm_rope_cache_v2_functional.default
    assert why_not(operator, (), {"epsilon": 1e-5, "cache_mode": "PA"}) is None
    reason = why_not(operator, (), {"k_cache_dtype": 1})
    assert reason == f"torchair's GE converter of {operator} has no argument 'k_cache_dtype'"


def test_calls_without_limits() -> None:
    assert why_not(npu.npu_swiglu.default, (X,), {"dim": -1}) is None
    assert why_not(torch.ops.aten.mul.Tensor, (X, 2.0), {}) is None
    assert why_not(torch.ops.aten.permute.default, (X, [0, 2, 1, 3]), {}) is None


def test_a_reshape_that_copies_is_lowered_as_a_view() -> None:
    """Why the passes put a clone before it: torchair goes by the strides, and these are gone."""

    def without_clone(graph: fx.Graph) -> None:
        (clone,) = graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
        (view,) = clone.users
        view.target, view.args = torch.ops.aten.reshape.default, (clone.args[0], *view.args[1:])
        graph.erase_node(clone)

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(-1) + 1

    assert untouched(transposed, torch.randn(4, 6)).graph.counts["Transpose"] == 1
    with pytest.raises(AssertionError, match="not close"):  # of the GE graph and the FX graph
        untouched(transposed, torch.randn(4, 6), afterwards=without_clone)


def test_what_torchair_cannot_lower_names_the_operator() -> None:
    with pytest.raises(BackendCompilerFailed, match="aten.amax.default ge_converter is not implemented"):
        untouched(lambda x: x.abs().amax(-1), torch.randn(4, 6))
