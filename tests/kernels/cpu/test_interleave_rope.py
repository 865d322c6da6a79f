from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.cpu.interleave_rope import npu_interleave_rope as compiled
from npu_fusion.kernels.reference.interleave_rope import npu_interleave_rope as reference
from tests.kernels.cpu._agreement import FLOATS, dtypes, laid_out, layouts, normal, seeds, special_rows


def assert_same(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """There is no sum and no exponential: every bit is the reference's."""
    result, expected = compiled(x, cos, sin), reference(x, cos, sin)
    assert result.is_contiguous()
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    half_width=st.integers(1, 100),
    broadcast=st.tuples(st.booleans(), st.booleans()),
    dtype=dtypes,
    layout=layouts,
    seed=seeds,
)
def test_agrees_with_the_reference(
    sizes: tuple[int, int, int],
    half_width: int,
    broadcast: tuple[bool, bool],
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    width = 2 * half_width
    x = laid_out(normal(*sizes, width, seed=seed, dtype=dtype), layout)
    shape = (1 if broadcast[0] else sizes[0], 1, 1 if broadcast[1] else sizes[2], width)
    cos, sin = (laid_out(normal(*shape, seed=seed + i, dtype=dtype), layout) for i in (1, 2))
    assert_same(x, cos, sin)


@pytest.mark.parametrize("dtype", FLOATS)
def test_queries_as_models_give_them(dtype: torch.dtype) -> None:
    x = normal(2, 300, 4, 64, seed=0, dtype=dtype).transpose(1, 2)
    cos, sin = (normal(2, 1, 300, 64, seed=seed, dtype=dtype) for seed in (1, 2))
    assert_same(x, cos, sin)


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_rows(dtype: torch.dtype) -> None:
    x = special_rows(70, dtype, seed=0).view(2, 2, 2, 70)
    cos, sin = (normal(2, 1, 2, 70, seed=seed, dtype=dtype) for seed in (1, 2))
    assert_same(x, cos, sin)


def test_it_leaves_empty_inputs_to_the_reference() -> None:
    x = normal(1, 2, 3, 8, seed=0)
    assert compiled(x[:0], x[:0, :1], x[:0, :1]) is NotImplemented
