from __future__ import annotations

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)

nd_update, update = torch.ops.npu.npu_scatter_nd_update, torch.ops.npu.scatter_update


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _nd_loop(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    out = data.clone()
    indexed = indices.shape[-1]
    values = updates.reshape(-1, *data.shape[indexed:])
    for place, value in zip(indices.reshape(-1, indexed).tolist(), values, strict=True):
        out[tuple(place)] = value
    return out


def _update_loop(data: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    out = data.clone()
    for i, place in enumerate(indices.tolist()):
        batch, start = place if indices.dim() == 2 else (i, place)
        out[batch].narrow(axis % data.dim() - 1, start, updates.size(axis)).copy_(updates[i])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize(
    ("shape", "leading", "indexed"), [((9, 4), (5,), 1), ((4, 5, 6), (3, 2), 2), ((4, 5, 6), (7,), 3)]
)
def test_nd_update(
    shape: tuple[int, ...], leading: tuple[int, ...], indexed: int, dtype: torch.dtype
) -> None:
    data = torch.zeros(shape).to(dtype)
    sizes = torch.tensor(shape[:indexed])
    indices = (torch.rand(*leading, indexed) * sizes).long()
    updates = (3 * torch.randn(*leading, *shape[indexed:])).to(dtype)
    assert torch.equal(nd_update(data, indices.int(), updates), _nd_loop(data, indices, updates))


@pytest.mark.parametrize("axis", [1, 2, -1])
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("pairs", [False, True])
def test_update(pairs: bool, length: int, axis: int) -> None:
    data = torch.randn(4, 3, 5, 3)
    updates = torch.randn(3, *data.narrow(axis, 0, length).shape[1:])
    starts = torch.tensor([1, 0, 1])
    indices = torch.stack((torch.tensor([3, 0, 2]), starts), dim=1) if pairs else starts
    assert torch.equal(update(data, indices, updates, axis), _update_loop(data, indices, updates, axis))


def test_of_updates_for_one_place_the_last_stays() -> None:
    indices, updates = torch.randint(0, 3, (300, 1)), torch.randn(300, 2)
    data = torch.zeros(3, 2)
    assert torch.equal(nd_update(data, indices, updates), _nd_loop(data, indices, updates))
    pairs = torch.tensor([[1, 0], [1, 0], [1, 1]])
    data, updates = torch.zeros(3, 2, 4, 1), torch.randn(3, 2, 2, 1)
    assert torch.equal(update(data, pairs, updates, -2), _update_loop(data, pairs, updates, -2))


def test_the_input_is_copied() -> None:
    data, starts = torch.zeros(2, 3, 4).transpose(1, 2), torch.tensor([0, 1])
    for out in (
        nd_update(data, torch.tensor([[1]]), torch.ones(1, 4, 3)),
        update(data, starts, torch.ones(2, 1, 3), 1),
    ):
        assert out.is_contiguous()
        assert out.any()
        assert not data.any()


def test_the_input_is_written_in_place_without_its_neighbours() -> None:
    memory, starts = torch.zeros(2, 3, 4, 2), torch.tensor([0, 1])
    data = memory[..., 1].transpose(1, 2)
    slot, row, rows = torch.tensor([[1]]), torch.ones(1, 4, 3), torch.full((2, 1, 3), 2.0)
    expected = update(nd_update(data, slot, row), starts, rows, 1)
    assert torch.ops.npu.npu_scatter_nd_update_(data, slot, row) is data
    assert torch.ops.npu.scatter_update_(data, starts, rows, 1) is data
    assert torch.equal(data, expected)
    assert torch.equal(memory[..., 1], expected.transpose(1, 2))
    assert not memory[..., 0].any()


def test_nothing_to_write() -> None:
    data = torch.randn(2, 3, 4)
    assert torch.equal(nd_update(data, torch.empty(0, 2).long(), torch.empty(0, 4)), data)
    assert torch.equal(update(data, torch.empty(0).long(), torch.empty(0, 3, 4), 1), data)
    assert torch.equal(update(data, torch.tensor([3, 3]), torch.empty(2, 0, 4), 1), data)


@pytest.mark.parametrize("place", [[-1, 0], [0, -1], [2, 0], [0, 3]])
def test_refuses_an_index_outside_of_the_input(place: list[int]) -> None:
    data = torch.zeros(2, 3, 4)
    match = rf"npu_scatter_nd_update: an index is \[{place[0]}, {place[1]}\]; accepted: .* below \[2, 3\]"
    with pytest.raises(ValueError, match=match):
        nd_update(data, torch.tensor([[0, 0], place]), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"scatter_update: an index is .*; accepted: .* below \[2, 3\]"):
        update(data, torch.tensor([place]), torch.ones(1, 1, 4), 1)


def test_refuses_a_slice_that_ends_outside_of_the_input() -> None:
    with pytest.raises(ValueError, match=r"scatter_update: an index is \[0, 3\]"):
        update(torch.zeros(2, 3, 4), torch.tensor([2]), torch.ones(1, 2, 4), 1)
