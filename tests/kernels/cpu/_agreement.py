"""How far a compiled kernel may be from the reference, and the inputs on which they are compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels._numerics import ulps

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = ["contiguous", "unaligned", "columns of a wider tensor", "transposed"]
SPECIAL_ROWS = 8

dtypes = st.sampled_from(FLOATS)
layouts = st.sampled_from(LAYOUTS)
widths = st.integers(1, 200)
seeds = st.integers(0, 1000)


def assert_agrees(results: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> None:
    """Contiguous results of the same shapes and dtypes: integers equal but for one in 100000 (and at least
    one), which may differ by 1; 16-bit floats within a unit in the last place; float32 within 1e-6."""
    results = [results] if isinstance(results, Tensor) else results
    expected = [expected] if isinstance(expected, Tensor) else expected
    for result, wanted in zip(results, expected, strict=True):
        assert (result.shape, result.dtype) == (wanted.shape, wanted.dtype)
        assert result.is_contiguous()
        if not result.numel():
            continue
        if not result.is_floating_point():
            distance = (result.int() - wanted.int()).abs()
            assert distance.max() <= 1
            assert (distance != 0).sum() <= max(1.0, 1e-5 * distance.numel())
        elif result.element_size() == 2:
            assert torch.equal(result.isnan(), wanted.isnan())
            assert ulps(result.nan_to_num(0), wanted.nan_to_num(0)).max() <= 1
        else:
            # Results that underflow lose the relative accuracy.
            torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-37, equal_nan=True)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def positive(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.05).to(dtype)


def special_rows(width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[SPECIAL_ROWS, width]: zeros, NaN, infinities, the largest and the smallest numbers, a mixture."""
    limits = torch.finfo(dtype)
    x = normal(SPECIAL_ROWS, width, seed=seed, dtype=dtype)
    x[0] = 0
    x[1, width // 2] = torch.nan
    x[2, width - 1] = torch.inf
    x[3, 0] = -torch.inf
    x[4] = limits.max
    x[5] = limits.smallest_normal / 2
    x[6] = -1e-3
    x[7] *= torch.logspace(-4, 4, width).to(dtype)
    return x


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` of two dimensions or more, with other addresses and strides."""
    if layout == "unaligned":
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    if layout == "columns of a wider tensor":
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 7), torch.nan, dtype=x.dtype)
        wide[..., 3:-4] = x
        return wide[..., 3:-4]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x.contiguous()
