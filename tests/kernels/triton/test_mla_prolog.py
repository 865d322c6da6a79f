"""npu_mla_prolog_v3(_functional) in Triton against the reference kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.reference.mla_prolog import npu_mla_prolog_v3_functional as reference
from npu_fusion.kernels.triton import mla_prolog as family
from tests.kernels._mla_prolog import COMBINATIONS, arguments
from tests.kernels.triton._running import WAYS, moved, only, runs

pytestmark = runs
TENSORS = (
    *("token_x", "weight_dq", "weight_uq_qr", "weight_uk", "weight_dkv_kr", "rmsnorm_gamma_cq"),
    *("rmsnorm_gamma_ckv", "rope_sin", "rope_cos", "kv_cache", "kr_cache"),
)


def split(a: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """``a`` as the operators take it: tensors by place, options by name."""
    return [a[name] for name in TENSORS], {name: value for name, value in a.items() if name not in TENSORS}


def call(name: str, a: dict[str, Any]) -> Any:
    tensors, options = split({key: moved(value) for key, value in a.items()})
    return getattr(family, name)(*tensors, **options)


def assert_near(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Products sum in another order, the interpreter cuts bfloat16 off instead of rounding it, and roundings
    between the products carry that on."""
    for result, exact in zip(results, expected, strict=True):
        assert (result.shape, result.dtype) == (exact.shape, exact.dtype)
        if exact.numel():
            few_ulps = 4 * torch.finfo(exact.dtype).eps * float(exact.abs().max())
            torch.testing.assert_close(result.cpu(), exact, rtol=0, atol=few_ulps)


def expected(a: dict[str, Any]) -> tuple[Tensor, ...]:
    tensors, options = split(a)
    return reference(*tensors, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [(6,), (2, 3), (1,), (0,)])
def test_functional(
    monkeypatch: pytest.MonkeyPatch, way: str, tokens: tuple[int, ...], dtype: torch.dtype
) -> None:
    only(monkeypatch, family.NORM, way)
    a = arguments(tokens=tokens, dtype=dtype)
    before = a["kv_cache"].clone(), a["kr_cache"].clone()
    assert_near(call("npu_mla_prolog_v3_functional", a), expected(a))
    assert torch.equal(a["kv_cache"], before[0]) and torch.equal(a["kr_cache"], before[1])


@pytest.mark.parametrize("strided", [False, True])
def test_caches_are_written_in_place(strided: bool) -> None:
    a = arguments(tokens=(6,))
    *_, kv_after, kr_after = expected(a)
    caches = [moved(a[name].clone()) for name in ("kv_cache", "kr_cache")]
    if strided:
        caches = [torch.cat([cache, cache], dim=1)[:, : cache.shape[1]] for cache in caches]
    outputs = call("npu_mla_prolog_v3", a | {"kv_cache": caches[0], "kr_cache": caches[1]})
    assert len(outputs) == 5
    for cache, exact in zip(caches, (kv_after, kr_after), strict=True):
        torch.testing.assert_close(cache.cpu(), exact, rtol=0.02, atol=0.02)


def test_tokens_without_a_slot_and_slots_beyond_the_cache_are_not_written() -> None:
    a = arguments(tokens=(4,))
    slots = a["kv_cache"].shape[0] * a["kv_cache"].shape[1]
    a["cache_index"] = torch.tensor([-1, slots, 2, -7])
    *_, kv_cache, kr_cache = call("npu_mla_prolog_v3_functional", a)
    for name, cache in (("kv_cache", kv_cache), ("kr_cache", kr_cache)):
        changed = cache.cpu().flatten(0, 1).ne(a[name].flatten(0, 1)).flatten(1).any(dim=1)
        assert changed.nonzero().flatten().tolist() == [2]


def test_outputs_that_are_not_asked_for_are_empty() -> None:
    a = arguments() | {"query_norm_flag": False}
    results = call("npu_mla_prolog_v3_functional", a)
    assert [result.numel() for result in results[2:5]] == [0, 0, 0]
    assert_near(results, expected(a))


@pytest.mark.parametrize("modes", [modes for modes in COMBINATIONS if modes != (0, 0, 0)])
def test_leaves_quantization_to_the_reference_kernel(modes: tuple[int, int, int]) -> None:
    assert call("npu_mla_prolog_v3", arguments(modes)) is NotImplemented


@pytest.mark.parametrize("change", [{"cache_mode": "PA_NZ"}, {"dtype": torch.float32}], ids=str)
def test_leaves_other_caches_and_float32_to_the_reference_kernel(change: dict[str, Any]) -> None:
    assert call("npu_mla_prolog_v3_functional", arguments(**change)) is NotImplemented
