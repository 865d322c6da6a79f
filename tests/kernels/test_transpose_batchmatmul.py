from __future__ import annotations

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from tests.kernels._numerics import assert_correctly_rounded
from tests.kernels.test_quant_matmul import pack

transpose_batchmatmul = torch.ops.npu.npu_transpose_batchmatmul
B, M, K, N = 4, 7, 32, 6


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def packed_scale(scales: list[float], offsets: list[int] | None = None) -> Tensor:
    return torch.tensor([pack(s, o) for s, o in zip(scales, offsets or [0] * len(scales), strict=True)])


def _exact(a: Tensor, w: Tensor) -> Tensor:
    """[M, B, N] in float64 from [B, M, K] and [B, K, N]."""
    return torch.stack([a[b].double() @ w[b].double() for b in range(a.shape[0])], dim=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_matches_float64(transposed: bool, dtype: torch.dtype) -> None:
    a, w = torch.randn(B, M, K).to(dtype), torch.randn(B, K, N).to(dtype)
    if transposed:
        perms = {"perm_x1": [1, 0, 2], "perm_x2": [0, 2, 1], "perm_y": [1, 0, 2]}
        y = transpose_batchmatmul(a.transpose(0, 1).contiguous(), w.transpose(1, 2).contiguous(), **perms)
    else:
        y = transpose_batchmatmul(a, w)
    if dtype == torch.float32:
        torch.testing.assert_close(y.double(), _exact(a, w), rtol=1e-5, atol=1e-5)
    else:
        assert_correctly_rounded(y, _exact(a, w))


def test_the_default_puts_rows_before_batches() -> None:
    a, w = torch.arange(6.0).view(2, 3, 1), torch.ones(2, 1, 1)
    assert transpose_batchmatmul(a, w).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_parts_deal_out_the_batches() -> None:
    a, w = torch.randn(B, M, K), torch.randn(B, K, N)
    whole = transpose_batchmatmul(a, w)
    y = transpose_batchmatmul(a, w, batch_split_factor=2)
    assert torch.equal(y[0], whole[:, :2].reshape(M, 2 * N))
    assert torch.equal(y[1], whole[:, 2:].reshape(M, 2 * N))


def test_quantized_result() -> None:
    a, w = torch.randn(B, M, K).half(), torch.randn(B, K, N).half()
    scale = 2.0 ** torch.randint(-2, 3, (B * N,))  # no mantissa that could be cut off
    offset = torch.randint(-5, 6, (B * N,))
    y = transpose_batchmatmul(a, w, scale=packed_scale(scale.tolist(), offset.tolist()))
    exact = _exact(a, w).reshape(M, 1, B * N) * scale.double() + offset
    off = (y.int() - exact.round().clamp(-128, 127).int()).abs()
    assert off.max() <= 1
    assert (off != 0).double().mean() < 0.01


def test_quantized_ties_go_to_even_and_saturate() -> None:
    a, w = torch.tensor([0.5, 1.5, -2.5, 300.0, -300.0]).half().view(1, 5, 1), torch.ones(1, 1, 1).half()
    y = transpose_batchmatmul(a, w, scale=packed_scale([1.0]))
    assert y.flatten().tolist() == [0, 2, -2, 127, -128]


def test_a_scale_loses_its_low_mantissa_bits() -> None:
    """0.5 * (1 + 2^-12) is above the tie, and on it once only 10 bits of the mantissa are left."""
    one = torch.ones(1, 1, 1).half()
    assert transpose_batchmatmul(one, one, scale=packed_scale([0.5 * (1 + 2**-10)])).item() == 1
    assert transpose_batchmatmul(one, one, scale=packed_scale([0.5 * (1 + 2**-12)])).item() == 0


def test_sums_are_not_rounded_on_the_way() -> None:
    """In fp16 2048 + 1 is 2048."""
    a = torch.tensor([2048.0, 1.0, 1.0]).half().view(1, 1, 3)
    assert transpose_batchmatmul(a, torch.ones(1, 3, 1).half()).item() == 2050


@pytest.mark.parametrize("options", [{}, {"batch_split_factor": 2}])
def test_strided_inputs_give_a_fresh_contiguous_output(options: dict[str, int]) -> None:
    a, w = torch.randn(K, M, B).permute(2, 1, 0), torch.randn(N, K, B).permute(2, 1, 0)
    before = a.clone(), w.clone()
    y = transpose_batchmatmul(a, w, **options)
    assert y.is_contiguous()
    torch.testing.assert_close(y, transpose_batchmatmul(a.contiguous(), w.contiguous(), **options))
    y.zero_()
    assert torch.equal(a, before[0])
    assert torch.equal(w, before[1])


def test_nothing_to_sum_is_zero() -> None:
    assert transpose_batchmatmul(torch.empty(2, 3, 0), torch.empty(2, 0, 4)).tolist() == [[[0.0] * 4] * 2] * 3
    assert transpose_batchmatmul(torch.empty(2, 0, 4), torch.empty(2, 4, 4)).shape == (0, 2, 4)
