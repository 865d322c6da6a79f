from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npu_fusion.kernels.reference._cache import page_slots, write_slots

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def _rows(count: int, width: int, dtype: torch.dtype) -> Tensor:
    return (torch.arange(count * width).view(count, width) % 100 + 1).to(dtype)


def _nz_loop(cache: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Element by element into the flat memory, from the description of the layout."""
    _, block, _, width = cache.shape
    d0 = 32 // cache.element_size()
    memory = cache.flatten().tolist()
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        if slot >= 0:
            page, offset = divmod(slot, block)
            for c, value in enumerate(row):
                memory[page * block * width + c // d0 * block * d0 + offset * d0 + c % d0] = value
    return torch.tensor(memory, dtype=cache.dtype).view(cache.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_order(dtype: torch.dtype) -> None:
    cache, rows = torch.full((3, 4, 1, 5), 7).to(dtype), _rows(4, 5, dtype)
    slots = torch.tensor([11, -1, 0, 5])
    expected = cache.clone()
    expected[2, 3, 0], expected[0, 0, 0], expected[1, 1, 0] = rows[0], rows[2], rows[3]
    write_slots(cache, rows, slots, nz=False)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nz_order(dtype: torch.dtype) -> None:
    cache, rows = torch.full((3, 4, 1, 64), 7).to(dtype), _rows(4, 64, dtype)
    slots = torch.tensor([11, -3, 0, 5])
    expected = _nz_loop(cache, rows, slots)
    write_slots(cache, rows, slots, nz=True)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("nz", [False, True])
def test_of_rows_with_one_slot_the_last_stays(nz: bool) -> None:
    slots = torch.randint(-2, 6, (500,), generator=torch.Generator().manual_seed(0))
    rows, cache, expected = torch.randn(500, 16), torch.zeros(2, 3, 1, 16), torch.zeros(2, 3, 1, 16)
    for row, slot in zip(rows, slots, strict=True):
        write_slots(expected, row[None], slot[None], nz=nz)
    write_slots(cache, rows, slots, nz=nz)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("nz", [False, True])
def test_a_strided_cache_is_written_where_it_lies(nz: bool) -> None:
    memory = torch.zeros(3, 4, 1, 80)
    cache, copy = memory[..., 8:72], torch.zeros(3, 4, 1, 64)
    rows, slots = _rows(3, 64, torch.float32), torch.tensor([6, 2, 9])
    write_slots(cache, rows, slots, nz=nz)
    write_slots(copy, rows, slots, nz=nz)
    assert torch.equal(cache, copy)
    assert not memory[..., :8].any()
    assert not memory[..., 72:].any()


def test_nothing_to_write() -> None:
    none = torch.empty(0, dtype=torch.int64)
    cache = torch.ones(2, 3, 1, 8)
    write_slots(cache, torch.empty(0, 8), none, nz=True)
    write_slots(cache, torch.zeros(2, 8), torch.tensor([-1, -9]), nz=False)
    assert torch.equal(cache, torch.ones(2, 3, 1, 8))
    write_slots(torch.empty(0, 3, 1, 8), torch.ones(1, 8), torch.tensor([4]), nz=False)


def test_refuses_a_slot_beyond_the_cache() -> None:
    with pytest.raises(ValueError, match=r"slot is 6; accepted: below 6 \(2 pages of 3 rows\)"):
        write_slots(torch.ones(2, 3, 1, 8), torch.ones(2, 8), torch.tensor([0, 6]), nz=False)


def test_slots_of_pages() -> None:
    # Sequences of 5, 0, 4 and 1 rows in pages of 4: two pages, none, one, one; the last is not written.
    slots = page_slots(torch.tensor([3, 0, 2, -1]), torch.tensor([5, 0, 4, 1]), 4)
    assert slots.tolist() == [12, 13, 14, 15, 0, 8, 9, 10, 11, -4]
    assert page_slots(torch.empty(0, dtype=torch.int64), torch.tensor([0, 0]), 4).tolist() == []
