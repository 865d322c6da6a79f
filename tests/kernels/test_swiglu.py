from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from tests.kernels._numerics import ulps
from tests.kernels._swiglu import swish

swiglu = torch.ops.npu.npu_swiglu
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def exact_swiglu(x: Tensor, dim: int) -> Tensor:
    """float64, element by element."""
    rows = x.double().movedim(dim, -1)
    half = rows.shape[-1] // 2
    flat = rows.reshape(-1, 2 * half).tolist()
    values = [[swish(row[i]) * row[half + i] for i in range(half)] for row in flat]
    return torch.tensor(values, dtype=torch.float64).reshape(*rows.shape[:-1], half).movedim(-1, dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "dim"), [((8,), -1), ((5, 8), -1), ((5, 8), 1), ((6, 4), 0), ((2, 4, 6), 1), ((2, 4, 6), -3)]
)
def test_matches_float64(dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(shape).mul(4).to(dtype)
    y = swiglu(x, dim)
    exact = exact_swiglu(x, dim)
    assert (y.shape, y.dtype) == (exact.shape, dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=0)
    else:
        assert torch.equal(y, exact.to(dtype))


def test_activates_the_first_half() -> None:
    x = torch.tensor([[2.0, -30.0]])
    torch.testing.assert_close(swiglu(x), torch.tensor([[swish(2.0) * -30.0]]))
    assert swiglu(x).item() != pytest.approx(swish(-30.0) * 2.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_rounding_where_silu_times_rounds_twice(dtype: torch.dtype) -> None:
    x = torch.randn(256, 128).to(dtype)
    first, second = x.chunk(2, -1)
    y, twice = swiglu(x), torch.nn.functional.silu(first) * second
    assert ulps(y, twice).max() == 1
    exact = first.double().sigmoid() * first.double() * second.double()
    assert (y.double() - exact).abs().mean() < (twice.double() - exact).abs().mean()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_magnitudes_neither_overflow_nor_become_nan(dtype: torch.dtype) -> None:
    x = torch.tensor([[-200.0, 200.0, 3.0, 3.0]], dtype=dtype)
    assert torch.equal(swiglu(x), torch.tensor([[0.0, 600.0]], dtype=dtype))


def test_strided_input_gives_a_fresh_contiguous_output() -> None:
    x = torch.randn(8, 3, 5).permute(2, 1, 0)
    before = x.clone()
    y = swiglu(x)
    assert torch.equal(y, swiglu(x.contiguous()))
    assert y.is_contiguous()
    y.zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("shape", "dim", "result"), [((0, 8), -1, (0, 4)), ((3, 0), -1, (3, 0)), ((0, 8), 0, (0, 8))]
)
def test_empty(shape: tuple[int, ...], dim: int, result: tuple[int, ...]) -> None:
    assert swiglu(torch.empty(shape), dim).shape == result


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
    seed=st.integers(0, 2**16),
)
def test_any_dimension(shape: list[int], data: st.DataObject, seed: int) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] *= 2
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10
    torch.testing.assert_close(swiglu(x, dim).double(), exact_swiglu(x, dim), rtol=1e-6, atol=0)
