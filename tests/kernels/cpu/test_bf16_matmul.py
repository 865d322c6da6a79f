from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.cpu import _bf16_matmul
from npu_fusion.kernels.cpu._bf16_matmul import matmul
from tests.kernels.cpu._agreement import normal

BF16 = torch.bfloat16


def assert_rounded_sums(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Each element within half a unit of its float64 sum, but for the fp32 errors of what is summed."""
    exact = x.double() @ weight.double()
    half = torch.finfo(y.dtype).eps / 2 * exact.abs()
    sums = 2.0**-22 * (x.double().abs() @ weight.double().abs())
    assert bool(((y.double() - exact).abs() <= half + sums).all())


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours for every size, and nothing else."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("not ours")

    monkeypatch.setattr(_bf16_matmul, "_MOST_ROWS_KN", 10**9)
    monkeypatch.setattr(_bf16_matmul, "_MOST_ROWS_NK", 10**9)
    monkeypatch.setattr(_bf16_matmul, "_SHORTEST_DOTS", 10**-9)
    monkeypatch.setattr(torch, "mm", refuse)
    monkeypatch.setattr(torch, "bmm", refuse)


sizes = st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(1, 150))


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("rows_of_k", [False, True])
def test_sums_of_every_size(rows_of_k: bool) -> None:
    @settings(max_examples=60, deadline=None)
    @given(size=sizes, batches=st.integers(0, 3), threads=st.sampled_from([1, 2]), seed=st.integers(0, 99))
    def check(size: tuple[int, int, int], batches: int, threads: int, seed: int) -> None:
        m, k, n = size
        batch = (batches,) if batches else ()
        x, weight = (
            normal(*batch, m, k, seed=seed, dtype=BF16),
            normal(*batch, k, n, seed=seed + 1, dtype=BF16),
        )
        if rows_of_k:
            weight = weight.transpose(-2, -1).contiguous().transpose(-2, -1)
        y = torch.full((*batch, m, n), torch.nan, dtype=BF16)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            matmul(x, weight, y)
        finally:
            torch.set_num_threads(before)
        assert_rounded_sums(y, x, weight)

    check()


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("rows_of_k", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 7168, 1536), (7, 1537, 640), (64, 600, 1100)])
def test_large(m: int, k: int, n: int, rows_of_k: bool) -> None:
    x, weight = normal(m, k, seed=0, dtype=BF16), normal(k, n, seed=1, dtype=BF16)
    y = torch.empty(m, n, dtype=BF16)
    matmul(x, weight.t().contiguous().t() if rows_of_k else weight, y)
    assert_rounded_sums(y, x, weight)


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("rows_of_k", [False, True])
def test_strides_and_what_is_beside_the_result(rows_of_k: bool) -> None:
    """Heads: [N, R, D] @ [N, D, H] into [R, N, H]; operands and result are parts of wider tensors."""
    x = normal(5, 3, 70, seed=0, dtype=BF16)[1:4, :, 3:40]
    weight = normal(3, 40, 90, seed=1, dtype=BF16)[:, 2:39, 5:80]
    if rows_of_k:
        weight = normal(3, 90, 40, seed=1, dtype=BF16)[:, 5:80, 2:39].transpose(1, 2)
    wide = torch.full((3, 3, 80), 7.0, dtype=BF16)
    matmul(x, weight, wide.transpose(0, 1)[..., 2:77])
    assert_rounded_sums(wide.transpose(0, 1)[..., 2:77], x, weight)
    assert bool((wide[..., :2] == 7).all()) and bool((wide[..., 77:] == 7).all())


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("rows_of_k", [False, True])
def test_nan_and_infinity_stay_in_their_rows_and_columns(rows_of_k: bool) -> None:
    x, weight = normal(3, 50, seed=0, dtype=BF16), normal(50, 70, seed=1, dtype=BF16)
    x[0, 49], weight[7, 69] = torch.nan, torch.inf
    y = torch.empty(3, 70, dtype=BF16)
    matmul(x, weight.t().contiguous().t() if rows_of_k else weight, y)
    assert bool(y[0].isnan().all())
    assert bool(y[1:, :69].isfinite().all()) and bool(y[1:, 69].isinf().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_other_types(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = normal(*batch, 5, 30, seed=0, dtype=dtype), normal(*batch, 30, 8, seed=1, dtype=dtype)
    y = torch.empty(*batch, 5, 8, dtype=dtype)
    matmul(x, weight, y)
    assert_rounded_sums(y, x, weight)


@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 4), (4, 0, 4), (4, 4, 0), (300, 8, 8), (1, 8, 8)])
@pytest.mark.parametrize("dense", [True, False])
def test_what_ours_does_not_take(m: int, k: int, n: int, dense: bool) -> None:
    x, weight = normal(m, k, seed=0, dtype=BF16), normal(k, n, seed=1, dtype=BF16)
    y = torch.empty(m, n, dtype=BF16)
    if not dense:
        x = torch.stack((x, x), dim=-1)[..., 0]
        weight = torch.stack((weight, weight), dim=-1)[..., 0]
    matmul(x, weight, y)
    assert_rounded_sums(y, x, weight)


def test_without_onednn_ours_takes_every_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bf16_matmul, "_has_onednn", lambda dtype: False)
    x, weight = normal(300, 20, seed=0, dtype=BF16), normal(20, 30, seed=1, dtype=BF16)
    y = torch.empty(300, 30, dtype=BF16)
    monkeypatch.delattr(torch, "mm")
    matmul(x, weight, y)
    assert_rounded_sums(y, x, weight)
    apart = torch.stack((weight, weight), dim=-1)[..., 0]
    matmul(x, apart, y)
    assert_rounded_sums(y, x, weight)
