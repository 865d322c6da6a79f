from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.cpu import kv_rmsnorm_rope_cache as cpu
from npu_fusion.kernels.reference import kv_rmsnorm_rope_cache as reference
from tests.kernels.cpu._agreement import (
    FLOATS,
    assert_agrees,
    dtypes,
    laid_out,
    layouts,
    normal,
    positive,
    seeds,
    special_rows,
)

NAMES = ["npu_kv_rmsnorm_rope_cache", "npu_kv_rmsnorm_rope_cache_v2_functional"]
MODES = ["Norm", "PA", "PA_BNSD", "PA_NZ", "PA_BLK_BNSD", "PA_BLK_NZ"]
PAGES, SIZE = 7, 4


def assert_same_results(name: str, *args: Any, **options: Any) -> None:
    results = getattr(cpu, name)(*args, **options)
    assert results is not NotImplemented
    assert_agrees(results, getattr(reference, name)(*args, **options))


def make(
    batch: int, tokens: int, dv: int, dr: int, mode: str, dtype: torch.dtype, int8: bool, seed: int
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Arguments and scales; slots without order, one row in four is not written."""
    kv, gamma = (
        normal(batch, 1, tokens, dv + dr, seed=seed, dtype=dtype),
        positive(dv, seed=seed, dtype=dtype),
    )
    cos, sin = (normal(batch, 1, tokens, dr, seed=seed + i, dtype=dtype) for i in (1, 2))
    g = torch.Generator().manual_seed(seed)
    lead, slots, shape = (PAGES, SIZE, 1), PAGES * SIZE, (batch * tokens,)
    if mode == "Norm":
        lead, slots, shape = (batch, 1, tokens + 2), tokens + 2, (batch, tokens)
    elif "BLK" in mode:
        shape = (batch * -(-tokens // SIZE),)
    index = torch.randint(0, slots, shape, generator=g)
    index[torch.rand(shape, generator=g) < 0.25] = -1
    kept = torch.int8 if int8 else dtype
    caches = [torch.randint(-8, 8, (*lead, width), generator=g).to(kept) for width in (dr, dv)]
    scales = {}
    if int8:
        scales = {"k_rope_scale": positive(dr, seed=seed) * 40, "c_kv_scale": positive(1, dv, seed=seed) * 40}
        if seed % 2:
            scales |= {"k_rope_offset": normal(dr, seed=seed) * 9, "c_kv_offset": normal(1, seed=seed) * 9}
    return [kv, gamma, cos, sin, index, *caches], scales


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 6),
    groups=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    mode=st.sampled_from(MODES),
    dtype=dtypes,
    int8=st.booleans(),
    output=st.booleans(),
    seed=seeds,
)
def test_agrees_with_the_reference(
    name: str,
    batch: int,
    tokens: int,
    groups: tuple[int, int],
    mode: str,
    dtype: torch.dtype,
    int8: bool,
    output: bool,
    seed: int,
) -> None:
    dv, dr = (32 * g for g in groups)
    args, scales = make(batch, tokens, dv, dr, mode, dtype, int8, seed)
    assert_same_results(name, *args, cache_mode=mode, is_output_kv=output, epsilon=1e-3, **scales)


@settings(max_examples=60, deadline=None)
@given(
    dv=st.integers(1, 150),
    half=st.integers(1, 40),
    dtype=dtypes,
    int8=st.booleans(),
    layout=layouts,
    seed=seeds,
)
def test_widths_that_no_vector_divides_and_layouts(
    dv: int, half: int, dtype: torch.dtype, int8: bool, layout: str, seed: int
) -> None:
    args, scales = make(2, 3, dv, 2 * half, "PA", dtype, int8, seed)
    args[:4] = [laid_out(x, layout) if x.dim() > 1 else x for x in args[:4]]
    assert_same_results(NAMES[0], *args, cache_mode="PA", is_output_kv=True, **scales)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("int8", [False, True])
def test_special_rows(dtype: torch.dtype, int8: bool) -> None:
    args, scales = make(1, 8, 45, 10, "PA", dtype, int8, 0)
    args[0] = special_rows(55, dtype, seed=0).view(1, 1, 8, 55)
    args[4] = torch.arange(8)
    assert_same_results(NAMES[0], *args, cache_mode="PA", is_output_kv=True, **scales)


@pytest.mark.parametrize("mode", MODES)
def test_one_angle_for_all_tokens(mode: str) -> None:
    args, _ = make(2, 5, 64, 32, mode, torch.bfloat16, False, 3)
    args[2:4] = [x[:, :, :1] for x in args[2:4]]
    assert_same_results(NAMES[1], *args, cache_mode=mode, is_output_kv=True)


def test_of_rows_with_the_same_slot_the_last_is_kept_whatever_the_threads_do() -> None:
    args, _ = make(1, 900, 32, 32, "PA", torch.float32, False, 0)
    args[4] = torch.arange(900) % 28
    for _ in range(5):
        assert_same_results(NAMES[1], *args, cache_mode="PA")


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["pages of a larger one", "row beside row", "elements apart"])
def test_in_place_into_parts_of_other_tensors(layout: str, mode: str, int8: bool) -> None:
    args, scales = make(2, 3, 64, 32, mode, torch.bfloat16, int8, 1)
    options = {"cache_mode": mode, "is_output_kv": True, **scales}
    k, ckv = args[-2:]
    around = torch.cat((ckv, k), dim=-1)
    if layout == "pages of a larger one":
        memories = [torch.stack((k, k)), torch.stack((ckv, ckv))]
        k, ckv = (memory[1] for memory in memories)
    elif layout == "row beside row":
        ckv, k = around.split((64, 32), dim=-1)
    else:
        memories = [torch.stack((k, k), dim=-1), torch.stack((ckv, ckv), dim=-1)]
        k, ckv = (memory[..., 1] for memory in memories)
    results = cpu.npu_kv_rmsnorm_rope_cache_v2(*args[:-2], k, ckv, **options)
    assert results is not NotImplemented
    expected = reference.npu_kv_rmsnorm_rope_cache_v2_functional(*args, **options)
    assert_agrees([*results, k.contiguous(), ckv.contiguous()], expected)
    if layout != "row beside row":
        beside = [memory[0] if layout == "pages of a larger one" else memory[..., 0] for memory in memories]
        assert all(torch.equal(a, b) for a, b in zip(beside, args[-2:], strict=True))


def test_a_slot_beyond_the_cache_is_refused_and_nothing_written() -> None:
    args, _ = make(1, 3, 32, 32, "PA", torch.float32, False, 0)
    args[4] = torch.tensor([0, PAGES * SIZE, 1])
    before = [cache.clone() for cache in args[-2:]]
    assert cpu.npu_kv_rmsnorm_rope_cache_v2(*args, cache_mode="PA") is NotImplemented
    assert all(torch.equal(a, b) for a, b in zip(before, args[-2:], strict=True))
    with pytest.raises(ValueError, match="slot is 28; accepted: below 28"):
        torch.ops.npu.npu_kv_rmsnorm_rope_cache_v2(*args, cache_mode="PA")


def test_what_is_left_to_the_reference() -> None:
    args, _ = make(1, 3, 32, 32, "PA", torch.float32, False, 0)
    empty = [*args[:4], args[4], *(cache[:0] for cache in args[-2:])]
    assert cpu.npu_kv_rmsnorm_rope_cache_v2(*empty, cache_mode="PA") is NotImplemented
    none = [args[0][:, :, :0], args[1], *(x[:, :, :0] for x in args[2:4]), args[4][:0], *args[-2:]]
    assert cpu.npu_kv_rmsnorm_rope_cache(*none, cache_mode="PA") is NotImplemented
