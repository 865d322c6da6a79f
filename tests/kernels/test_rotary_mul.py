from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from tests.kernels._numerics import assert_correctly_rounded

rotary_mul = torch.ops.npu.npu_rotary_mul
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _exact(x: Tensor, r1: Tensor, r2: Tensor, mode: str) -> Tensor:
    """The formula in float64, column by column."""
    x, r1, r2 = x.double(), r1.double(), r2.double()
    width = x.shape[-1]
    columns = []
    for i in range(width):
        if mode == "half":
            partner, sign = (i + width // 2, -1) if i < width // 2 else (i - width // 2, 1)
        else:
            partner, sign = (i + 1, -1) if i % 2 == 0 else (i - 1, 1)
        columns.append(x[..., i] * r1[..., i] + sign * x[..., partner] * r2[..., i])
    return torch.stack(columns, dim=-1)


def _assert_close_to_exact(result: Tensor, x: Tensor, r1: Tensor, r2: Tensor, mode: str) -> None:
    exact = _exact(x, r1, r2, mode)
    if result.dtype == torch.float32:
        # The two products may cancel, so the error is relative to them and not to their sum.
        torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-6)
    else:
        assert_correctly_rounded(result, exact)


def _signed_rotation(width: int, mode: str) -> Tensor:
    """The matrix M with x @ M equal to the rotated x."""
    matrix = torch.zeros(width, width)
    for i in range(width // 2):
        a, b = (i, i + width // 2) if mode == "half" else (2 * i, 2 * i + 1)
        matrix[a, b], matrix[b, a] = 1, -1
    return matrix


# Dimensions of the cosine for the layouts of the documentation, with the input [2, 3, 5, 8].
BROADCASTS = [
    (1, 1, 5, 8),
    (2, 1, 5, 8),
    (2, 3, 5, 8),
    (1, 3, 1, 8),
    (2, 3, 1, 8),
    (2, 1, 1, 8),
    (1, 3, 5, 8),
    (1, 1, 1, 8),
]


@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("r_shape", BROADCASTS)
def test_every_broadcast(r_shape: tuple[int, ...], mode: str) -> None:
    x, r1, r2 = torch.randn(2, 3, 5, 8), torch.randn(r_shape), torch.randn(r_shape)
    _assert_close_to_exact(rotary_mul(x, r1, r2, mode), x, r1, r2, mode)


@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 6, 64, 128])
def test_every_dtype(dtype: torch.dtype, mode: str, width: int) -> None:
    x = torch.randn(2, 3, 5, width).to(dtype)
    r1, r2 = (torch.rand(2, 1, 5, width).to(dtype) * 2 - 1 for _ in range(2))
    result = rotary_mul(x, r1, r2, mode)
    assert result.dtype == dtype
    _assert_close_to_exact(result, x, r1, r2, mode)


def test_computes_in_fp32_and_rounds_once() -> None:
    x = torch.randn(2, 3, 5, 64).bfloat16()
    r1, r2 = (torch.rand(1, 1, 5, 64).bfloat16() for _ in range(2))
    rotated = torch.cat((-x[..., 32:], x[..., :32]), dim=-1)
    in_bfloat16 = x * r1 + rotated * r2
    result = rotary_mul(x, r1, r2)
    exact = _exact(x, r1, r2, "half")
    assert (result.double() - exact).abs().mean() < (in_bfloat16.double() - exact).abs().mean()


def test_half_is_the_default_and_the_modes_differ() -> None:
    x, r1, r2 = (torch.randn(1, 2, 3, 8) for _ in range(3))
    half, interleave = rotary_mul(x, r1, r2, "half"), rotary_mul(x, r1, r2, "interleave")
    assert torch.equal(rotary_mul(x, r1, r2), half)
    assert not torch.allclose(half, interleave)


def test_r1_is_the_cosine_and_r2_the_sine() -> None:
    x = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    angle = torch.full((1, 1, 1, 2), 0.5)
    rotated = rotary_mul(x, angle.cos(), angle.sin())
    torch.testing.assert_close(rotated.flatten(), torch.stack((angle.cos(), angle.sin())).flatten()[[0, 2]])
    assert not torch.allclose(rotary_mul(x, angle.sin(), angle.cos()), rotated)


def test_the_two_halves_of_the_cosine_may_differ() -> None:
    x, r1, r2 = (torch.randn(1, 1, 1, 4) for _ in range(3))
    doubled = torch.cat((r1[..., :2], r1[..., :2]), dim=-1)
    assert not torch.allclose(rotary_mul(x, r1, r2), rotary_mul(x, doubled, r2))


def test_interleave_is_not_interleave_rope() -> None:
    """Interleaved rotation leaves pairs adjacent; interleave_rope stores the evens before the odds."""
    x = torch.randn(2, 3, 5, 8)
    angle = torch.randn(2, 1, 5, 4)
    by_pairs, by_halves = angle.repeat_interleave(2, dim=-1), torch.cat((angle, angle), dim=-1)
    pairs = rotary_mul(x, by_pairs.cos(), by_pairs.sin(), "interleave")
    halves = torch.ops.npu.npu_interleave_rope(x, by_halves.cos(), by_halves.sin())
    assert not torch.allclose(pairs, halves)
    torch.testing.assert_close(torch.cat((pairs[..., 0::2], pairs[..., 1::2]), dim=-1), halves)


@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_replaces_the_rotation(dtype: torch.dtype, mode: str) -> None:
    x, r1, r2 = (torch.randn(2, 3, 5, 8).to(dtype) for _ in range(3))
    matrix = _signed_rotation(8, mode).bfloat16()
    expected = rotary_mul(x, r1, r2, mode)
    assert torch.equal(rotary_mul(x, r1, r2, mode, matrix), expected)
    # The matrix decides, whatever the mode says.
    other = "interleave" if mode == "half" else "half"
    assert torch.equal(rotary_mul(x, r1, r2, other, rotate=matrix), expected)


def test_rotate_may_be_any_matrix() -> None:
    x, r1, r2, matrix = torch.randn(2, 3, 5, 8), *torch.randn(2, 1, 1, 5, 8), torch.randn(8, 8)
    exact = x.double() * r1 + x.double() @ matrix.double() * r2
    torch.testing.assert_close(rotary_mul(x, r1, r2, rotate=matrix).double(), exact, rtol=1e-5, atol=1e-5)


def test_the_documented_interleave_matrix_lacks_the_minus_sign() -> None:
    x, r1, r2 = (torch.randn(1, 2, 3, 8) for _ in range(3))
    documented = _signed_rotation(8, "interleave").abs()
    assert not torch.allclose(
        rotary_mul(x, r1, r2, "interleave", documented), rotary_mul(x, r1, r2, "interleave")
    )


@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_give_a_fresh_contiguous_output(dtype: torch.dtype, mode: str) -> None:
    x = torch.randn(2, 5, 3, 8).to(dtype).transpose(1, 2)
    r1, r2 = torch.randn(2, 1, 1, 5, 16).to(dtype)[..., ::2]
    matrix = torch.randn(8, 8).T
    for rotate in (None, matrix):
        before = [t.clone() for t in (x, r1, r2, matrix)]
        result = rotary_mul(x, r1, r2, mode, rotate)
        expected = rotary_mul(x.contiguous(), r1.contiguous(), r2.contiguous(), mode, rotate)
        assert result.is_contiguous()
        torch.testing.assert_close(result, expected)
        result.zero_()
        assert all(torch.equal(t, b) for t, b in zip((x, r1, r2, matrix), before, strict=True))


def test_no_rows() -> None:
    x, r = torch.empty(0, 3, 5, 8), torch.ones(1, 1, 5, 8)
    assert rotary_mul(x, r, r).shape == (0, 3, 5, 8)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    pairs=st.integers(1, 12),
    mode=st.sampled_from(["half", "interleave"]),
    seed=st.integers(0, 2**16),
)
def test_properties(sizes: tuple[int, int, int], pairs: int, mode: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, heads, sequence = sizes
    x = torch.randn(batch, heads, sequence, 2 * pairs, generator=generator)

    def rotate(x: Tensor, angle: Tensor) -> Tensor:
        full = torch.cat((angle, angle), dim=-1) if mode == "half" else angle.repeat_interleave(2, dim=-1)
        return rotary_mul(x, full.cos(), full.sin(), mode)

    a, b = torch.randn(2, batch, 1, sequence, pairs, generator=generator)
    # A rotation of each pair: it keeps the norm, angles add up, angle 0 does nothing.
    torch.testing.assert_close(rotate(x, a).norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate(rotate(x, a), b), rotate(x, a + b), rtol=1e-4, atol=1e-5)
    assert torch.equal(rotate(x, torch.zeros_like(a)), x)
    # The layout is only a matter of names: BNSD and BSND give the same vectors.
    full = torch.cat((a, b), dim=-1)
    bnsd = rotary_mul(x, full.cos(), full.sin(), mode)
    swapped = full.transpose(1, 2)
    bsnd = rotary_mul(x.transpose(1, 2), swapped.cos(), swapped.sin(), mode)
    assert torch.equal(bsnd, bnsd.transpose(1, 2))
