from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from tests.kernels._swiglu import FP32_EPS, assert_rounded, groups_of_rows, swish

grouped = torch.ops.npu.npu_grouped_matmul_swiglu_quant


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(tokens: int, inner: int, half: int, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randint(-128, 128, (tokens, inner), dtype=torch.int8)
    weight = torch.randint(-128, 128, (experts, inner, 2 * half), dtype=torch.int8)
    weight_scale = (torch.rand(experts, 2 * half) + 0.5) / 500
    x_scale = (torch.rand(tokens) + 0.5) / 50
    return x, weight, weight_scale, x_scale


def exact_grouped(
    x: Tensor, weight: Tensor, counts: list[int], weight_scale: Tensor, x_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """float64 values before rounding [M, N] and scale [M]; integers and rows in plain Python."""
    half = weight.shape[-1] // 2
    values, scales = [], []
    for t, group in enumerate(groups_of_rows(counts, x.shape[0])):
        if group is None:
            values.append([0.0] * half)
            scales.append(0.0)
            continue
        products = (x[t].long()[:, None] * weight[group].long()).sum(0)
        d = (products.double() * weight_scale[group].double() * x_scale[t].double()).tolist()
        s = [swish(a) * b for a, b in zip(d[:half], d[half:], strict=True)]
        amax = max(map(abs, s))
        values.append([v / amax * 127 if amax else 0.0 for v in s])
        scales.append(amax / 127)
    exact = torch.tensor(values, dtype=torch.float64).reshape(x.shape[0], half)
    return exact, torch.tensor(scales, dtype=torch.float64)


def to_nz(weight: Tensor) -> Tensor:
    """The NZ storage of [E, K, N], zero where the fractals exceed the matrix, element by element."""
    experts, rows, columns = weight.shape
    storage = weight.new_zeros(experts, -(-columns // 32), -(-rows // 16), 16, 32)
    for k in range(rows):
        for n in range(columns):
            storage[:, n // 32, k // 16, k % 16, n % 32] = weight[:, k, n]
    return storage


@pytest.mark.parametrize("counts", [[3, 1, 0, 2], [6], [0, 0, 6], [2, 2], [0, 0]])
def test_matches_float64(counts: list[int]) -> None:
    x, weight, weight_scale, x_scale = make(6, 24, 8, len(counts))
    ends = torch.tensor(counts).cumsum(0)
    y, scale, _ = grouped(x, weight, ends, weight_scale, x_scale)
    exact, exact_scale = exact_grouped(x, weight, counts, weight_scale, x_scale)
    assert_rounded(y, exact, 127 * 16 * FP32_EPS)
    torch.testing.assert_close(scale.double(), exact_scale, rtol=2e-6, atol=0)


def test_documented_group_list() -> None:
    x, weight, weight_scale, x_scale = make(7, 16, 4, 4)
    y, scale, _ = grouped(x, weight, torch.tensor([3, 4, 4, 6]), weight_scale, x_scale)
    one = torch.tensor([1])
    for row, expert in enumerate([0, 0, 0, 1, 3, 3]):
        alone = slice(expert, expert + 1)
        y_row, scale_row, _ = grouped(
            x[row : row + 1], weight[alone], one, weight_scale[alone], x_scale[row : row + 1]
        )
        assert torch.equal(y[row], y_row[0])
        assert torch.equal(scale[row], scale_row[0])


def test_rows_beyond_the_groups_are_zero() -> None:
    x, weight, weight_scale, x_scale = make(5, 16, 4, 2)
    y, scale, _ = grouped(x, weight, torch.tensor([1, 3]), weight_scale, x_scale)
    assert y[3:].eq(0).all()
    assert scale[3:].eq(0).all()
    assert scale[:3].gt(0).all()


def test_activates_the_first_half() -> None:
    x = torch.tensor([[1]], dtype=torch.int8)
    weight = torch.tensor([[[3, -5]]], dtype=torch.int8)
    _, scale, _ = grouped(x, weight, torch.tensor([1]), torch.ones(1, 2), torch.ones(1))
    torch.testing.assert_close(scale, torch.tensor([swish(3.0) * 5 / 127]))


def test_zero_row_has_scale_zero() -> None:
    x, weight, weight_scale, x_scale = make(3, 16, 4, 1)
    x[1] = 0
    y, scale, _ = grouped(x, weight, torch.tensor([3]), weight_scale, x_scale)
    assert y[1].eq(0).all()
    assert scale[1] == 0
    assert y[0].abs().max() == 127


def test_long_sums_are_exact() -> None:
    # 65535 products of 127 * 127 are beyond 2**24: a sum in fp32 would be wrong.
    x = torch.full((1, 65535), 127, dtype=torch.int8)
    weight = torch.full((1, 65535, 2), 127, dtype=torch.int8)
    x[0, 0] = 126
    total = 127 * 127 * 65534 + 126 * 127
    _, scale, _ = grouped(x, weight, torch.tensor([1]), torch.tensor([[2.0**-30, 1.0]]), torch.ones(1))
    exact = swish(total * 2.0**-30) * total / 127
    assert scale.item() == pytest.approx(exact, rel=5e-7)


def test_nz_storage_equals_the_plain_weight() -> None:
    x, weight, weight_scale, x_scale = make(4, 40, 24, 2)
    ends = torch.tensor([1, 4])
    storage = to_nz(weight)
    assert storage.shape == (2, 2, 3, 16, 32)
    plain = grouped(x, weight, ends, weight_scale, x_scale)
    for a, b in zip(grouped(x, storage, ends, weight_scale, x_scale), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weight_scales_are_widened(dtype: torch.dtype) -> None:
    x, weight, weight_scale, x_scale = make(4, 16, 8, 1)
    ends, narrow = torch.tensor([4]), weight_scale.to(dtype)
    results = grouped(x, weight, ends, narrow, x_scale)
    for a, b in zip(results, grouped(x, weight, ends, narrow.float(), x_scale), strict=True):
        assert torch.equal(a, b)


def test_third_result_is_a_scalar() -> None:
    x, weight, weight_scale, x_scale = make(2, 16, 4, 1)
    _, _, reserved = grouped(x, weight, torch.tensor([2]), weight_scale, x_scale)
    assert (reserved.shape, reserved.dtype) == ((), torch.float32)


@pytest.mark.parametrize("ends", [[3, 1], [1, 6], [-1, 3]])
def test_refuses_group_lists_that_are_no_running_sums(ends: list[int]) -> None:
    x, weight, weight_scale, x_scale = make(5, 16, 4, 2)
    with pytest.raises(ValueError, match=r"npu_grouped_matmul_swiglu_quant: group_list is .* from 0 to 5"):
        grouped(x, weight, torch.tensor(ends), weight_scale, x_scale)


def test_no_rows() -> None:
    x, weight, weight_scale, x_scale = make(0, 16, 4, 2)
    y, scale, _ = grouped(x, weight, torch.tensor([0, 0]), weight_scale, x_scale)
    assert (y.shape, scale.shape) == ((0, 4), (0,))


def test_strided_inputs_are_not_changed() -> None:
    x, weight, weight_scale, x_scale = make(5, 16, 4, 3)
    inputs = (
        x.T.contiguous().T,
        weight.transpose(1, 2).contiguous().transpose(1, 2),
        torch.tensor([1, 0, 3, 0, 4, 0])[::2],
        weight_scale.T.contiguous().T,
        x_scale.repeat_interleave(2)[::2],
    )
    before = [t.clone() for t in inputs]
    results = grouped(*inputs)
    expected = grouped(x, weight, torch.tensor([1, 3, 4]), weight_scale, x_scale)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(results, expected, strict=True))
    for result in results:
        result.zero_()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    extra=st.integers(0, 2),
    inner=st.integers(1, 40),
    half=st.integers(1, 8),
    seed=st.integers(0, 2**16),
)
def test_property(counts: list[int], extra: int, inner: int, half: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight, weight_scale, x_scale = make(sum(counts) + extra, inner, half, len(counts))
    y, scale, _ = grouped(x, weight, torch.tensor(counts).cumsum(0), weight_scale, x_scale)
    exact, exact_scale = exact_grouped(x, weight, counts, weight_scale, x_scale)
    assert_rounded(y, exact, 127 * 16 * FP32_EPS)
    torch.testing.assert_close(scale.double(), exact_scale, rtol=2e-6, atol=0)
