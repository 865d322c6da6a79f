from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic, overload

V1, V2 = "npu_kv_rmsnorm_rope_cache", "npu_kv_rmsnorm_rope_cache_v2"
FUNCTIONAL = "npu_kv_rmsnorm_rope_cache_v2_functional"
NAMES = [V1, V2, FUNCTIONAL]
MODES = ["Norm", "PA", "PA_BNSD", "PA_NZ", "PA_BLK_BNSD", "PA_BLK_NZ"]
B, S, DV, DR, PAGES, SIZE = 2, 3, 64, 32, 6, 2


def arguments(
    mode: str = "PA_BNSD",
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    batch: int = B,
    tokens: int = S,
) -> list[Tensor]:
    """kv, gamma, cos, sin, index, k_cache, ckv_cache, with one slot (row, page) for each index."""
    kv = torch.randn(batch, 1, tokens, DV + DR).to(dtype)
    cos, sin = (torch.randn(batch, 1, tokens, DR).to(dtype) for _ in range(2))
    leading = (batch, 1, tokens + 2) if mode == "Norm" else (PAGES, SIZE, 1)
    if mode == "Norm":
        index = torch.arange(tokens).expand(batch, tokens)
    elif "BLK" in mode:
        index = SIZE * torch.arange(batch * -(-tokens // SIZE))
    else:
        index = torch.arange(batch * tokens)
    caches = [torch.ones(*leading, width).to(cache_dtype or dtype) for width in (DR, DV)]
    return [kv, torch.randn(DV).to(dtype), cos, sin, index, *caches]


def scales() -> dict[str, Tensor]:
    return {"k_rope_scale": torch.full((DR,), 20.0), "c_kv_scale": torch.full((DV,), 20.0)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_fake_and_real_agree(mode: str, name: str) -> None:
    args = arguments(mode, torch.bfloat16)
    out = check_operator(name, *args, cache_mode=mode, is_output_kv=True)
    rows, caches = [(B, 1, S, DR), (B, 1, S, DV)], [args[5].shape, args[6].shape]
    shapes = {V1: [*caches, *rows], V2: rows, FUNCTIONAL: [*rows, *caches]}[name]
    assert [o.shape for o in out] == shapes
    assert all(o.dtype == torch.bfloat16 for o in out)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_int8_caches(mode: str, name: str) -> None:
    check_operator(name, *arguments(mode, torch.float16, torch.int8), cache_mode=mode, **scales())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(DR,), (1, DR), (1,)])
def test_only_one_cache_is_quantized_and_with_an_offset(shape: tuple[int, ...], name: str) -> None:
    args = arguments()
    args[5] = args[5].to(torch.int8)
    scale, offset = torch.full(shape, 9.0), torch.full(shape, 1.0)
    check_operator(name, *args, cache_mode="PA", k_rope_scale=scale, k_rope_offset=offset)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (2, 0)])
def test_no_tokens(batch: int, tokens: int, mode: str, name: str) -> None:
    check_operator(name, *arguments(mode, batch=batch, tokens=tokens), cache_mode=mode, is_output_kv=True)


@pytest.mark.parametrize("name", NAMES)
def test_strided_inputs_and_one_angle_for_all_tokens(name: str) -> None:
    kv, gamma, cos, sin, index, k_cache, ckv_cache = arguments()
    strided = [torch.stack((t, t), dim=-1)[..., 0] for t in (k_cache, ckv_cache)]
    kv = kv.transpose(0, 3).contiguous().transpose(0, 3)
    check_operator(name, kv, gamma, cos[:, :, :1], sin[:, :, :1], index, *strided, cache_mode="PA")


@pytest.mark.parametrize("name", [V1, FUNCTIONAL])
@pytest.mark.parametrize("mode", MODES)
def test_dynamic_batch_and_tokens_in_one_graph(mode: str, name: str) -> None:
    def make(t: int) -> list[Tensor]:
        args = arguments(mode, batch=t, tokens=t + 1)
        if mode != "Norm":
            args[5:] = [torch.ones(t * t + t, t, 1, width) for width in (DR, DV)]
            args[4] = t * torch.arange(t * (-(-(t + 1) // t))) if "BLK" in mode else args[4]
        return args

    dynamic = [(argument, dim) for argument in (0, 2, 3) for dim in (0, 2)] + [(4, 0)]
    dynamic += [(cache, dim) for cache in (5, 6) for dim in ((0, 2) if mode == "Norm" else (0, 1))]
    dynamic += [(4, 1)] if mode == "Norm" else []
    compile_dynamic(
        lambda *args: overload(name)(*args, cache_mode=mode, is_output_kv=True), make, [2, 5, 3], dynamic
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strided", [False, True])
def test_a_compiled_graph_updates_the_caches_that_it_is_given(
    strided: bool, mode: str, dynamic: bool
) -> None:
    def fn(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k_embed, y = overload(V2)(*args, cache_mode=mode, is_output_kv=True)
        return k_embed * 2, y, args[5] + 1

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch in (2, 1):
        args = arguments(mode, batch=batch)
        caches = [torch.stack((t, t), dim=-1)[..., 0] if strided else t.clone() for t in args[5:]]
        expected = fn(*args)
        assert not torch.equal(caches[0], args[5]), "the eager call must change its caches"
        torch.testing.assert_close(compiled(*args[:5], *caches), expected, rtol=0, atol=0)
        assert torch.equal(caches[0], args[5])
        assert torch.equal(caches[1], args[6])


def replaced(position: int, tensor: Tensor, mode: str = "PA_BNSD") -> list[Tensor]:
    args = arguments(mode)
    args[position] = tensor
    return args


@pytest.mark.parametrize("name", NAMES)
def test_refuses_options(name: str) -> None:
    args = arguments()
    check_refused(name, "cache_mode is 'PA_BSND'; accepted: 'Norm', 'PA'", *args, cache_mode="PA_BSND")
    check_refused(name, "v is given; accepted: None", *args, v=torch.ones(B, 1, S, 4), cache_mode="PA")
    if name != V1:
        check_refused(name, "_cache_dtype is 1; accepted: None", *args, k_cache_dtype=1, cache_mode="PA")
        check_refused(name, "ckv_cache_dtype is 290", *args, ckv_cache_dtype=290, cache_mode="PA")


@pytest.mark.parametrize("name", NAMES)
def test_refuses_dtypes(name: str) -> None:
    def refused(match: str, position: int, dtype: torch.dtype, **options: Any) -> None:
        args = arguments()
        args[position] = args[position].to(dtype)
        check_refused(name, match, *args, cache_mode="PA", **options)

    refused("kv has dtype float64; accepted: float16, bfloat16, float32", 0, torch.float64)
    for position, argument in ((1, "gamma"), (2, "cos"), (3, "sin")):
        refused(f"{argument} has dtype float16; accepted: float32", position, torch.float16)
    refused("index has dtype int32; accepted: int64", 4, torch.int32)
    refused("k_cache has dtype float16; accepted: float32", 5, torch.float16)
    refused("ckv_cache has dtype int8; accepted: float32", 6, torch.int8)
    refused("ckv_cache has dtype float32; accepted: int8", 5, torch.int8, **scales())
    half = torch.ones(DR).half()
    refused("k_rope_scale has dtype float16; accepted: float32", 5, torch.int8, k_rope_scale=half)
    offset = {"k_rope_scale": half.float(), "k_rope_offset": half}
    refused("k_rope_offset has dtype float16; accepted: float32", 5, torch.int8, **offset)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_shapes(name: str) -> None:
    kv, gamma, cos, sin, *_ = arguments()

    def refused(match: str, position: int, tensor: Tensor) -> None:
        check_refused(name, match, *replaced(position, tensor), cache_mode="PA")

    refused("kv has 3 dimensions; accepted: 4", 0, kv[0])
    refused(r"kv has shape \[2, 1, 3, 95\]; accepted: \[2, 1, 3, 96\]", 0, kv[..., :95])
    refused(r"kv has shape \[2, 2, 3, 96\]; accepted: \[2, 1, 3, 96\]", 0, kv.expand(B, 2, S, DV + DR))
    refused("gamma has 2 dimensions; accepted: 1", 1, gamma[None])
    refused(r"gamma has shape \[0\]; accepted: sizes above 0", 1, gamma[:0])
    refused("cos has 3 dimensions; accepted: 4", 2, cos[0])
    refused("accepted: an even last dimension", 2, cos[..., :31])
    refused(r"cos has shape \[1, 1, 3, 32\]; accepted: .*, where dimension 2 may be 1", 2, cos[:1])
    refused(r"sin has shape \[2, 1, 1, 32\]; accepted: \[2, 1, 3, 32\]", 3, sin[:, :, :1])


@pytest.mark.parametrize("name", NAMES)
def test_refuses_an_index_of_another_mode(name: str) -> None:
    for mode, shape in (("Norm", r"\[2, 3\]"), ("PA", r"\[6\]"), ("PA_BLK_BNSD", r"\[4\]")):
        args = replaced(4, torch.arange(5), mode)
        check_refused(name, rf"index has shape \[5\]; accepted: {shape}", *args, cache_mode=mode)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_cache_shapes(name: str) -> None:
    def refused(match: str, position: int, shape: tuple[int, ...], mode: str = "PA") -> None:
        check_refused(name, match, *replaced(position, torch.ones(shape), mode), cache_mode=mode)

    for mode in ("Norm", "PA"):
        refused("k_cache has 3 dimensions; accepted: 4", 5, (PAGES, SIZE, DR), mode)
    refused(r"k_cache has shape .*; accepted: \[6, 2, 1, 32\]", 5, (PAGES, SIZE, 1, DV))
    refused(r"k_cache has shape .*; accepted: \[6, 2, 1, 32\]", 5, (PAGES, SIZE, 2, DR))
    refused(r"ckv_cache has shape .*; accepted: \[6, 2, 1, 64\]", 6, (PAGES + 1, SIZE, 1, DV))
    refused(r"k_cache has shape .*; accepted: \[2, 1, 5, 32\]", 5, (B + 1, 1, 5, DR), "Norm")
    refused(r"k_cache has shape .*; accepted: \[2, 1, 5, 32\]", 5, (B, 2, 5, DR), "Norm")
    refused(r"ckv_cache has shape .*; accepted: \[2, 1, 5, 64\]", 6, (B, 1, 4, DV), "Norm")
    no_rows = arguments("PA_BLK_BNSD")
    no_rows[5:] = [cache[:, :0] for cache in no_rows[5:]]
    check_refused(name, "accepted: pages with rows", *no_rows, cache_mode="PA_BLK_BNSD")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["PA_NZ", "PA_BLK_NZ"])
def test_refuses_columns_that_do_not_fill_nz_groups(mode: str, name: str) -> None:
    """32 bytes: 8 columns of fp32, 32 of int8."""
    kv, gamma, cos, sin, index, k_cache, ckv_cache = arguments(mode)
    narrow = [kv[..., : DV + 20], gamma, cos[..., :20], sin[..., :20], index, k_cache[..., :20], ckv_cache]
    check_refused(name, "k_cache has 20 columns; accepted: a multiple of 8", *narrow, cache_mode=mode)
    quantized = [kv[..., : 48 + DR], gamma[:48], cos, sin, index, k_cache.to(torch.int8)]
    quantized += [ckv_cache[..., :48].to(torch.int8)]
    options = {"k_rope_scale": torch.ones(1), "c_kv_scale": torch.ones(1)}
    match = "ckv_cache has 48 columns; accepted: a multiple of 32"
    check_refused(name, match, *quantized, cache_mode=mode, **options)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_quantization_parameters(name: str) -> None:
    args = arguments(cache_dtype=torch.int8)

    def refused(match: str, **options: Tensor) -> None:
        check_refused(name, match, *args, cache_mode="PA", **{**scales(), **options})

    refused(r"k_rope_scale has shape \[31\]; accepted: \[32\]", k_rope_scale=torch.ones(31))
    refused(r"c_kv_scale has shape \[1, 1\]; accepted: \[1, 64\]", c_kv_scale=torch.ones(1, 1))
    refused("c_kv_scale has 3 dimensions; accepted: 1 to 2", c_kv_scale=torch.ones(1, 1, DV))
    refused(r"c_kv_offset has shape \[2\]; accepted: \[64\]", c_kv_offset=torch.ones(2))
    lone = {"c_kv_offset": torch.ones(DV)}
    check_refused(
        name, "c_kv_offset is given; accepted: None without c_kv_scale", *arguments(), **lone, cache_mode="PA"
    )
