from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from tests.kernels._numerics import assert_correctly_rounded, rms_norm_float64

v1 = torch.ops.npu.npu_kv_rmsnorm_rope_cache
in_place = torch.ops.npu.npu_kv_rmsnorm_rope_cache_v2
functional = torch.ops.npu.npu_kv_rmsnorm_rope_cache_v2_functional

B, S, DV, DR, PAGES, SIZE = 3, 5, 64, 32, 8, 4
MODES = ["Norm", "PA", "PA_BNSD", "PA_NZ", "PA_BLK_BNSD", "PA_BLK_NZ"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    kv, gamma = 3 * torch.randn(B, 1, S, DV + DR), torch.rand(DV) + 0.5
    cos, sin = (torch.rand(B, 1, S, DR) * 2 - 1 for _ in range(2))
    return [t.to(dtype) for t in (kv, gamma, cos, sin)]


def caches(mode: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    leading = (B, 1, S + 2) if mode == "Norm" else (PAGES, SIZE, 1)
    return torch.full((*leading, DR), 9).to(dtype), torch.full((*leading, DV), 9).to(dtype)


def places(mode: str) -> tuple[Tensor, list[tuple[int, int] | None]]:
    """An index without order, with tokens left out; and the page (sequence) and row of each token."""
    if mode == "Norm":
        index = torch.tensor([[6, 0, 3, -1, 1], [0, 1, 2, 3, 4], [-7, 2, 1, 0, 6]])
        return index, [None if i < 0 else (b, i) for b, row in enumerate(index.tolist()) for i in row]
    if "BLK" in mode:
        # Slots inside of a page name the page: 21 is page 5.
        index = torch.tensor([12, 21, -1, 0, 28, -4])
        pages = [3, 5, None, 0, 7, None]
        where = [(pages[2 * b + t // SIZE], t % SIZE) for b in range(B) for t in range(S)]
        return index, [None if page is None else (page, row) for page, row in where]
    index = torch.randperm(PAGES * SIZE)[: B * S]
    index[[2, 9]] = -1
    return index, [None if i < 0 else divmod(i, SIZE) for i in index.tolist()]


def exact_rows(kv: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """k_embed and y in float64."""
    kv, cos, sin, half = kv.double(), cos.double(), sin.double(), DR // 2
    even, odd = kv[..., DV::2], kv[..., DV + 1 :: 2]
    first = even * cos[..., :half] - odd * sin[..., :half]
    second = odd * cos[..., half:] + even * sin[..., half:]
    return torch.cat((first, second), dim=-1), rms_norm_float64(kv[..., :DV], gamma, 1e-5)


def stored(cache: Tensor, rows: Tensor, mode: str, where: list[tuple[int, int] | None]) -> Tensor:
    """``cache`` with ``rows`` [tokens, D], element by element, from the description of the layouts."""
    out = cache.clone()
    d0 = 32 // cache.element_size()
    for row, place in zip(rows, where, strict=True):
        if place is None:
            continue
        page, offset = place
        if mode == "Norm":
            out[page, 0, offset] = row
        elif mode.endswith("NZ"):
            out[page].view(-1, SIZE, d0)[:, offset] = row.view(-1, d0)
        else:
            out[page, offset, 0] = row
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_match_float64(dtype: torch.dtype) -> None:
    args = inputs(dtype)
    index, _ = places("PA")
    _, _, k_embed, y = v1(*args, index, *caches("PA", dtype), cache_mode="PA", is_output_kv=True)
    exact_k, exact_y = exact_rows(*args)
    assert_correctly_rounded(y, exact_y)
    if dtype == torch.float32:
        # The two products of the rotation may cancel.
        torch.testing.assert_close(k_embed.double(), exact_k, rtol=1e-6, atol=1e-5)
    else:
        assert_correctly_rounded(k_embed, exact_k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_stores_the_rows_and_nothing_else(mode: str, dtype: torch.dtype) -> None:
    args = inputs(dtype)
    k_cache, ckv_cache = caches(mode, dtype)
    _, _, k_embed, y = v1(*args, places("PA")[0], *caches("PA", dtype), cache_mode="PA", is_output_kv=True)
    index, where = places(mode)
    k, ckv, *_ = v1(*args, index, k_cache, ckv_cache, cache_mode=mode)
    assert torch.equal(k, stored(k_cache, k_embed.view(-1, DR), mode, where))
    assert torch.equal(ckv, stored(ckv_cache, y.view(-1, DV), mode, where))


@pytest.mark.parametrize("mode", MODES)
def test_int8_caches_hold_rounded_products(mode: str) -> None:
    """From the exact rows: the 16-bit rounding of k_embed and y comes after, not before."""
    args = inputs(torch.bfloat16)
    k_cache, ckv_cache = caches(mode, torch.int8)
    index, where = places(mode)
    parameters = {
        "k_rope_scale": torch.rand(DR) * 30 + 5,
        "k_rope_offset": torch.randn(DR) * 10,
        "c_kv_scale": torch.rand(1, DV) * 30 + 5,
    }
    k, ckv, *_ = v1(*args, index, k_cache, ckv_cache, cache_mode=mode, **parameters)
    exact_k, exact_y = exact_rows(*args)
    exact_k = exact_k * parameters["k_rope_scale"] + parameters["k_rope_offset"]
    exact_y = exact_y * parameters["c_kv_scale"]
    for cache, before, exact in ((k, k_cache, exact_k), (ckv, ckv_cache, exact_y)):
        wanted = exact.round().clamp(-128, 127).to(torch.int8).view(-1, exact.shape[-1])
        expected = stored(before, wanted, mode, where)
        off = (cache.int() - expected.int()).abs()
        assert off.max() <= 1
        assert (off != 0).double().mean() < 1e-3


def test_one_cache_may_be_quantized_without_the_other() -> None:
    args, (index, where) = inputs(torch.bfloat16), places("PA_NZ")
    k_cache, (_, ckv_cache) = caches("PA_NZ", torch.bfloat16)[0], caches("PA_NZ", torch.int8)
    k, ckv, *_ = v1(*args, index, k_cache, ckv_cache, cache_mode="PA_NZ", c_kv_scale=torch.tensor([20.0]))
    exact_k, exact_y = exact_rows(*args)
    wanted = (exact_y * 20).round().clamp(-128, 127).to(torch.int8).view(-1, DV)
    off = (ckv.int() - stored(ckv_cache, wanted, "PA_NZ", where).int()).abs()
    assert off.max() <= 1
    plain = stored(k_cache, exact_k.bfloat16().view(-1, DR), "PA_NZ", where)
    torch.testing.assert_close(k, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["PA_NZ", "PA_BLK_NZ"])
def test_nz_and_plain_hold_the_same_rows_in_another_order(mode: str) -> None:
    args, (index, _) = inputs(torch.bfloat16), places(mode)
    zeros = [cache.zero_() for cache in caches(mode, torch.bfloat16)]
    plain = v1(*args, index, *zeros, cache_mode=mode.replace("NZ", "BNSD"))
    nz = v1(*args, index, *zeros, cache_mode=mode)
    for a, b in zip(plain[:2], nz[:2], strict=True):
        width = a.shape[-1]
        assert not torch.equal(a, b)
        assert torch.equal(a, b.view(PAGES, width // 16, SIZE, 16).transpose(1, 2).reshape(a.shape))


def test_int8_groups_of_nz_columns_are_twice_as_wide() -> None:
    kv, gamma = torch.zeros(1, 1, 1, DV + DR), torch.ones(DV)
    kv[..., DV - 1] = 8.0  # normalized: sqrt(64) in the last column, 0 before it
    cos = torch.zeros(1, 1, 1, DR)
    k_cache, ckv_cache = (torch.zeros(1, SIZE, 1, width, dtype=torch.int8) for width in (DR, DV))
    parameters = {"k_rope_scale": torch.ones(1), "c_kv_scale": torch.ones(1)}
    slot = torch.tensor([1])
    _, ckv, *_ = v1(kv, gamma, cos, cos, slot, k_cache, ckv_cache, cache_mode="PA_NZ", **parameters)
    assert ckv.flatten().nonzero().tolist() == [[1 * SIZE * 32 + 1 * 32 + 31]]


def test_the_rope_part_goes_to_the_first_cache() -> None:
    kv, gamma, _, _ = inputs()
    kv[..., :DV] = 0
    one, zero = torch.ones(B, 1, S, DR), torch.zeros(B, 1, S, DR)
    index = torch.arange(B * S)
    k, ckv, *_ = v1(kv, gamma, one, zero, index, *caches("PA"), cache_mode="PA")
    rope = kv[..., DV:].reshape(-1, DR)
    assert torch.equal(k.view(-1, DR)[: B * S], torch.cat((rope[:, 0::2], rope[:, 1::2]), dim=1))
    assert not ckv.view(-1, DV)[: B * S].any()


def test_cosine_comes_before_sine() -> None:
    kv, gamma, cos, sin = inputs()
    index, _ = places("PA")
    k, *_ = v1(kv, gamma, cos, sin, index, *caches("PA"), cache_mode="PA")
    swapped, *_ = v1(kv, gamma, sin, cos, index, *caches("PA"), cache_mode="PA")
    assert not torch.allclose(k, swapped)


def test_one_angle_for_all_tokens() -> None:
    kv, gamma, cos, sin = inputs()
    index, _ = places("PA")
    cos, sin = cos[:, :, :1], sin[:, :, :1]
    k, *_ = v1(kv, gamma, cos, sin, index, *caches("PA"), cache_mode="PA")
    same = cos.expand(B, 1, S, DR), sin.expand(B, 1, S, DR)
    assert torch.equal(k, v1(kv, gamma, *same, index, *caches("PA"), cache_mode="PA")[0])


@pytest.mark.parametrize(("mode", "output"), [("PA", False), ("PA_BLK_NZ", False), ("Norm", True)])
def test_rows_that_devices_do_not_write_are_zero(mode: str, output: bool) -> None:
    _, _, k_embed, y = v1(*inputs(), places(mode)[0], *caches(mode), cache_mode=mode, is_output_kv=output)
    assert not k_embed.any()
    assert not y.any()


@pytest.mark.parametrize("mode", MODES)
def test_the_three_spellings_agree_and_only_v2_writes_its_caches(mode: str) -> None:
    args, (index, _) = inputs(), places(mode)
    k_cache, ckv_cache = caches(mode)
    options: dict[str, Any] = {"cache_mode": mode, "is_output_kv": True, "epsilon": 0.5}
    k, ckv, k_embed, y = v1(*args, index, k_cache, ckv_cache, **options)
    other = functional(*args, index, k_cache, ckv_cache, **options)
    assert all(torch.equal(a, b) for a, b in zip(other, (k_embed, y, k, ckv), strict=True))
    assert torch.equal(k_cache, caches(mode)[0])
    assert torch.equal(ckv_cache, caches(mode)[1])
    rows = in_place(*args, index, k_cache, ckv_cache, **options)
    written = (*rows, k_cache, ckv_cache)
    assert all(torch.equal(a, b) for a, b in zip(other, written, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_strided_caches_are_written_in_place_without_their_neighbours(mode: str) -> None:
    args, (index, _) = inputs(), places(mode)
    expected = v1(*args, index, *caches(mode), cache_mode=mode)
    memories = [torch.stack((cache, cache), dim=-1) for cache in caches(mode)]
    in_place(*args, index, *(memory[..., 1] for memory in memories), cache_mode=mode)
    for memory, cache, before in zip(memories, expected[:2], caches(mode), strict=True):
        assert torch.equal(memory[..., 1], cache)
        assert torch.equal(memory[..., 0], before)


def test_a_row_of_zeros_and_huge_rows_stay_finite() -> None:
    kv, gamma, cos, sin = inputs()
    kv[0], kv[1] = 0, 1e18
    index, _ = places("PA")
    out = v1(kv, gamma, cos, sin, index, *caches("PA"), cache_mode="PA", is_output_kv=True)
    assert all(o.isfinite().all() for o in out)
    assert not out[3][0].any()
    torch.testing.assert_close(out[3][1, 0, 0], gamma)


def test_products_beyond_int8_saturate_and_ties_go_to_even() -> None:
    kv, gamma = torch.ones(1, 1, 1, 4 + 2), torch.tensor([1.0, -1.0, 2.5, 3.5])
    angle = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    k_cache, ckv_cache = (torch.zeros(1, 1, 1, width, dtype=torch.int8) for width in (2, 4))
    scale = {"k_rope_scale": torch.ones(2), "c_kv_scale": torch.tensor([1e4, 1e4, 1.0, 1.0])}
    options: dict[str, Any] = {"cache_mode": "PA", "epsilon": 0.0, **scale}
    _, ckv, *_ = v1(kv, gamma, *angle, torch.tensor([0]), k_cache, ckv_cache, **options)
    assert ckv.flatten().tolist() == [127, -128, 2, 4]


def test_refuses_an_index_beyond_the_caches() -> None:
    args = inputs()
    index = torch.arange(B * S)
    index[7] = PAGES * SIZE
    with pytest.raises(ValueError, match=r"slot is 32; accepted: below 32"):
        v1(*args, index, *caches("PA"), cache_mode="PA")
    with pytest.raises(ValueError, match=r"slot is 3\d; accepted: below 32"):
        v1(*args, torch.tensor([0, 4, 8, 12, 16, 32]), *caches("PA"), cache_mode="PA_BLK_NZ")
    # 7 would be the first row of the next sequence.
    with pytest.raises(ValueError, match=r"npu_kv_rmsnorm_rope_cache: index is 7; accepted: below 7"):
        v1(*args, torch.full((B, S), 7), *caches("Norm"), cache_mode="Norm")
