from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from tests.kernels._numerics import rms_norm_float64

add_rms_norm_dynamic_quant = torch.ops.npu.npu_add_rms_norm_dynamic_quant
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _assert_quantized(y: Tensor, scale: Tensor, exact: Tensor, largest: int) -> None:
    """``y`` and ``scale`` quantize the rows of the float64 ``exact``; 1 off is allowed at a halfway point."""
    amax = exact.abs().amax(-1)
    torch.testing.assert_close(scale.double(), amax / largest, rtol=1e-6, atol=0)
    quotient = exact / (amax / largest).unsqueeze(-1)
    difference = (y.double() - quotient.round()).abs()
    halfway = (quotient - quotient.floor() - 0.5).abs() < 1e-4
    assert difference.max() <= 1
    assert torch.equal(difference != 0, (difference != 0) & halfway)
    assert torch.equal(y.abs().amax(-1), torch.full_like(y[..., 0], largest))


def _unpack(packed: Tensor) -> Tensor:
    """int32 [..., n] to the 8n int4 values, one Python integer at a time."""
    values = []
    for word in packed.flatten().tolist():
        for position in range(8):
            nibble = (word >> (4 * position)) & 0xF
            values.append(nibble - 16 if nibble > 7 else nibble)
    return torch.tensor(values, dtype=torch.int8).view(*packed.shape[:-1], -1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("with_beta", [True, False])
@pytest.mark.parametrize("shape", [(9, 64), (2, 3, 40), (1, 2, 1, 2, 3, 1, 1, 16)])
def test_matches_float64(dtype: torch.dtype, with_beta: bool, shape: tuple[int, ...]) -> None:
    x1, x2 = (torch.randn(shape).to(dtype) for _ in range(2))
    gamma, smooth1, smooth2 = (torch.randn(shape[-1]).to(dtype) for _ in range(3))
    beta = torch.randn(shape[-1]).to(dtype) if with_beta else None
    y1, y2, x, scale1, scale2 = add_rms_norm_dynamic_quant(
        x1, x2, gamma, smooth_scale1=smooth1, smooth_scale2=smooth2, beta=beta, epsilon=1e-5
    )
    n = rms_norm_float64(x1.double() + x2.double(), gamma, 1e-5, beta)
    _assert_quantized(y1, scale1, n * smooth1.double(), 127)
    _assert_quantized(y2, scale2, n * smooth2.double(), 127)
    assert y1.dtype == y2.dtype == torch.int8
    assert scale1.shape == scale2.shape == shape[:-1]
    assert torch.equal(x, x1 + x2)


def test_int4_is_packed_low_nibble_first_with_scale_amax_over_7() -> None:
    x1, x2 = (torch.randn(5, 32).half() for _ in range(2))
    gamma, smooth = torch.randn(32).half(), torch.randn(32).half()
    y1, y2, _, scale1, scale2 = add_rms_norm_dynamic_quant(
        x1, x2, gamma, smooth_scale1=smooth, output_mask=[True, True], y_dtype=torch.quint4x2
    )
    assert y1.dtype == y2.dtype == torch.int32
    assert y1.shape == y2.shape == (5, 4)
    n = rms_norm_float64(x1.double() + x2.double(), gamma, 1e-6)
    _assert_quantized(_unpack(y1), scale1, n * smooth.double(), 7)
    _assert_quantized(_unpack(y2), scale2, n, 7)


def _present(**options: Any) -> tuple[bool, bool]:
    x, gamma = torch.randn(3, 8).half(), torch.ones(8).half()
    y1, y2, total, scale1, scale2 = add_rms_norm_dynamic_quant(x, x, gamma, **options)
    assert total.shape == (3, 8)
    for y, scale in ((y1, scale1), (y2, scale2)):
        shapes = (tuple(y.shape), tuple(scale.shape))
        assert shapes in (((3, 8), (3,)), ((0,), (0,)))
        assert (y.dtype, scale.dtype) == (torch.int8, torch.float32)
    return y1.dim() == 2, y2.dim() == 2


def test_absent_outputs_are_empty() -> None:
    smooth = torch.ones(8).half()
    assert _present() == (True, False)
    assert _present(smooth_scale1=smooth) == (True, False)
    assert _present(smooth_scale1=smooth, smooth_scale2=smooth) == (True, True)
    assert _present(output_mask=[True, False]) == (True, False)
    assert _present(output_mask=[False, True]) == (False, True)
    assert _present(output_mask=[True, True]) == (True, True)
    assert _present(output_mask=[False, True], smooth_scale2=smooth) == (False, True)
    assert _present(output_mask=[True, True], smooth_scale2=smooth) == (True, True)


def test_absent_int4_outputs_are_int32() -> None:
    x = torch.randn(3, 8).half()
    _, y2, _, _, scale2 = add_rms_norm_dynamic_quant(x, x, torch.ones(8).half(), y_dtype=16)
    assert (tuple(y2.shape), y2.dtype) == ((0,), torch.int32)
    assert (tuple(scale2.shape), scale2.dtype) == ((0,), torch.float32)


def test_without_a_smooth_scale_the_norm_itself_is_quantized() -> None:
    x1, x2, gamma = (torch.randn(s).bfloat16() for s in ((4, 16), (4, 16), (16,)))
    plain = add_rms_norm_dynamic_quant(x1, x2, gamma, output_mask=[True, True])
    ones = add_rms_norm_dynamic_quant(
        x1, x2, gamma, smooth_scale1=torch.ones(16).bfloat16(), output_mask=[True, True]
    )
    for a, b in zip(plain, ones, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain[0], plain[1])
    assert torch.equal(plain[3], plain[4])


def test_zero_row_has_scale_0_and_y_0() -> None:
    x1 = torch.randn(3, 8).half()
    x2 = x1.clone()
    x2[1] = -x1[1]
    y1, _, x, scale1, _ = add_rms_norm_dynamic_quant(x1, x2, torch.ones(8).half())
    assert torch.equal(x[1], torch.zeros(8).half())
    assert torch.equal(y1[1], torch.zeros(8, dtype=torch.int8))
    assert (scale1 == 0).tolist() == [False, True, False]
    assert torch.equal(y1[[0, 2]].abs().amax(-1), torch.full((2,), 127, dtype=torch.int8))


def test_beta_reaches_a_zero_row() -> None:
    zero, beta = torch.zeros(2, 4).half(), torch.tensor([1.0, -2.0, 0.5, 4.0]).half()
    y1, _, _, scale1, _ = add_rms_norm_dynamic_quant(zero, zero, torch.ones(4).half(), beta=beta)
    torch.testing.assert_close(scale1, torch.full((2,), 4.0 / 127))
    assert y1.tolist() == [[32, -64, 16, 127]] * 2


def test_the_norm_is_not_rounded_before_it_is_quantized() -> None:
    """A chain of add_rms_norm and dynamic_quant rounds to bfloat16 in between: its scales differ visibly."""
    x1, x2 = (torch.randn(64, 128).bfloat16() for _ in range(2))
    gamma = torch.randn(128).bfloat16()
    y1, _, _, scale1, _ = add_rms_norm_dynamic_quant(x1, x2, gamma)
    chain = torch.ops.npu.npu_add_rms_norm(x1, x2, gamma)[0].float()
    chain_scale = chain.abs().amax(-1) / 127
    relative = ((scale1 - chain_scale) / scale1).abs()
    assert 1e-5 < relative.max() < 2**-7
    difference = (y1.int() - (chain / chain_scale.unsqueeze(-1)).round().int()).abs()
    assert difference.max() == 1


def test_strided_inputs_give_fresh_contiguous_outputs() -> None:
    x1, x2 = torch.randn(16, 6).half().T, torch.randn(6, 16).half()
    gamma, beta, smooth1, smooth2 = torch.randn(4, 32).half()[:, ::2]
    inputs = (x1, x2, gamma, beta, smooth1, smooth2)
    before = [t.clone() for t in inputs]

    def run(
        x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor, s1: Tensor, s2: Tensor
    ) -> tuple[Tensor, ...]:
        return add_rms_norm_dynamic_quant(x1, x2, gamma, beta=beta, smooth_scale1=s1, smooth_scale2=s2)

    for output, want in zip(run(*inputs), run(*(t.contiguous() for t in inputs)), strict=True):
        assert torch.equal(output, want)
        assert output.is_contiguous()
        output.zero_()
    assert all(torch.equal(t, b) for t, b in zip(inputs, before, strict=True))


def test_no_rows() -> None:
    empty = torch.empty(0, 8).half()
    outputs = add_rms_norm_dynamic_quant(empty, empty, torch.ones(8).half(), output_mask=[True, True])
    assert [tuple(o.shape) for o in outputs] == [(0, 8), (0, 8), (0, 8), (0,), (0,)]


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 40),
    zero_rows=st.integers(0, 2),
    dtype=st.sampled_from(HALVES),
    seed=st.integers(0, 2**16),
)
def test_properties(rows: int, columns: int, zero_rows: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x1, x2, gamma, smooth = randn(rows, columns), randn(rows, columns), randn(columns), randn(columns)
    x1[:zero_rows] = 0
    x2[:zero_rows] = 0
    y1, y2, _, scale1, scale2 = add_rms_norm_dynamic_quant(
        x1, x2, gamma, smooth_scale1=smooth, output_mask=[True, True]
    )
    n = rms_norm_float64(x1.double() + x2.double(), gamma, 1e-6)
    for y, scale, exact in ((y1, scale1, n * smooth.double()), (y2, scale2, n)):
        # What y and scale stand for is never farther off than half a step, and nothing is clipped.
        step = scale.double().unsqueeze(-1)
        assert torch.all((y.double() * step - exact).abs() <= 0.5001 * step)
        nonzero = exact.abs().amax(-1) > 0
        assert torch.all(y.abs().amax(-1)[nonzero] == 127)
        assert torch.all(scale[~nonzero] == 0)
        assert torch.all(y[~nonzero] == 0)
    # Rows are independent, and an odd function: the opposite input gives the opposite integers.
    order = torch.randperm(rows, generator=generator)
    permuted = add_rms_norm_dynamic_quant(x1[order], x2[order], gamma)
    assert torch.equal(permuted[0], y2[order])
    assert torch.equal(permuted[3], scale2[order])
    opposite = add_rms_norm_dynamic_quant(-x1, -x2, gamma)
    assert torch.equal(opposite[0], -y2)
    assert torch.equal(opposite[3], scale2)
