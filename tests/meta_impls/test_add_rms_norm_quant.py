from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_add_rms_norm_quant"


def _arguments(rows: int = 3, dtype: torch.dtype = torch.float16, **changes: Any) -> dict[str, Any]:
    """Every tensor argument given, [rows, 16]; ``changes`` replace them."""
    arguments: dict[str, Any] = {
        "x1": torch.randn(rows, 16).to(dtype),
        "x2": torch.randn(rows, 16).to(dtype),
        "gamma": torch.randn(16).to(dtype),
        "scales1": torch.rand(16) + 0.05,
        "zero_points1": torch.arange(16, dtype=torch.int32),
        "beta": torch.randn(16).to(dtype),
        "scales2": torch.rand(16) + 0.05,
        "zero_points2": torch.arange(16, dtype=torch.int32),
    }
    return {**arguments, **changes}


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fake_and_real_agree(rows: int, dtype: torch.dtype) -> None:
    y1, y2, x = check_operator(NAME, **_arguments(rows, dtype), epsilon=1e-5, div_mode=False)
    assert y1.dtype == y2.dtype == torch.int8
    assert x.dtype == dtype
    assert y1.shape == y2.shape == x.shape == (rows, 16)


def test_optional_tensors_left_out() -> None:
    left_out = dict.fromkeys(["zero_points1", "beta", "scales2", "zero_points2"])
    y1, y2, _ = check_operator(NAME, **_arguments(**left_out))
    assert y1.shape == y2.shape == (3, 16)


def test_strided_inputs_and_several_normalized_dimensions() -> None:
    x = torch.randn(8, 2, 5).bfloat16().permute(2, 1, 0)
    gamma = torch.randn(2, 8).bfloat16()
    check_operator(NAME, x, x.contiguous(), gamma, torch.rand(2, 8) + 0.1, None)


@pytest.mark.parametrize("dst_type", [None, 1, torch.int8])
def test_dst_type_spellings(dst_type: int | torch.dtype | None) -> None:
    y1, _, _ = check_operator(NAME, **_arguments(), dst_type=dst_type)
    assert y1.dtype == torch.int8


@pytest.mark.parametrize("dst_type", [2, 16, torch.float8_e4m3fn])
def test_refuses_other_dst_types(dst_type: int | torch.dtype) -> None:
    """2 is int8 one layer below, in GE; here it is the ScalarType value of int16."""
    check_refused(NAME, "dst_type is .*; accepted: None, 1", **_arguments(), dst_type=dst_type)


def test_dynamic_rows_in_one_graph() -> None:
    fixed = _arguments()
    vectors = [
        fixed[name] for name in ("gamma", "scales1", "zero_points1", "beta", "scales2", "zero_points2")
    ]
    compile_dynamic(
        torch.ops.npu.npu_add_rms_norm_quant.default,
        lambda t: (torch.randn(t, 16).half(), torch.randn(t, 16).half(), *vectors),
        [2, 7, 3],
        dynamic=[(0, 0), (1, 0)],
    )


def test_refuses_an_axis_other_than_the_last() -> None:
    check_refused(NAME, "axis is 1; accepted: -1", **_arguments(), axis=1)


def test_refuses_zero_points2_without_scales2() -> None:
    check_refused(NAME, "zero_points2 is given; accepted: None", **_arguments(scales2=None))


@pytest.mark.parametrize("argument", ["gamma", "beta", "scales1", "scales2", "zero_points1", "zero_points2"])
def test_refuses_another_shape_than_gammas(argument: str) -> None:
    given: Tensor = _arguments()[argument]
    check_refused(
        NAME, rf"{argument} has shape \[8\]; accepted: \[16\]", **_arguments(**{argument: given[:8]})
    )


@pytest.mark.parametrize(
    ("argument", "dtype", "accepted"),
    [
        ("x1", torch.float64, "float16, bfloat16, float32"),
        ("x2", torch.float32, "float16"),
        ("gamma", torch.float32, "float16"),
        ("beta", torch.bfloat16, "float16"),
        ("scales1", torch.int32, "float16, bfloat16, float32"),
        ("scales2", torch.bfloat16, "float32"),
        ("zero_points1", torch.int8, "int32, float16, bfloat16, float32"),
        ("zero_points2", torch.bfloat16, "int32"),
    ],
)
def test_refuses_dtypes(argument: str, dtype: torch.dtype, accepted: str) -> None:
    given: Tensor = _arguments()[argument]
    check_refused(
        NAME, f"{argument} has dtype .*; accepted: {accepted}$", **_arguments(**{argument: given.to(dtype)})
    )


def test_refuses_zero_points2_of_a_wrong_dtype_where_zero_points1_is_left_out() -> None:
    zero = torch.zeros(16, dtype=torch.int8)
    check_refused(NAME, "zero_points2 has dtype int8", **_arguments(zero_points1=None, zero_points2=zero))


def test_refuses_shapes_of_the_addends() -> None:
    check_refused(NAME, r"x2 has shape \[1, 16\]", **_arguments(x2=torch.ones(1, 16).half()))
    ones = torch.ones([1] * 8 + [16]).half()
    check_refused(NAME, "x1 has 9 dimensions; accepted: 1 to 8", **_arguments(x1=ones, x2=ones))
    nothing = {name: tensor[..., :0] for name, tensor in _arguments().items()}
    check_refused(NAME, "accepted: normalized sizes above 0", **nothing)
