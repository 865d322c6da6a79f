from __future__ import annotations

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from tests.kernels._numerics import rms_norm_float64

add_rms_norm_quant = torch.ops.npu.npu_add_rms_norm_quant
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _normalized_to(values: list[float], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """x1, x2, gamma for which the normalized row is exactly ``values`` (with epsilon 0)."""
    ones = torch.ones(1, len(values), dtype=dtype)
    return ones, ones, torch.tensor(values, dtype=dtype)


def _assert_quantized(y: Tensor, exact: Tensor) -> None:
    """``y`` is int8 and the float64 ``exact``, rounded and saturated; 1 off is allowed at a halfway point."""
    assert y.dtype == torch.int8
    difference = (y.double() - exact.round().clamp(-128, 127)).abs()
    halfway = (exact - exact.floor() - 0.5).abs() < 1e-4
    assert difference.max() <= 1
    assert torch.equal(difference != 0, (difference != 0) & halfway)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("div_mode", [True, False])
@pytest.mark.parametrize("with_beta", [True, False])
@pytest.mark.parametrize(
    ("scale_dtype", "zero_dtype"),
    [(torch.float32, torch.int32), (torch.bfloat16, torch.bfloat16), (torch.float32, None)],
)
def test_matches_float64(
    dtype: torch.dtype,
    div_mode: bool,
    with_beta: bool,
    scale_dtype: torch.dtype,
    zero_dtype: torch.dtype | None,
) -> None:
    x1, x2 = (torch.randn(2, 9, 64).to(dtype) for _ in range(2))
    gamma = torch.randn(64).to(dtype)
    beta = torch.randn(64).to(dtype) if with_beta else None
    # About one value in ten saturates.
    factors = [torch.rand(64) * 0.02 + 0.01 for _ in range(2)]
    scales = [(f if div_mode else 1 / f).to(scale_dtype) for f in factors]
    zeros = [None if zero_dtype is None else torch.randint(-9, 9, (64,)).to(zero_dtype) for _ in range(2)]
    y1, y2, x = add_rms_norm_quant(
        x1,
        x2,
        gamma,
        scales[0],
        zeros[0],
        beta=beta,
        scales2=scales[1],
        zero_points2=zeros[1],
        epsilon=1e-5,
        div_mode=div_mode,
    )
    n = rms_norm_float64(x1.double() + x2.double(), gamma, 1e-5, beta)
    for y, scale, zero in zip((y1, y2), scales, zeros, strict=True):
        quotient = n / scale.double() if div_mode else n * scale.double()
        _assert_quantized(y, quotient if zero is None else quotient + zero.double())
    assert torch.equal(x, x1 + x2)


def test_halves_round_to_even() -> None:
    x1, x2, gamma = _normalized_to([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    y1, _, _ = add_rms_norm_quant(x1, x2, gamma, torch.ones(6), None, epsilon=0.0)
    assert y1.tolist() == [[0, 2, 2, 0, -2, -2]]


def test_saturates_and_does_not_wrap() -> None:
    x1, x2, gamma = _normalized_to([300.0, -300.0, 127.5, -128.5, 200.0, -200.0], torch.float16)
    y1, _, _ = add_rms_norm_quant(x1, x2, gamma, torch.ones(6), None, epsilon=0.0)
    assert y1.tolist() == [[127, -128, 127, -128, 127, -128]]


def test_the_zero_point_is_added_before_rounding() -> None:
    x1, x2, gamma = _normalized_to([0.25, 0.75])
    zero = torch.tensor([0.25, 0.75], dtype=torch.bfloat16)
    y1, _, _ = add_rms_norm_quant(x1, x2, gamma, torch.ones(2), zero, epsilon=0.0)
    assert y1.tolist() == [[0, 2]]


def test_div_mode_divides_and_is_the_default() -> None:
    x1, x2, gamma = _normalized_to([8.0, 8.0])
    scales = torch.tensor([2.0, 4.0])
    assert add_rms_norm_quant(x1, x2, gamma, scales, None, epsilon=0.0)[0].tolist() == [[4, 2]]
    multiplied = add_rms_norm_quant(x1, x2, gamma, scales, None, epsilon=0.0, div_mode=False)[0]
    assert multiplied.tolist() == [[16, 32]]


def test_the_sixth_positional_argument_is_beta() -> None:
    """In torch_npu 7.1 it was scales2: there this call would fill y2 and leave y1 alone."""
    x1, x2, gamma = _normalized_to([1.0, 2.0, 3.0])
    beta = torch.full((3,), 10.0, dtype=torch.bfloat16)
    positional = add_rms_norm_quant(x1, x2, gamma, torch.ones(3), None, beta, epsilon=0.0)
    keyword = add_rms_norm_quant(x1, x2, gamma, torch.ones(3), None, beta=beta, epsilon=0.0)
    assert positional[0].tolist() == keyword[0].tolist() == [[11, 12, 13]]
    assert positional[1].tolist() == keyword[1].tolist() == [[0, 0, 0]]


def test_zero_points1_has_no_default() -> None:
    x1, x2, gamma = _normalized_to([1.0, 2.0])
    with pytest.raises(RuntimeError, match="zero_points1"):
        add_rms_norm_quant(x1, x2, gamma, torch.ones(2))


def test_y2_is_allocated_without_scales2() -> None:
    x1, x2 = torch.randn(2, 3, 8).half(), torch.randn(2, 3, 8).half()
    _, y2, _ = add_rms_norm_quant(x1, x2, torch.ones(8).half(), torch.ones(8), None)
    assert torch.equal(y2, torch.zeros(2, 3, 8, dtype=torch.int8))


def test_the_norm_is_not_rounded_before_it_is_quantized() -> None:
    """A chain of add_rms_norm and quantize rounds to bfloat16 in between, and so differs here and there."""
    x1, x2 = (torch.randn(64, 128).bfloat16() for _ in range(2))
    gamma, scales = torch.randn(128).bfloat16(), torch.full((128,), 0.02)
    y1, _, _ = add_rms_norm_quant(x1, x2, gamma, scales, None)
    chain, _, _ = torch.ops.npu.npu_add_rms_norm(x1, x2, gamma)
    difference = (y1.int() - (chain.float() / scales).round().clamp(-128, 127).int()).abs()
    assert difference.max() == 1
    assert (difference != 0).float().mean() < 0.1


def test_normalizes_several_dimensions() -> None:
    x1, x2 = (torch.randn(5, 3, 8).half() for _ in range(2))
    gamma, scales = torch.randn(3, 8).half(), torch.rand(3, 8) + 0.02
    zero = torch.randint(-9, 9, (3, 8), dtype=torch.int32)
    y1, _, _ = add_rms_norm_quant(x1, x2, gamma, scales, zero)
    n = rms_norm_float64(x1.double() + x2.double(), gamma, 1e-6)
    _assert_quantized(y1, n / scales.double() + zero)


def test_strided_inputs_give_fresh_contiguous_outputs() -> None:
    x1, x2 = torch.randn(16, 6).half().T, torch.randn(6, 16).half()
    gamma, beta = torch.randn(2, 32).half()[:, ::2]
    scales, zero = torch.rand(32)[::2] + 0.05, torch.arange(32, dtype=torch.int32)[::2]
    inputs = (x1, x2, gamma, scales, zero, beta, scales, zero)
    before = [t.clone() for t in inputs]
    outputs = add_rms_norm_quant(*inputs)
    expected = add_rms_norm_quant(*(t.contiguous() for t in inputs))
    for output, want in zip(outputs, expected, strict=True):
        assert torch.equal(output, want)
        assert output.is_contiguous()
        output.zero_()
    assert all(torch.equal(t, b) for t, b in zip(inputs, before, strict=True))


def test_no_rows() -> None:
    empty = torch.empty(0, 8).half()
    outputs = add_rms_norm_quant(empty, empty, torch.ones(8).half(), torch.ones(8), None)
    assert [tuple(o.shape) for o in outputs] == [(0, 8)] * 3
