from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.cpu.quantize import npu_quantize as compiled
from npu_fusion.kernels.reference.quantize import npu_quantize as reference
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

UINT8, INT8, INT32, QINT8 = 0, 1, 3, 12


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 6),
    width=widths,
    dtype=dtypes,
    scale_dtype=dtypes,
    zero_dtype=st.sampled_from([None, torch.int8, torch.uint8, torch.int32, torch.float32]),
    divide=st.booleans(),
    one_scale=st.booleans(),
    layout=layouts,
    seed=seeds,
)
def test_agrees_with_the_reference(
    rows: int,
    width: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    zero_dtype: torch.dtype | None,
    divide: bool,
    one_scale: bool,
    layout: str,
    seed: int,
) -> None:
    x = laid_out(normal(rows, width, seed=seed, dtype=dtype), layout)
    count = 1 if one_scale else width
    scales = (positive(count, seed=seed + 1) * (0.05 if divide else 30)).to(scale_dtype)
    zero = None
    if zero_dtype is not None:
        zero = (positive(count, seed=seed + 2) * 9).to(zero_dtype if divide else scale_dtype)
    arguments = (scales, zero, INT8, 1 if divide else -1, divide)
    results = compiled(x, *arguments)
    assert_agrees(results, reference(x, *arguments))
    assert torch.equal(results, reference(x, *arguments))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 0.1, 1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("divide", [False, True])
def test_special_rows_and_scales(dtype: torch.dtype, scale: float, divide: bool) -> None:
    x = special_rows(45, dtype, seed=0)
    for scales in (torch.tensor([scale]), torch.full((45,), scale)):
        arguments = (scales, None, QINT8, -1, divide)
        assert torch.equal(compiled(x, *arguments), reference(x, *arguments))


def test_what_it_leaves_to_the_reference() -> None:
    x, scales = normal(3, 8, seed=0), positive(8, seed=1)
    assert compiled(x, scales, None, UINT8, 1) is NotImplemented
    assert compiled(x, scales, None, INT32, 1) is NotImplemented
    for floats in (23, 24, 290):
        assert compiled(x, scales, None, floats, 1) is NotImplemented
        assert compiled(x, scales, None, floats, -1, False) is NotImplemented
    assert compiled(x, scales[:3], None, INT8, 0) is NotImplemented
    assert compiled(x, scales[:3], None, INT8, -2, False) is NotImplemented
    assert compiled(x, scales[:, None].T, None, INT8, 0, False) is not NotImplemented
    assert compiled(x[:0], scales, None, INT8, 1) is NotImplemented
