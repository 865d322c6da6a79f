from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import npu_fusion  # noqa: F401  (registers the operators)
from tests.kernels._numerics import assert_correctly_rounded, rms_norm_float64, ulps

rms_norm = torch.ops.npu.npu_rms_norm
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "normalized"),
    [
        ((64,), 1),
        ((33, 128), 1),
        ((2, 3, 48), 1),
        ((2, 3, 4, 16), 2),
        ((5, 7), 2),
        ((1, 2, 1, 2, 3, 2, 1, 9), 1),
    ],
)
def test_matches_float64(dtype: torch.dtype, shape: tuple[int, ...], normalized: int) -> None:
    x = torch.randn(shape).mul(3).to(dtype)
    gamma = torch.randn(shape[-normalized:]).to(dtype)
    y, rstd = rms_norm(x, gamma, 1e-5)
    assert_correctly_rounded(y, rms_norm_float64(x.double(), gamma, 1e-5))
    dims = list(range(-normalized, 0))
    exact = (x.double().square().mean(dims, keepdim=True) + 1e-5).rsqrt()
    assert rstd.dtype == torch.float32
    assert rstd.shape == (*shape[:-normalized], *[1] * normalized)
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-6, atol=0)


def test_float32_gamma_is_not_rounded_to_the_input_dtype() -> None:
    x = torch.randn(16, 64).bfloat16()
    gamma = torch.randn(64)
    y, _ = rms_norm(x, gamma)
    assert y.dtype == torch.bfloat16
    assert_correctly_rounded(y, rms_norm_float64(x.double(), gamma, 1e-6))
    assert not torch.equal(y, rms_norm(x, gamma.bfloat16())[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_rounding_where_hugging_face_rounds_twice(dtype: torch.dtype) -> None:
    x, gamma = torch.randn(256, 128).to(dtype), torch.randn(128).to(dtype)
    y, rstd = rms_norm(x, gamma)
    twice = gamma * (x.float() * rstd).to(dtype)
    distance = ulps(y, twice)
    assert distance.max() == 1
    exact = rms_norm_float64(x.double(), gamma, 1e-6)
    error, error_twice = ((v.double() - exact).abs().mean() for v in (y, twice))
    assert error < error_twice


def test_default_epsilon() -> None:
    x, gamma = torch.full((2, 4), 1e-4), torch.ones(4)
    y, _ = rms_norm(x, gamma)
    torch.testing.assert_close(y, torch.full((2, 4), 1e-4 / (1e-8 + 1e-6) ** 0.5))


def test_zero_row() -> None:
    y, rstd = rms_norm(torch.zeros(3, 8), torch.randn(8), 1e-4)
    assert torch.equal(y, torch.zeros(3, 8))
    torch.testing.assert_close(rstd, torch.full((3, 1), 100.0))


def test_squares_beyond_float16_do_not_overflow() -> None:
    x = torch.full((2, 16), 60000.0, dtype=torch.float16)
    y, _ = rms_norm(x, torch.ones(16, dtype=torch.float16))
    assert torch.equal(y, torch.ones(2, 16, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_give_fresh_contiguous_outputs(dtype: torch.dtype) -> None:
    x = torch.randn(16, 4, 6).to(dtype).permute(2, 1, 0)
    gamma = torch.randn(32).to(dtype)[::2]
    x_before, gamma_before = x.clone(), gamma.clone()
    y, rstd = rms_norm(x, gamma)
    y_expected, rstd_expected = rms_norm(x.contiguous(), gamma.contiguous())
    assert torch.equal(y, y_expected)
    assert torch.equal(rstd, rstd_expected)
    assert y.is_contiguous()
    assert rstd.is_contiguous()
    y.zero_()
    rstd.zero_()
    assert torch.equal(x, x_before)
    assert torch.equal(gamma, gamma_before)


def test_no_rows() -> None:
    y, rstd = rms_norm(torch.empty(0, 3, 8), torch.ones(8))
    assert y.shape == (0, 3, 8)
    assert rstd.shape == (0, 3, 1)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 40),
    exponent=st.integers(-20, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_properties(rows: int, columns: int, exponent: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator).to(dtype)
    gamma = torch.randn(columns, generator=generator).to(dtype)
    y, rstd = rms_norm(x, gamma, 1e-6)
    exact = rms_norm_float64(x.double(), gamma, 1e-6)
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    # Rows are independent of each other.
    order = torch.randperm(rows, generator=generator)
    y_permuted, rstd_permuted = rms_norm(x[order], gamma, 1e-6)
    assert torch.equal(y_permuted, y[order])
    assert torch.equal(rstd_permuted, rstd[order])
    # The scale of the input is irrelevant up to epsilon: a power of 4 goes through exactly.
    factor = 4.0**exponent
    wide = x.float()
    y_scaled, _ = rms_norm(wide * factor, gamma.float(), epsilon=1e-6 * factor * factor)
    torch.testing.assert_close(y_scaled, rms_norm(wide, gamma.float(), 1e-6)[0], rtol=1e-6, atol=1e-7)
