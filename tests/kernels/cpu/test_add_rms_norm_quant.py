from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.cpu.add_rms_norm_quant import npu_add_rms_norm_quant as compiled
from npu_fusion.kernels.reference.add_rms_norm_quant import npu_add_rms_norm_quant as reference
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


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 6),
    width=widths,
    dtype=dtypes,
    scale_dtype=dtypes,
    zero_dtype=st.sampled_from([None, torch.int32, *FLOATS]),
    beta=st.booleans(),
    second=st.booleans(),
    divide=st.booleans(),
    layout=layouts,
    seed=seeds,
)
def test_agrees_with_the_reference(
    rows: int,
    width: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    zero_dtype: torch.dtype | None,
    beta: bool,
    second: bool,
    divide: bool,
    layout: str,
    seed: int,
) -> None:
    x1 = laid_out(normal(rows, width, seed=seed, dtype=dtype), layout)
    x2 = normal(rows, width, seed=seed + 1, dtype=dtype)
    gamma = positive(width, seed=seed + 2, dtype=dtype)
    factor = 0.05 if divide else 20.0
    zero = None if zero_dtype is None else (normal(width, seed=seed + 3) * 9).to(zero_dtype)
    arguments: dict[str, Any] = {"div_mode": divide, "epsilon": 1e-5}
    if beta:
        arguments["beta"] = normal(width, seed=seed + 4, dtype=dtype)
    if second:
        arguments["scales2"] = positive(width, seed=seed + 5, dtype=scale_dtype)
        arguments["zero_points2"] = zero
    scale = (positive(width, seed=seed + 6) * factor).to(scale_dtype)
    results = [kernel(x1, x2, gamma, scale, zero, **arguments) for kernel in (compiled, reference)]
    assert_agrees(*results)
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 32, 45])
@pytest.mark.parametrize("divide", [False, True])
def test_special_rows_and_scales(dtype: torch.dtype, width: int, divide: bool) -> None:
    x, gamma = special_rows(width, dtype, seed=width), normal(width, seed=1, dtype=dtype)
    for scale in (0.0, 1e-30, 0.1, 1e30, torch.inf, torch.nan):
        given_scale = torch.full((width,), scale)
        results = [k(x, x, gamma, given_scale, None, div_mode=divide) for k in (compiled, reference)]
        assert_agrees(*results)


def test_several_normalized_dimensions() -> None:
    x, gamma = normal(2, 3, 4, 5, seed=0), positive(4, 5, seed=1)
    scale, zero = positive(4, 5, seed=2) * 0.1, normal(4, 5, seed=3).T.contiguous().T
    assert_agrees(compiled(x, x, gamma, scale, zero), reference(x, x, gamma, scale, zero))


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_rows(dtype: torch.dtype) -> None:
    x1, x2 = normal(64, 4096, seed=0, dtype=dtype), normal(64, 4096, seed=1, dtype=dtype)
    gamma, scale = positive(4096, seed=2, dtype=dtype), positive(4096, seed=3) * 0.05
    assert_agrees(compiled(x1, x2, gamma, scale, None), reference(x1, x2, gamma, scale, None))
