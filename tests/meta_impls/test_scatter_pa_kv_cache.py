from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic, overload

IN_PLACE, FUNCTIONAL = "npu_scatter_pa_kv_cache", "npu_scatter_pa_kv_cache_functional"
NAMES = [IN_PLACE, FUNCTIONAL]
MODES = ["PA_NZ", "Norm", None]
T, N, DK, DV, BLOCKS, SIZE = 3, 2, 32, 64, 2, 4


def arguments(mode: str | None, dtype: torch.dtype = torch.float32, tokens: int = T) -> list[Tensor]:
    """key, value, key_cache, value_cache, slot_mapping."""
    rows = [torch.randn(tokens, N, width).to(dtype) for width in (DK, DV)]
    d0 = 32 // dtype.itemsize
    caches = [
        torch.zeros(BLOCKS, N * width // d0, SIZE, d0)
        if mode == "PA_NZ"
        else torch.zeros(BLOCKS, SIZE, N, width)
        for width in (DK, DV)
    ]
    return [*rows, *(cache.to(dtype) for cache in caches), torch.arange(tokens)]


def check_either(name: str, *args: Tensor, **options: Any) -> Any:
    """``check_operator``, which has no outputs to compare of an operator that returns nothing."""
    if name == FUNCTIONAL:
        return check_operator(name, *args, **options)
    torch.library.opcheck(overload(name), args, options)
    return overload(name)(*args, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int32,
    ],
)
@pytest.mark.parametrize("tokens", [T, 0])
def test_fake_and_real_agree(tokens: int, dtype: torch.dtype, mode: str | None, name: str) -> None:
    args = arguments(mode, dtype, tokens)
    out = check_either(name, *args, cache_mode=mode)
    if name == IN_PLACE:
        assert out is None
    else:
        assert [(o.shape, o.dtype) for o in out] == [(args[2].shape, dtype), (args[3].shape, dtype)]


@pytest.mark.parametrize("name", NAMES)
def test_the_default_mode_is_nz_and_slots_may_be_int32(name: str) -> None:
    args = arguments("PA_NZ")
    check_either(name, *args[:4], args[4].int())
    check_refused(name, "key_cache has shape", *arguments("Norm"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_strided_operands(mode: str | None, name: str) -> None:
    args = [torch.stack((t, t), dim=-1)[..., 0] for t in arguments(mode)]
    check_either(name, *args, cache_mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_dynamic_tokens_and_blocks_in_one_graph(mode: str | None) -> None:
    def make(t: int) -> list[Tensor]:
        args = arguments(mode, tokens=t)
        return [*args[:2], *(cache[:1].repeat(t, 1, 1, 1) for cache in args[2:4]), args[4]]

    compile_dynamic(
        lambda *args: overload(FUNCTIONAL)(*args, cache_mode=mode),
        make,
        [2, 7, 3],
        dynamic=[(argument, 0) for argument in range(5)],
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_graph_updates_the_caches_that_it_is_given(mode: str | None, dynamic: bool) -> None:
    def fn(*args: Tensor) -> Tensor:
        overload(IN_PLACE)(*args, cache_mode=mode)
        return args[2] + 1

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for tokens in (3, 5):
        args = arguments(mode, tokens=tokens)
        caches = [cache.clone() for cache in args[2:4]]
        expected = fn(*args)
        assert args[2].any(), "the eager call must change its caches"
        assert torch.equal(compiled(*args[:2], *caches, args[4]), expected)
        assert torch.equal(caches[0], args[2])
        assert torch.equal(caches[1], args[3])


@pytest.mark.parametrize("name", NAMES)
def test_refuses_options(name: str) -> None:
    args = arguments("Norm")
    check_refused(name, "cache_mode is 'PA'; accepted: None, 'Norm', 'PA_NZ'", *args, cache_mode="PA")
    for argument in ("compress_lens", "compress_seq_offsets", "seq_lens"):
        options: dict[str, Any] = {argument: args[4]}
        check_refused(name, f"{argument} is given; accepted: None", *args, cache_mode="Norm", **options)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_dtypes(name: str) -> None:
    def refused(match: str, position: int, dtype: torch.dtype) -> None:
        args = arguments("Norm")
        args[position] = args[position].to(dtype)
        check_refused(name, match, *args, cache_mode="Norm")

    refused("key has dtype float64; accepted: float16, bfloat16, float32, int8", 0, torch.float64)
    for position, argument in ((1, "value"), (2, "key_cache"), (3, "value_cache")):
        refused(f"{argument} has dtype float16; accepted: float32", position, torch.float16)
    refused("slot_mapping has dtype int16; accepted: int32, int64", 4, torch.int16)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_shapes(name: str) -> None:
    key, value, key_cache, value_cache, slots = arguments("Norm")

    def refused(match: str, position: int, tensor: Tensor, mode: str = "Norm") -> None:
        args = arguments(mode)
        args[position] = tensor
        check_refused(name, match, *args, cache_mode=mode)

    refused("key has 4 dimensions; accepted: 3", 0, key[None])
    refused("value has 2 dimensions; accepted: 3", 1, value[0])
    refused(r"value has shape \[2, 2, 64\]; accepted: \[3, 2, 64\]", 1, value[:2])
    refused(r"value has shape \[3, 1, 64\]; accepted: \[3, 2, 64\]", 1, value[:, :1])
    refused(r"slot_mapping has shape \[2\]; accepted: \[3\]", 4, slots[:2])
    refused("key_cache has 3 dimensions; accepted: 4", 2, key_cache[0])
    refused(r"key_cache has shape .*; accepted: \[2, 4, 2, 32\]", 2, key_cache[:, :, :1])
    refused(r"value_cache has shape .*; accepted: \[2, 4, 2, 64\]", 3, value_cache[:1])
    refused(r"value_cache has shape .*; accepted: \[2, 3, 2, 64\]", 2, key_cache[:, :3])
    refused(r"key_cache has shape .*; accepted: \[2, 8, 2, 8\]", 2, key_cache, "PA_NZ")
    refused("key has 31 columns; accepted: a multiple of 8", 0, key[..., :31], "PA_NZ")
