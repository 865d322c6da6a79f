from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.cpu.rms_norm import npu_rms_norm as compiled
from npu_fusion.kernels.reference.rms_norm import npu_rms_norm as reference
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


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 6),
    width=widths,
    dtype=dtypes,
    wide_gamma=st.booleans(),
    epsilon=st.sampled_from([0.0, 1e-6, 1e-2]),
    layout=layouts,
    seed=seeds,
)
def test_agrees_with_the_reference(
    rows: int, width: int, dtype: torch.dtype, wide_gamma: bool, epsilon: float, layout: str, seed: int
) -> None:
    x = laid_out(normal(rows, width, seed=seed, dtype=dtype), layout)
    gamma = positive(width, seed=seed + 1, dtype=torch.float32 if wide_gamma else dtype)
    assert_agrees(compiled(x, gamma, epsilon), reference(x, gamma, epsilon))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 32, 45, 600])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_special_rows(dtype: torch.dtype, width: int, epsilon: float) -> None:
    x, gamma = special_rows(width, dtype, seed=width), normal(width, seed=1, dtype=dtype)
    assert_agrees(compiled(x, gamma, epsilon), reference(x, gamma, epsilon))


def test_several_normalized_dimensions() -> None:
    x, gamma = normal(2, 3, 4, 5, seed=0), positive(4, 5, seed=1).T.contiguous().T
    assert_agrees(compiled(x, gamma), reference(x, gamma))
    assert_agrees(compiled(x[0, 0, 0], gamma[0]), reference(x[0, 0, 0], gamma[0]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(64, 4096), (2, 3, 9217), (1, 1 << 20)])
def test_large_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, gamma = normal(*shape, seed=0, dtype=dtype), positive(shape[-1], seed=1, dtype=dtype)
    assert_agrees(compiled(x, gamma), reference(x, gamma))


@pytest.mark.parametrize("value", [0.1, 0.3, 1.7])
@pytest.mark.parametrize("width", [9216, 1 << 20])
def test_the_sum_of_many_equal_squares_does_not_drift(value: float, width: int) -> None:
    """One running sum in fp32 would be off by far more than the last bit."""
    x = torch.full((1, width), value)
    _, rstd = compiled(x, torch.ones(width), 0.0)
    torch.testing.assert_close(rstd.double(), 1 / x[:, :1].double(), rtol=5e-7, atol=0)
