from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npu_fusion.quantization.modules.smoothquant import quantize_static, requant_scale, requantize
from tests.quantization.modules.smoothquant._trace import traced

scales = st.floats(2.0**-20, 2.0**6, width=32)
sums = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=6, max_size=6)
near_zero = st.lists(st.integers(-3000, 3000), min_size=6, max_size=6)


def exact(acc: Tensor, *scale: Tensor | float, offset: Tensor | float = 0) -> Tensor:
    """``acc * S_x * S_w / S_y + z``, in float64 and clamped."""
    s_x, s_w, s_y = (s.double() if isinstance(s, Tensor) else s for s in scale)
    return (acc.double() * s_x * s_w / s_y + offset).clamp(-128, 127)


@settings(max_examples=100, deadline=None)
@given(
    acc=sums | near_zero,
    s_x=scales,
    s_w=st.lists(scales, min_size=3, max_size=3),
    s_y=scales,
    offset=st.none() | st.integers(-128, 127),
)
def test_it_is_next_to_the_exact_value(
    acc: list[int], s_x: float, s_w: list[float], s_y: float, offset: int | None
) -> None:
    rows = torch.tensor(acc, dtype=torch.int32).reshape(2, 3)
    weights = torch.tensor(s_w)
    for weight_scale in (weights, weights[:1], s_w[0]):
        y = requantize(rows, s_x, weight_scale, s_y, offset)
        assert (y.dtype, y.shape) == (torch.int8, rows.shape)
        value = exact(rows, s_x, weight_scale, s_y, offset=offset or 0)
        # Half a step, and what fp32 loses of |value| <= 256 in four roundings.
        assert (y.double() - value).abs().max() <= 0.5 + 2.0**-13


@settings(max_examples=60, deadline=None)
@given(acc=near_zero, s_x=scales, s_w=scales, s_y=scales)
def test_one_factor_is_within_one_step_of_the_floating_way(
    acc: list[int], s_x: float, s_w: float, s_y: float
) -> None:
    """Dequantized to fp32 first and then divided by the scale of the result, as the text of the formula."""
    rows = torch.tensor([acc], dtype=torch.int32)
    floating = (rows.float() * s_x * s_w / s_y).round().clamp(-128, 127)
    assert (requantize(rows, s_x, s_w, s_y).float() - floating).abs().max() <= 1


def test_halves_go_to_even_and_both_ends_saturate() -> None:
    acc = torch.tensor([[1, 3, 5, -1, -3, -5, 255, 257, -255, -257, 2**31 - 1, -(2**31)]], dtype=torch.int32)
    expected = [0, 2, 2, 0, -2, -2, 127, 127, -128, -128, 127, -128]
    assert requantize(acc, 0.5, 1.0, 1.0).tolist() == [expected]
    # The zero point comes first: 0.5 + 1 is 1.5, which goes to 2. After the rounding it would be 0 + 1.
    assert requantize(acc[:, :3], 0.5, 1.0, 1.0, 1).tolist() == [[2, 2, 4]]
    assert requantize(acc[:, :1], 0.5, 1.0, 1.0, torch.tensor([-128], dtype=torch.int32)).item() == -128


def test_the_scale_of_each_channel_and_its_zero_point() -> None:
    acc = torch.tensor([[100, 100], [-100, -100]], dtype=torch.int32)
    offset = torch.tensor([10, -10], dtype=torch.int32)
    y = requantize(acc, torch.tensor(0.5), torch.tensor([0.1, 0.2]), torch.tensor([2.0]), offset)
    assert y.tolist() == [[12, -5], [8, -15]]


def test_requant_scale() -> None:
    weights = torch.rand(5) + 0.5
    factor = requant_scale(0.02, weights, torch.tensor(0.3))
    assert (factor.dtype, factor.shape) == (torch.float32, (5,))
    torch.testing.assert_close(factor.double(), 0.02 * weights.double() / 0.3, rtol=3 * 2.0**-24, atol=0)
    assert requant_scale(0.5, 0.25, 2.0).tolist() == 0.0625


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 1, 2, 1, 2, 8), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_static_quantization(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape) * 3).to(dtype)
    before = x.clone()
    scale, offset = torch.rand(8) * 0.05 + 0.01, torch.randint(-9, 9, (8,), dtype=torch.int32)
    for s, z in ((0.03, None), (scale, None), (scale[:1], 5), (scale, offset), (0.03, offset[:1])):
        q = quantize_static(x, s, z)
        assert (q.dtype, q.shape) == (torch.int8, x.shape)
        with np.errstate(all="ignore"):  # numpy rounds half to even as well
            divided = x.float().numpy() / np.float32(s if isinstance(s, float) else s.numpy())
            shifted = divided + np.float32(0 if z is None else z if isinstance(z, int) else z.numpy())
        assert np.array_equal(q.numpy(), np.clip(np.rint(shifted), -128, 127).astype(np.int8))
    assert torch.equal(x, before)


def test_static_quantization_of_strided_values_and_its_ends() -> None:
    x = torch.randn(6, 4, 3).permute(2, 1, 0)
    assert torch.equal(quantize_static(x, 0.02), quantize_static(x.contiguous(), 0.02))
    ends = torch.tensor([1e9, -1e9, 0.5, 1.5, -0.5, torch.inf, -torch.inf])
    assert quantize_static(ends, 1.0).tolist() == [127, -128, 0, 2, 0, 127, -128]


def test_they_trace_without_a_break() -> None:
    scales = torch.tensor([0.05]), torch.rand(8) * 1e-3, torch.tensor([0.1])

    def both(x: Tensor, acc: Tensor, offset: Tensor) -> Tensor:
        return quantize_static(x, scales[0], offset) + requantize(acc, *scales, offset)

    calls = []
    for rows in (2, 40):
        acc = torch.randint(-(2**20), 2**20, (rows, 8), dtype=torch.int32)
        calls.append([torch.randn(rows, 8).bfloat16(), acc, torch.tensor([3], dtype=torch.int32)])
    assert len(traced(both, calls, dynamic=True)) == 1


def test_refusals() -> None:
    acc = torch.zeros(2, 8, dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"requantize: acc_int32 has dtype torch.int64 and shape \[2, 8\]; accepted"
    ):
        requantize(acc.long(), 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"acc_int32 has dtype torch.int32 and shape \[\]"):
        requantize(acc[0, 0], 1.0, 1.0, 1.0)
    with pytest.raises(
        ValueError, match=r"requantize: weight_scale has shape \[7\]; accepted: \[1\] or \[8\]"
    ):
        requantize(acc, 1.0, torch.ones(7), 1.0)
    with pytest.raises(ValueError, match=r"output_offset has shape \[2, 8\]"):
        requantize(acc, 1.0, 1.0, 1.0, torch.zeros(2, 8, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"quantize_static: x has dtype torch.int8; accepted: torch.float16"):
        quantize_static(torch.zeros(8, dtype=torch.int8), 1.0)
    with pytest.raises(ValueError, match=r"quantize_static: x has shape \[\]"):
        quantize_static(torch.tensor(1.0), 1.0)
    with pytest.raises(
        ValueError, match=r"quantize_static: scale has shape \[2, 1\]; accepted: \[1\] or \[8\]"
    ):
        quantize_static(torch.zeros(2, 8), torch.ones(2, 1))
