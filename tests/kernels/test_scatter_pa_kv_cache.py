from __future__ import annotations

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)

in_place = torch.ops.npu.npu_scatter_pa_kv_cache
functional = torch.ops.npu.npu_scatter_pa_kv_cache_functional
T, N, DK, DV, BLOCKS, SIZE = 6, 2, 32, 64, 3, 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inputs(mode: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """key, value, key_cache, value_cache, slot_mapping."""
    d0 = 32 // dtype.itemsize
    rows = [(50 * torch.randn(T, N, width)).to(dtype) for width in (DK, DV)]
    shapes = [
        (BLOCKS, N * width // d0, SIZE, d0) if mode == "PA_NZ" else (BLOCKS, SIZE, N, width)
        for width in (DK, DV)
    ]
    return [*rows, *(torch.full(shape, 9).to(dtype) for shape in shapes), torch.tensor([11, 0, -1, 5, 6, -7])]


def _loop(rows: Tensor, cache: Tensor, slots: Tensor, mode: str) -> Tensor:
    out = cache.clone()
    for row, slot in zip(rows, slots.tolist(), strict=True):
        if slot < 0:
            continue
        page, offset = divmod(slot, SIZE)
        if mode == "Norm":
            out[page, offset] = row
            continue
        d0 = cache.shape[-1]
        for column, number in enumerate(row.flatten().tolist()):
            out[page, column // d0, offset, column % d0] = number
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("mode", ["Norm", "PA_NZ"])
def test_tokens_go_to_their_slots_and_nothing_else_changes(mode: str, dtype: torch.dtype) -> None:
    key, value, key_cache, value_cache, slots = inputs(mode, dtype)
    keys, values = functional(key, value, key_cache, value_cache, slots.int(), cache_mode=mode)
    assert torch.equal(keys, _loop(key, key_cache, slots, mode))
    assert torch.equal(values, _loop(value, value_cache, slots, mode))


@pytest.mark.parametrize("mode", ["Norm", "PA_NZ"])
def test_only_the_one_that_returns_nothing_writes_its_caches(mode: str) -> None:
    args = inputs(mode)
    expected = functional(*args, cache_mode=mode)
    assert torch.equal(args[2], inputs(mode)[2])
    assert torch.equal(args[3], inputs(mode)[3])
    assert in_place(*args, cache_mode=mode) is None
    assert torch.equal(args[2], expected[0])
    assert torch.equal(args[3], expected[1])


def test_no_mode_is_norm_and_the_default_is_nz() -> None:
    args = inputs("Norm")
    norm = functional(*args, cache_mode="Norm")
    assert all(torch.equal(a, b) for a, b in zip(functional(*args, cache_mode=None), norm, strict=True))
    args = inputs("PA_NZ")
    nz = functional(*args, cache_mode="PA_NZ")
    assert all(torch.equal(a, b) for a, b in zip(functional(*args), nz, strict=True))


def test_an_nz_cache_has_the_memory_of_the_one_of_kv_rmsnorm_rope_cache() -> None:
    """Rows that normalization and rotation leave alone, through both operators."""
    kv = torch.randn(T, 1, 1, 16 + 8)
    kv[..., :16] = kv[..., :16].sign()
    slots = torch.randperm(BLOCKS * SIZE)[:T]
    one, zero = torch.ones(T, 1, 1, 8), torch.zeros(T, 1, 1, 8)
    k_cache, ckv_cache = torch.zeros(BLOCKS, SIZE, 1, 8), torch.zeros(BLOCKS, SIZE, 1, 16)
    fused = torch.ops.npu.npu_kv_rmsnorm_rope_cache(
        kv, torch.ones(16), one, zero, slots, k_cache, ckv_cache, epsilon=0.0, cache_mode="PA_NZ"
    )
    rope = torch.cat((kv[..., 16::2], kv[..., 17::2]), dim=-1)
    caches = k_cache.view(BLOCKS, 1, SIZE, 8), ckv_cache.view(BLOCKS, 2, SIZE, 8)
    keys, values = functional(rope[:, 0], kv[:, 0, :, :16], *caches, slots)
    assert torch.equal(keys.flatten(), fused[0].flatten())
    assert torch.equal(values.flatten(), fused[1].flatten())


def test_of_tokens_with_one_slot_the_last_stays() -> None:
    key, value, key_cache, value_cache, _ = inputs("Norm")
    slots = torch.tensor([3, 3, 1, 3, 1, 3])
    keys, values = functional(key, value, key_cache, value_cache, slots, cache_mode="Norm")
    assert torch.equal(keys, _loop(key, key_cache, slots, "Norm"))
    assert torch.equal(values, _loop(value, value_cache, slots, "Norm"))


@pytest.mark.parametrize("mode", ["Norm", "PA_NZ"])
def test_strided_caches_are_written_in_place_without_their_neighbours(mode: str) -> None:
    args = inputs(mode)
    expected = functional(*args, cache_mode=mode)
    memories = [torch.stack((cache, cache), dim=-1) for cache in args[2:4]]
    in_place(*args[:2], *(memory[..., 1] for memory in memories), args[4], cache_mode=mode)
    for memory, cache, before in zip(memories, expected, args[2:4], strict=True):
        assert torch.equal(memory[..., 1], cache)
        assert torch.equal(memory[..., 0], before)


def test_refuses_a_slot_beyond_the_caches() -> None:
    args = inputs("PA_NZ")
    args[4][3] = 12
    with pytest.raises(ValueError, match="slot is 12; accepted: below 12"):
        in_place(*args)
