from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.cpu.swiglu import npu_swiglu as compiled
from npu_fusion.kernels.reference.swiglu import npu_swiglu as reference
from tests.kernels.cpu._agreement import (
    FLOATS,
    assert_agrees,
    dtypes,
    laid_out,
    layouts,
    normal,
    seeds,
    special_rows,
    widths,
)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 6), width=widths, dtype=dtypes, layout=layouts, seed=seeds)
def test_agrees_with_the_reference(rows: int, width: int, dtype: torch.dtype, layout: str, seed: int) -> None:
    x = laid_out((4 * normal(rows, 2 * width, seed=seed)).to(dtype), layout)
    assert_agrees(compiled(x), reference(x))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 32, 45])
def test_special_rows(dtype: torch.dtype, width: int) -> None:
    x = special_rows(2 * width, dtype, seed=width)
    assert_agrees(compiled(x), reference(x))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_whole_range_of_the_exponential(dtype: torch.dtype) -> None:
    gate = torch.linspace(-120, 120, 9600).to(dtype)
    x = torch.cat([gate, torch.ones_like(gate)])
    assert_agrees(compiled(x), reference(x))


def test_dimensions() -> None:
    x = normal(4, 6, 8, seed=0, dtype=torch.bfloat16)
    assert_agrees(compiled(x, 2), reference(x, 2))
    assert_agrees(compiled(x[0, 0]), reference(x[0, 0]))
    assert compiled(x, 0) is NotImplemented
    assert compiled(x, -2) is NotImplemented
    assert compiled(x[:0]) is NotImplemented
