from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.cpu import add_rms_norm as compiled
from npu_fusion.kernels.reference import add_rms_norm as reference
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


def compare(x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> None:
    results = compiled.npu_add_rms_norm(x1, x2, gamma, epsilon)
    expected = reference.npu_add_rms_norm(x1, x2, gamma, epsilon)
    assert_agrees(results, expected)
    # The sum has no freedom.
    assert_same(results[2], expected[2])
    wide, *others = compiled.npu_add_rms_norm_cast(x1, x2, gamma, epsilon)
    for cast, plain in zip([wide, *others], [results[0].float(), *results], strict=True):
        assert_same(cast, plain)


def assert_same(result: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 6),
    width=widths,
    dtype=dtypes,
    epsilon=st.sampled_from([0.0, 1e-6, 1e-2]),
    layout=layouts,
    seed=seeds,
)
def test_agrees_with_the_reference(
    rows: int, width: int, dtype: torch.dtype, epsilon: float, layout: str, seed: int
) -> None:
    x1 = laid_out(normal(rows, width, seed=seed, dtype=dtype), layout)
    x2 = normal(rows, width, seed=seed + 1, dtype=dtype)
    compare(x1, x2, positive(width, seed=seed + 2, dtype=dtype), epsilon)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 32, 45, 600])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_special_rows(dtype: torch.dtype, width: int, epsilon: float) -> None:
    x, gamma = special_rows(width, dtype, seed=width), normal(width, seed=1, dtype=dtype)
    for other in (x, -x, torch.zeros_like(x)):
        compare(x, other, gamma, epsilon)


def test_several_normalized_dimensions() -> None:
    x1, x2, gamma = normal(2, 3, 4, 5, seed=0), normal(2, 3, 4, 5, seed=1), positive(4, 5, seed=2)
    compare(x1, x2, gamma, 1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 1])
def test_sums_that_go_past_the_caches(dtype: torch.dtype, offset: int) -> None:
    """Large and aligned results are stored another way; those that are not aligned cannot be."""
    rows, width = 1030, 2048 + offset
    x1, x2 = (normal(rows, width, seed=seed, dtype=dtype) for seed in (0, 1))
    assert x1.numel() * x1.element_size() >= 4 << 20
    compare(x1, x2, positive(width, seed=2, dtype=dtype), 1e-6)
