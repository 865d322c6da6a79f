from __future__ import annotations

import pytest
import torch

import npu_fusion  # noqa: F401  (registers the operators)
from tests.kernels._numerics import assert_correctly_rounded, rms_norm_float64, ulps

add_rms_norm = torch.ops.npu.npu_add_rms_norm
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "normalized"), [((64,), 1), ((33, 128), 1), ((2, 3, 4, 16), 2)])
def test_matches_float64(dtype: torch.dtype, shape: tuple[int, ...], normalized: int) -> None:
    x1, x2 = (torch.randn(shape).to(dtype) for _ in range(2))
    gamma = torch.randn(shape[-normalized:]).to(dtype)
    y, rstd, x = add_rms_norm(x1, x2, gamma, 1e-5)
    total = x1.double() + x2.double()
    assert_correctly_rounded(y, rms_norm_float64(total, gamma, 1e-5))
    exact = (total.square().mean(list(range(-normalized, 0)), keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-6, atol=0)
    assert torch.equal(x, x1 + x2)


def test_the_sum_is_the_third_output() -> None:
    x1, x2 = torch.randn(4, 8), torch.randn(4, 8)
    y, rstd, x = add_rms_norm(x1, x2, torch.ones(8))
    assert torch.equal(x, x1 + x2)
    assert rstd.shape == (4, 1)
    assert not torch.equal(y, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_unrounded_sum_is_normalized(dtype: torch.dtype) -> None:
    x1, x2 = (torch.randn(256, 128).to(dtype) for _ in range(2))
    gamma = torch.randn(128).to(dtype)
    y, _, x = add_rms_norm(x1, x2, gamma)
    of_rounded_sum, _ = torch.ops.npu.npu_rms_norm(x, gamma)
    assert 0 < ulps(y, of_rounded_sum).max() <= 2
    exact = rms_norm_float64(x1.double() + x2.double(), gamma, 1e-6)
    assert (y.double() - exact).abs().mean() < (of_rounded_sum.double() - exact).abs().mean()


def test_bfloat16_differs_from_the_a2_rounding_points_by_at_most_one_ulp() -> None:
    x1, x2 = (torch.randn(256, 128).bfloat16() for _ in range(2))
    gamma = torch.randn(128).bfloat16()
    y, rstd, _ = add_rms_norm(x1, x2, gamma)
    a2 = ((x1.float() + x2.float()) * rstd).bfloat16() * gamma
    assert ulps(y, a2).max() == 1


def test_float16_differs_from_the_a2_rounding_points_by_at_most_two_ulps() -> None:
    x1, x2 = (torch.randn(256, 128).half() for _ in range(2))
    gamma = torch.randn(128).half()
    y, _, _ = add_rms_norm(x1, x2, gamma)
    total = (x1 + x2).float()
    a2 = (total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6)).half() * gamma
    assert 0 < ulps(y, a2).max() <= 2


def test_a_sum_beyond_float16_is_normalized_all_the_same() -> None:
    x1 = torch.full((1, 4), 40000.0, dtype=torch.float16)
    y, _, x = add_rms_norm(x1, x1, torch.ones(4, dtype=torch.float16))
    assert torch.equal(y, torch.ones(1, 4, dtype=torch.float16))
    assert torch.isinf(x).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_give_fresh_contiguous_outputs(dtype: torch.dtype) -> None:
    x1, x2 = torch.randn(16, 6).to(dtype).T, torch.randn(6, 16).to(dtype)
    gamma = torch.randn(32).to(dtype)[::2]
    inputs = (x1, x2, gamma)
    before = [t.clone() for t in inputs]
    outputs = add_rms_norm(*inputs)
    expected = add_rms_norm(*(t.contiguous() for t in inputs))
    for output, want in zip(outputs, expected, strict=True):
        assert torch.equal(output, want)
        assert output.is_contiguous()
        output.zero_()
    assert all(torch.equal(t, b) for t, b in zip(inputs, before, strict=True))


def test_no_rows() -> None:
    empty = torch.empty(0, 8)
    y, rstd, x = add_rms_norm(empty, empty, torch.ones(8))
    assert (y.shape, rstd.shape, x.shape) == ((0, 8), (0, 1), (0, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cast_adds_y_in_float32_in_front(dtype: torch.dtype) -> None:
    x1, x2, gamma = torch.randn(3, 64).to(dtype), torch.randn(3, 64).to(dtype), torch.randn(64).to(dtype)
    wide, *rest = torch.ops.npu.npu_add_rms_norm_cast(x1, x2, gamma, 1e-5)
    assert wide.dtype == torch.float32
    for got, expected in zip(rest, add_rms_norm(x1, x2, gamma, 1e-5), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(wide, rest[0].float())
