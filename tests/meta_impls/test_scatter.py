from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic, overload

ND, UPDATE = "npu_scatter_nd_update", "scatter_update"
IN_PLACE_ND, IN_PLACE = f"{ND}_", f"{UPDATE}_"
CACHE, ROWS, SLOTS = torch.zeros(6, 1, 4), torch.ones(3, 1, 4), torch.tensor([[5], [0], [2]])
DATA, UPDATES = torch.zeros(3, 2, 5, 4), torch.ones(3, 2, 1, 4)
STARTS = torch.tensor([4, 0, 2])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.bool, torch.int8, torch.int64]
)
def test_nd_update_fake_and_real_agree(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    y = check_operator(ND, CACHE.to(dtype), SLOTS.to(index_dtype), ROWS.to(dtype))
    assert (y.shape, y.dtype) == (CACHE.shape, dtype)


@pytest.mark.parametrize(
    ("shape", "leading", "indexed"),
    [((4, 5, 6), (3,), 2), ((4, 5, 6), (3,), 3), ((7,), (2, 3), 1), ((4, 5), (0,), 1), ((4, 0), (2,), 1)],
)
def test_nd_update_shapes(shape: tuple[int, ...], leading: tuple[int, ...], indexed: int) -> None:
    indices = torch.zeros(*leading, indexed, dtype=torch.int64)
    check_operator(ND, torch.zeros(shape), indices, torch.ones(*leading, *shape[indexed:]))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int32])
def test_update_fake_and_real_agree(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    y = check_operator(UPDATE, DATA.to(dtype), STARTS.to(index_dtype), UPDATES.to(dtype), -2)
    assert (y.shape, y.dtype) == (DATA.shape, dtype)


@pytest.mark.parametrize("axis", [1, 2, 3, -1, -2, -3])
@pytest.mark.parametrize("indices", [torch.zeros(2), torch.tensor([[2, 0], [0, 1]])])
def test_update_axes(indices: Tensor, axis: int) -> None:
    updates = DATA[:2].narrow(axis, 0, 1)
    check_operator(UPDATE, DATA, indices.to(torch.int64), updates, axis)


def test_update_with_nothing() -> None:
    check_operator(UPDATE, DATA, STARTS[:0], UPDATES[:0], -2)
    check_operator(UPDATE, DATA, STARTS, UPDATES[:, :, :0], -2)


def test_strided_operands() -> None:
    check_operator(ND, CACHE.permute(2, 1, 0), torch.tensor([[3, 1]]).T, torch.ones(1, 6, 2).permute(2, 0, 1))
    check_operator(UPDATE, DATA.permute(0, 1, 3, 2), STARTS, UPDATES.permute(0, 1, 3, 2), -1)


def test_nd_update_dynamic_in_one_graph() -> None:
    compile_dynamic(
        overload(ND),
        lambda t: (torch.zeros(2 * t, 1, t), torch.randperm(2 * t)[:t, None], torch.randn(t, 1, t)),
        [2, 7, 3],
        dynamic=[(0, 0), (0, 2), (1, 0), (2, 0), (2, 2)],
    )


@pytest.mark.parametrize("pairs", [False, True])
def test_update_dynamic_in_one_graph(pairs: bool) -> None:
    def make(t: int) -> tuple[Tensor, Tensor, Tensor]:
        starts = torch.arange(t)
        indices = torch.stack((starts.flip(0), starts), dim=1) if pairs else starts
        return torch.zeros(t + 1, 2, 3 * t, 4), indices, torch.randn(t, 2, t, 4)

    compile_dynamic(
        lambda data, indices, updates: overload(UPDATE)(data, indices, updates, -2),
        make,
        [2, 7, 3],
        dynamic=[(0, 0), (0, 2), (1, 0), (2, 0), (2, 2)],
    )


@pytest.mark.parametrize("name", [IN_PLACE_ND, IN_PLACE])
@pytest.mark.parametrize("strided", [False, True])
def test_in_place_fake_and_real_agree(strided: bool, name: str) -> None:
    data = torch.zeros(4, 5, 3, 2).permute(2, 3, 1, 0) if strided else DATA.clone()
    args = (
        (data, torch.tensor([[2], [0]]), data[:2] + 1) if name == IN_PLACE_ND else (data, STARTS, UPDATES, 2)
    )
    assert check_operator(name, *args) is data


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("part", [False, True])
def test_a_compiled_graph_updates_the_cache_that_it_is_given(
    part: bool, strided: bool, dynamic: bool
) -> None:
    """By both operators, through the result and a view of the input, in between plain operators."""

    def fn(cache: Tensor, indices: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        view = cache[1:] if part else cache
        written = overload(IN_PLACE_ND)(view[:, 0], indices, rows * 2)
        written.add_(1)
        overload(IN_PLACE)(view, indices[:1, 0], view[:1, :1] + 5, 1)
        return written * 2, cache + 1

    def make(t: int) -> tuple[Tensor, Tensor, Tensor]:
        cache = torch.zeros(t, 4, 5).transpose(1, 2) if strided else torch.zeros(t, 5, 4)
        return cache, torch.tensor([[1], [0]]), torch.arange(8.0).view(2, 4)

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for t in (3, 4, 6):
        args, expected_args = make(t), make(t)
        expected = fn(*expected_args)
        assert expected_args[0].any(), "the eager call must change its input"
        torch.testing.assert_close(compiled(*args), expected, rtol=0, atol=0)
        assert torch.equal(args[0], expected_args[0])


def test_in_place_refuses_what_the_copying_operator_refuses() -> None:
    check_refused(IN_PLACE_ND, "updates has dtype float16; accepted: float32", CACHE, SLOTS, ROWS.half())
    check_refused(IN_PLACE, "axis is 0; accepted: 1 to 3 and -3 to -1", DATA, STARTS, UPDATES, 0)


def test_nd_update_refuses_dtypes() -> None:
    check_refused(ND, "input has dtype float64; accepted: float16", CACHE.double(), SLOTS, ROWS.double())
    check_refused(ND, "indices has dtype int16; accepted: int32, int64", CACHE, SLOTS.short(), ROWS)
    check_refused(ND, "updates has dtype float16; accepted: float32", CACHE, SLOTS, ROWS.half())


def test_nd_update_refuses_shapes() -> None:
    check_refused(ND, "input has 0 dimensions; accepted: 1 to 8", torch.zeros(()), SLOTS, ROWS)
    check_refused(ND, "indices has 1 dimensions; accepted: at least 2", CACHE, SLOTS[0], ROWS[0])
    four = torch.zeros(3, 4, dtype=torch.int64)
    check_refused(ND, "the last dimension of indices is 4; accepted: 1 to 3, the rank", CACHE, four, ROWS)
    check_refused(ND, "the last dimension of indices is 0", CACHE, four[:, :0], ROWS)
    check_refused(ND, r"updates has shape \[2, 1, 4\]; accepted: \[3, 1, 4\]", CACHE, SLOTS, ROWS[:2])
    check_refused(ND, r"updates has shape \[3, 4\]; accepted: \[3, 1, 4\]", CACHE, SLOTS, ROWS[:, 0])


def test_update_refuses_dtypes() -> None:
    check_refused(UPDATE, "input has dtype int64; accepted: float16", DATA.long(), STARTS, UPDATES.long(), -2)
    check_refused(UPDATE, "indices has dtype int8; accepted: int32", DATA, STARTS.to(torch.int8), UPDATES, -2)
    check_refused(UPDATE, "updates has dtype float16; accepted: float32", DATA, STARTS, UPDATES.half(), -2)


@pytest.mark.parametrize("axis", [0, 4, -4])
def test_update_refuses_other_axes(axis: int) -> None:
    check_refused(UPDATE, f"axis is {axis}; accepted: 1 to 3 and -3 to -1", DATA, STARTS, UPDATES, axis)


def test_update_refuses_shapes() -> None:
    def refused(match: str, data: Tensor, indices: Tensor, updates: Tensor) -> None:
        check_refused(UPDATE, match, data, indices, updates, -2)

    refused("input has 1 dimensions; accepted: 2 to 8", DATA[0, 0, 0], STARTS, UPDATES)
    refused("updates has 3 dimensions; accepted: 4", DATA, STARTS, UPDATES[0])
    refused("indices has 3 dimensions; accepted: 1 to 2", DATA, STARTS[None, None], UPDATES)
    refused(r"indices has shape \[2\]; accepted: \[3\]", DATA, STARTS[:2], UPDATES)
    refused(r"indices has shape \[3, 1\]; accepted: \[3, 2\]", DATA, STARTS[:, None], UPDATES)
    refused(r"updates has shape .*; accepted: \[3, 2, 1, 4\]", DATA, STARTS, UPDATES[:, :1])
    refused("updates has size 3 in dimension 0; accepted: up to 2", DATA[:2], STARTS, UPDATES)
    long = torch.ones(3, 2, 6, 4)
    refused("updates has size 6 in dimension -2; accepted: up to 5", DATA, STARTS, long)
