from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.cpu import dynamic_quant as compiled
from npu_fusion.kernels.reference import dynamic_quant as reference
from tests.kernels.cpu._agreement import (
    FLOATS,
    assert_agrees,
    dtypes,
    laid_out,
    layouts,
    normal,
    positive,
    seeds,
    special_rows,
    widths,
)

OPERATORS = ["npu_dynamic_quant", "npu_dynamic_quant_asymmetric"]


def compare(operator: str, x: torch.Tensor, **arguments: Any) -> None:
    assert_agrees(getattr(compiled, operator)(x, **arguments), getattr(reference, operator)(x, **arguments))


@settings(max_examples=80, deadline=None)
@given(
    operator=st.sampled_from(OPERATORS),
    rows=st.integers(1, 7),
    width=widths,
    dtype=dtypes,
    smooth=st.sampled_from([None, *FLOATS]),
    groups=st.sampled_from([None, 1, 3]),
    layout=layouts,
    seed=seeds,
)
def test_rows_agree_with_the_reference(
    operator: str,
    rows: int,
    width: int,
    dtype: torch.dtype,
    smooth: torch.dtype | None,
    groups: int | None,
    layout: str,
    seed: int,
) -> None:
    x = laid_out(normal(rows, width, seed=seed, dtype=dtype), layout)
    arguments: dict[str, Any] = {}
    if smooth is not None:
        shape = (width,) if groups is None else (groups, width)
        arguments["smooth_scales"] = positive(*shape, seed=seed + 1, dtype=smooth)
        if groups is not None:
            ends = torch.randint(0, rows + 1, (groups,), generator=torch.Generator().manual_seed(seed))
            arguments["group_index"] = ends.sort().values.int()
    compare(operator, x, **arguments)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 7), width=widths, dtype=dtypes, smooth=st.booleans(), layout=layouts, seed=seeds)
def test_whole_tensors_agree_with_the_reference(
    rows: int, width: int, dtype: torch.dtype, smooth: bool, layout: str, seed: int
) -> None:
    x = laid_out(normal(2, rows, width, seed=seed, dtype=dtype), layout)
    scales = positive(width, seed=seed) if smooth else None
    compare("npu_dynamic_quant", x, smooth_scales=scales, quant_mode="pertensor")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [3, 32, 33, 131])
@pytest.mark.parametrize("smooth", [False, True])
def test_special_rows(operator: str, dtype: torch.dtype, width: int, smooth: bool) -> None:
    x = special_rows(width, dtype, seed=width)
    compare(operator, x, smooth_scales=positive(width, seed=1, dtype=dtype) if smooth else None)
    if operator == "npu_dynamic_quant":
        for row in x:
            compare(operator, row.expand(2, -1), quant_mode="pertensor")


@pytest.mark.parametrize("operator", OPERATORS)
def test_ends_of_groups_that_go_back_are_empty_groups(operator: str) -> None:
    x, smooth = normal(6, 40, seed=0), positive(4, 40, seed=1)
    ends = torch.tensor([2, 1, -3, 5], dtype=torch.int32)
    compare(operator, x, smooth_scales=smooth, group_index=ends)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(64, 4096), (3, 2, 9217)])
def test_large_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for operator in OPERATORS:
        compare(operator, normal(*shape, seed=0, dtype=dtype))
    compare("npu_dynamic_quant", normal(*shape, seed=0, dtype=dtype), quant_mode="pertensor")


def test_ties_round_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]], dtype=torch.bfloat16)
    y, _ = compiled.npu_dynamic_quant(x)
    assert y.tolist() == [[127, 0, 2, 2, 0, -2, -127]]


def test_what_it_leaves_to_the_reference() -> None:
    x = normal(4, 8, seed=0)
    for operator in OPERATORS:
        function = getattr(compiled, operator)
        assert function(x, dst_type=16) is NotImplemented
        for floats in (23, 24, 290, 291, 292):
            assert function(x, dst_type=floats) is NotImplemented
        assert function(x, dst_type=290, dst_type_max=15.0) is NotImplemented
        assert function(x, quant_mode="perchannel") is NotImplemented
        assert function(x[:, :0]) is NotImplemented
        assert function(x[:0]) is NotImplemented
        assert function(x, dst_type=1) is not NotImplemented
    assert compiled.npu_dynamic_quant_asymmetric(x, quant_mode="pertensor") is NotImplemented
