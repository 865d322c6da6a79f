from __future__ import annotations

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from tests.kernels._numerics import assert_correctly_rounded

interleave_rope = torch.ops.npu.npu_interleave_rope
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _exact(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula in float64, column by column."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    half = x.shape[-1] // 2
    first = [x[..., 2 * i] * cos[..., i] - x[..., 2 * i + 1] * sin[..., i] for i in range(half)]
    second = [
        x[..., 2 * i + 1] * cos[..., half + i] + x[..., 2 * i] * sin[..., half + i] for i in range(half)
    ]
    return torch.stack(first + second, dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "cos_shape"),
    [
        ((2, 3, 5, 64), (2, 1, 5, 64)),
        ((2, 3, 5, 64), (1, 1, 5, 64)),
        ((2, 3, 5, 64), (2, 1, 1, 64)),
        ((2, 3, 5, 64), (1, 1, 1, 64)),
        ((32, 4, 1, 64), (32, 1, 1, 64)),
        ((1, 2, 3, 2), (1, 1, 3, 2)),
        ((1, 2, 3, 10), (1, 1, 3, 10)),
    ],
)
def test_matches_float64(shape: tuple[int, ...], cos_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    cos, sin = (torch.rand(cos_shape).to(dtype) * 2 - 1 for _ in range(2))
    y = interleave_rope(x, cos, sin)
    assert y.dtype == dtype
    if dtype == torch.float32:
        # The two products may cancel, so the error is relative to them and not to their sum.
        torch.testing.assert_close(y.double(), _exact(x, cos, sin), rtol=1e-6, atol=1e-6)
    else:
        assert_correctly_rounded(y, _exact(x, cos, sin))


def test_the_output_is_de_interleaved() -> None:
    x = torch.arange(8.0).view(1, 1, 1, 8)
    one, zero = torch.ones(1, 1, 1, 8), torch.zeros(1, 1, 1, 8)
    assert interleave_rope(x, one, zero).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert interleave_rope(x, zero, one).flatten().tolist() == [-1, -3, -5, -7, 0, 2, 4, 6]


def test_the_two_halves_of_the_cosine_are_used() -> None:
    x = torch.ones(1, 1, 1, 4)
    cos = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    assert interleave_rope(x, cos, torch.zeros(1, 1, 1, 4)).flatten().tolist() == [1, 2, 3, 4]


def test_cosine_comes_before_sine() -> None:
    x, cos, sin = torch.randn(2, 3, 5, 64), torch.randn(2, 1, 5, 64), torch.randn(2, 1, 5, 64)
    assert not torch.allclose(interleave_rope(x, cos, sin), interleave_rope(x, sin, cos))


def test_is_a_complex_rotation_of_adjacent_pairs() -> None:
    """What DeepSeek's reference does with complex numbers, up to where the result is stored."""
    x, angle = torch.randn(2, 3, 5, 64), torch.randn(1, 1, 5, 32)
    turned = torch.view_as_complex(x.view(2, 3, 5, 32, 2)) * torch.polar(torch.ones_like(angle), angle)
    full = torch.cat((angle, angle), dim=-1)
    y = interleave_rope(x, full.cos(), full.sin())
    torch.testing.assert_close(y, torch.cat((turned.real, turned.imag), dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_give_a_fresh_contiguous_output(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 3, 8).to(dtype).transpose(1, 2)
    cos, sin = torch.randn(2, 1, 1, 5, 16).to(dtype)[..., ::2]
    before = [t.clone() for t in (x, cos, sin)]
    y = interleave_rope(x, cos, sin)
    assert torch.equal(y, interleave_rope(x.contiguous(), cos.contiguous(), sin.contiguous()))
    assert y.is_contiguous()
    y.zero_()
    assert all(torch.equal(t, b) for t, b in zip((x, cos, sin), before, strict=True))


def test_no_rows() -> None:
    cos = torch.ones(1, 1, 5, 8)
    assert interleave_rope(torch.empty(0, 3, 5, 8), cos, cos).shape == (0, 3, 5, 8)
