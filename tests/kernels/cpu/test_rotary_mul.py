from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.cpu.rotary_mul import npu_rotary_mul as compiled
from npu_fusion.kernels.reference.rotary_mul import npu_rotary_mul as reference
from tests.kernels.cpu._agreement import FLOATS, dtypes, laid_out, layouts, normal, seeds, special_rows

MODES = ["half", "interleave"]


def assert_same(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: str) -> None:
    """There is no sum and no exponential: every bit is the reference's."""
    result, expected = compiled(x, cos, sin, mode), reference(x, cos, sin, mode)
    assert result.is_contiguous()
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    half_width=st.integers(1, 100),
    broadcast=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dtype=dtypes,
    mode=st.sampled_from(MODES),
    layout=layouts,
    seed=seeds,
)
def test_agrees_with_the_reference(
    sizes: tuple[int, int, int],
    half_width: int,
    broadcast: tuple[bool, bool, bool],
    dtype: torch.dtype,
    mode: str,
    layout: str,
    seed: int,
) -> None:
    width = 2 * half_width
    x = laid_out(normal(*sizes, width, seed=seed, dtype=dtype), layout)
    shape = [1 if one else size for one, size in zip(broadcast, sizes, strict=True)]
    cos, sin = (laid_out(normal(*shape, width, seed=seed + i, dtype=dtype), layout) for i in (1, 2))
    assert_same(x, cos, sin, mode)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [64, 128])
def test_queries_as_models_give_them(dtype: torch.dtype, mode: str, width: int) -> None:
    x = normal(2, 300, 4, width, seed=0, dtype=dtype).transpose(1, 2)
    for shape in ((1, 1, 300, width), (2, 1, 300, width)):
        cos, sin = (normal(*shape, seed=seed, dtype=dtype) for seed in (1, 2))
        assert_same(x, cos, sin, mode)
        assert_same(x.transpose(1, 2), cos.transpose(1, 2), sin.transpose(1, 2), mode)
        assert_same(x, cos.expand(2, 4, -1, -1), sin.expand(2, 4, -1, -1), mode)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", MODES)
def test_special_rows(dtype: torch.dtype, mode: str) -> None:
    x = special_rows(70, dtype, seed=0).view(2, 2, 2, 70)
    cos, sin = (normal(2, 1, 2, 70, seed=seed, dtype=dtype) for seed in (1, 2))
    assert_same(x, cos, sin, mode)
    assert_same(x, x, x, mode)


def test_what_it_leaves_to_the_reference() -> None:
    x = normal(1, 2, 3, 8, seed=0)
    assert compiled(x, x, x, "half", torch.eye(8)) is NotImplemented
    assert compiled(x[:0], x[:0], x[:0]) is NotImplemented
