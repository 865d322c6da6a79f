from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from tests.kernels._mla_prolog import (
    BLOCK,
    DR,
    HCKV,
    HCQ,
    PAGES,
    D,
    N,
    arguments,
    assert_near,
    assert_same,
    call,
    expected,
    of_v2,
    slots,
    written,
)
from tests.kernels._numerics import assert_correctly_rounded

V3 = "npu_mla_prolog_v3"
FUNCTIONAL = "npu_mla_prolog_v3_functional"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
PAGED_MODES = ["PA_BSND", "PA_NZ", "PA_BLK_BSND", "PA_BLK_NZ"]


def simple(**changes: Any) -> dict[str, Any]:
    """One token with numbers that can be followed: He 2, Hcq 2, N 1, D 1, Dr 2, Hckv 2."""
    one = torch.ones(2, dtype=torch.bfloat16)
    a = {
        "token_x": torch.tensor([[1.0, 2.0]]).bfloat16(),
        "weight_dq": torch.eye(2).bfloat16(),
        "weight_uq_qr": torch.ones(2, 3).bfloat16(),
        "weight_uk": torch.ones(1, 1, 2).bfloat16(),
        "weight_dkv_kr": torch.eye(2).repeat(1, 2).bfloat16(),
        "rmsnorm_gamma_cq": one,
        "rmsnorm_gamma_ckv": one,
        "rope_sin": torch.zeros(1, 2).bfloat16(),
        "rope_cos": torch.ones(1, 2).bfloat16(),
        "kv_cache": torch.zeros(1, 1, 1, 2).bfloat16(),
        "kr_cache": torch.zeros(1, 1, 1, 2).bfloat16(),
        "cache_index": torch.zeros(1, dtype=torch.int64),
    }
    return a | changes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [(6,), (2, 3), (1,), (3, 1)])
def test_matches_float64(tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    a = arguments(tokens=tokens, dtype=dtype)
    exact = expected(a)
    query, query_rope, scale, norm, norm_scale, kv, kr = call(FUNCTIONAL, **a)
    assert scale.shape == norm_scale.shape == (0,)
    assert query.dtype == query_rope.dtype == norm.dtype == dtype
    assert_near(norm, exact.norm, dtype)
    assert_near(query, exact.query, dtype)
    assert_near(query_rope, exact.query_rope, dtype)
    where = slots(a)
    assert_near(kv.view(-1, HCKV)[where], exact.ckv, dtype)
    assert_near(kr.view(-1, DR)[where], exact.kr, dtype)


@pytest.mark.parametrize("tokens", [(6,), (2, 3)])
@pytest.mark.parametrize("cache_mode", PAGED_MODES)
@pytest.mark.parametrize("modes", [(0, 0, 0), (1, 2, 0), (2, 1, 1), (3, 1, 1)])
def test_caches_are_written_where_they_should_and_nowhere_else(
    modes: tuple[int, int, int], cache_mode: str, tokens: tuple[int, ...]
) -> None:
    a = arguments(modes, tokens, cache_mode)
    *outputs, kv, kr = call(FUNCTIONAL, **a)
    # The rows, from the same call with a cache of one row for each token.
    rows = math.prod(tokens)
    direct = a | {"cache_mode": "PA_BSND", "cache_index": torch.arange(rows).view(tokens)}
    direct |= {name: a[name].new_zeros(rows, 1, 1, a[name].shape[-1]) for name in ("kv_cache", "kr_cache")}
    direct.pop("actual_seq_len", None)
    *others, kv_rows, kr_rows = call(FUNCTIONAL, **direct)
    for given, wanted in zip(outputs, others, strict=True):
        assert_same(given, wanted)
    where, nz = slots(a), cache_mode.endswith("NZ")
    assert sorted(set(where)) == sorted(where)
    assert_same(kv, written(a["kv_cache"], kv_rows.flatten(0, 2), where, nz))
    assert_same(kr, written(a["kr_cache"], kr_rows.flatten(0, 2), where, nz))


@pytest.mark.parametrize(("cache_mode", "tokens"), [("BSND", (2, 3)), ("TND", (6,))])
@pytest.mark.parametrize("modes", [(0, 0, 0), (1, 2, 0), (1, 3, 0), (2, 1, 1), (3, 3, 0)])
def test_bsnd_and_tnd_write_the_row_of_each_token(
    modes: tuple[int, int, int], cache_mode: str, tokens: tuple[int, ...]
) -> None:
    a = arguments(modes, tokens, cache_mode)
    *outputs, kv, kr = call(FUNCTIONAL, **a)
    paged = a | {"cache_mode": "PA_BSND", "cache_index": torch.arange(6).view(tokens)}
    paged["kv_cache"] = a["kv_cache"].view(6, 1, 1, -1)
    if a["kr_cache"].numel():
        paged["kr_cache"] = a["kr_cache"].view(6, 1, 1, -1)
    *others, kv_paged, kr_paged = call(FUNCTIONAL, **paged)
    for given, wanted in zip([*outputs, kv, kr], [*others, kv_paged, kr_paged], strict=True):
        assert_same(given.flatten(), wanted.flatten())


def test_fused_tokens_and_batches_of_them_agree() -> None:
    flat = arguments(tokens=(6,))
    shaped = dict(flat)
    for name in ("token_x", "rope_sin", "rope_cos", "cache_index"):
        shaped[name] = flat[name].unflatten(0, (2, 3))
    for a, b in zip(call(FUNCTIONAL, **flat), call(FUNCTIONAL, **shaped), strict=True):
        assert_same(a.flatten(), b.flatten())


@pytest.mark.parametrize("modes", [(0, 0, 0), (1, 0, 0), (1, 2, 0)])
@pytest.mark.parametrize("cache_mode", ["PA_BSND", "PA_NZ"])
def test_v1_is_v3_without_its_options(modes: tuple[int, int, int], cache_mode: str) -> None:
    a = of_v2(arguments(modes, cache_mode=cache_mode))
    before = {name: t.clone() for name, t in a.items() if isinstance(t, Tensor)}
    outputs = call("npu_mla_prolog", **a)
    for name, tensor in before.items():
        assert_same(a[name], tensor)
    query, query_rope, _, _, _, kv, kr = call(
        FUNCTIONAL, **a, weight_quant_mode=modes[0], kv_cache_quant_mode=modes[1]
    )
    for given, wanted in zip(outputs, (query, query_rope, kv, kr), strict=True):
        assert_same(given, wanted)


@pytest.mark.parametrize("modes", [(0, 0, 0), (1, 0, 0), (1, 2, 0), (2, 0, 0), (2, 1, 1)])
def test_v2_is_v3_with_the_scale_at_the_end(modes: tuple[int, int, int]) -> None:
    a = of_v2(arguments(modes))
    before = {name: t.clone() for name, t in a.items() if isinstance(t, Tensor)}
    outputs = call("npu_mla_prolog_v2", **a)
    for name, tensor in before.items():
        assert_same(a[name], tensor)
    names = ("weight_quant_mode", "kv_cache_quant_mode", "query_quant_mode")
    query, query_rope, scale, _, _, kv, kr = call(FUNCTIONAL, **a, **dict(zip(names, modes, strict=True)))
    scale = scale if modes[2] else torch.zeros(1)
    for given, wanted in zip(outputs, (query, query_rope, kv, kr, scale), strict=True):
        assert_same(given, wanted)


def test_v3_writes_its_caches_and_the_functional_one_returns_them_last() -> None:
    a = arguments()
    before = a["kv_cache"].clone(), a["kr_cache"].clone()
    *outputs, kv, kr = call(FUNCTIONAL, **a)
    assert_same(a["kv_cache"], before[0])
    assert_same(a["kr_cache"], before[1])
    assert len(outputs) == 5 and not torch.equal(kv, before[0]) and not torch.equal(kr, before[1])
    for given, wanted in zip(call(V3, **a), outputs, strict=True):
        assert_same(given, wanted)
    assert_same(a["kv_cache"], kv)
    assert_same(a["kr_cache"], kr)


def test_no_query_norm_without_the_flag() -> None:
    a = arguments() | {"query_norm_flag": False}
    *_, norm, norm_scale, _, _ = call(FUNCTIONAL, **a)
    assert norm.shape == norm_scale.shape == (0,)


def test_negative_indices_are_not_written() -> None:
    a = arguments(cache_mode="PA_NZ")
    _, _, _, _, _, full, full_kr = call(FUNCTIONAL, **a)
    partly = a | {"cache_index": a["cache_index"].clone()}
    partly["cache_index"][::2] = torch.tensor([-1, -2, -100])
    *_, kv, kr = call(FUNCTIONAL, **partly)
    where = a["cache_index"].tolist()[1::2]
    for result, complete, before in ((kv, full, a["kv_cache"]), (kr, full_kr, a["kr_cache"])):
        changed = (result != before).flatten(2).any(-1).flatten()
        assert bool(changed.any())
        # In NZ order a row lies in every row of its page, so compare by writing the complete rows back.
        for slot in range(PAGES * BLOCK):
            rows = [nz_row(cache, slot) for cache in (result, complete, before)]
            assert_same(rows[0], rows[1] if slot in where else rows[2])


def nz_row(cache: Tensor, slot: int) -> Tensor:
    page, r = divmod(slot, cache.shape[1])
    d0 = 32 // cache.element_size()
    return cache[page].reshape(-1, cache.shape[1], d0)[:, r].flatten()


def test_nz_groups_32_columns_of_int8_and_16_of_bfloat16() -> None:
    plain, nz = (arguments((2, 1, 1), cache_mode=mode) for mode in ("PA_BSND", "PA_NZ"))
    *_, kv, kr = call(FUNCTIONAL, **plain)
    *_, kv_nz, kr_nz = call(FUNCTIONAL, **nz)
    assert (kv.dtype, kr.dtype) == (torch.int8, torch.bfloat16)
    for slot in nz["cache_index"].tolist():
        assert_same(nz_row(kv_nz, slot), kv.view(-1, HCKV)[slot])
        assert_same(nz_row(kr_nz, slot), kr.view(-1, DR)[slot])
        page, r = divmod(slot, BLOCK)
        # Written out for the second group of each.
        assert_same(kv_nz[page].flatten()[(BLOCK + r) * 32 :][:32], kv.view(-1, HCKV)[slot, 32:64])
        assert_same(kr_nz[page].flatten()[(BLOCK + r) * 16 :][:16], kr.view(-1, DR)[slot, 16:32])


def test_of_tokens_with_one_index_the_last_is_written() -> None:
    a = arguments() | {"cache_index": torch.zeros(6, dtype=torch.int64)}
    *_, kv, kr = call(FUNCTIONAL, **a)
    last = a | {"cache_index": torch.tensor([-1] * 5 + [0])}
    *_, kv_last, kr_last = call(FUNCTIONAL, **last)
    assert_same(kv, kv_last)
    assert_same(kr, kr_last)


def test_an_index_beyond_the_cache_is_refused_and_nothing_is_written() -> None:
    a = arguments()
    a["cache_index"][3] = PAGES * BLOCK
    before = a["kv_cache"].clone()
    with pytest.raises(ValueError, match=f"{PAGES * BLOCK}"):
        call(V3, **a)
    assert_same(a["kv_cache"], before)


@pytest.mark.parametrize("cache_mode", ["PA_BLK_BSND", "PA_BLK_NZ"])
def test_pages_of_sequences_of_any_length(cache_mode: str) -> None:
    """Lengths 5, 0 and 1 fill two pages, none and one; the first page of the first sequence is left out."""
    a = arguments(cache_mode=cache_mode)
    a |= {
        "actual_seq_len": torch.tensor([5, 5, 6], dtype=torch.int32),
        "cache_index": torch.tensor([-1, 4, 2]),
    }
    *_, kv, _ = call(FUNCTIONAL, **a)
    assert slots(a) == [-4, -3, -2, -1, 16, 8]
    direct = a | {"cache_mode": cache_mode.replace("_BLK", ""), "cache_index": torch.tensor(slots(a))}
    del direct["actual_seq_len"]
    *_, wanted, _ = call(FUNCTIONAL, **direct)
    assert_same(kv, wanted)


@pytest.mark.parametrize(
    ("ends", "pages", "message"),
    [
        ([5, 7], [0, 1, 2], r"actual_seq_len is \[5, 7\]; accepted: .* the last 6"),
        ([5, 4], [0, 1, 2], r"actual_seq_len is \[5, 4\]"),
        ([7, 6], [0, 1, 2], r"actual_seq_len is \[7, 6\]"),
        ([], [], r"actual_seq_len is \[\]"),
        ([5, 6], [0, 1], "cache_index has 2 pages; accepted: 3"),
        ([2, 6], [0, 1, 2], "cache_index has 3 pages; accepted: 2"),
    ],
)
def test_lengths_and_pages_must_fit(ends: list[int], pages: list[int], message: str) -> None:
    a = arguments(cache_mode="PA_BLK_BSND")
    a |= {"actual_seq_len": torch.tensor(ends, dtype=torch.int32)}
    a |= {"cache_index": torch.tensor(pages, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"^{V3}: {message}"):
        call(V3, **a)


def test_rope_stores_the_even_elements_first() -> None:
    """k_pe is (1, 2, 3, 4): cos 1 and sin 0 leave the evens (1, 3), then the odds (2, 4)."""
    weight = torch.zeros(2, 6).bfloat16()
    weight[0, 2:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    a = simple(
        weight_uq_qr=torch.ones(2, 5).bfloat16(),
        weight_dkv_kr=weight,
        kr_cache=torch.zeros(1, 1, 1, 4).bfloat16(),
        rope_cos=torch.ones(1, 4).bfloat16(),
        rope_sin=torch.zeros(1, 4).bfloat16(),
    )
    call(V3, **a)
    assert a["kr_cache"].flatten().tolist() == [1, 3, 2, 4]
    a |= {"rope_cos": a["rope_sin"], "rope_sin": a["rope_cos"]}
    call(V3, **a)
    assert a["kr_cache"].flatten().tolist() == [-2, -4, 1, 3]


def test_both_halves_of_cosine_and_sine_are_read() -> None:
    weight = torch.zeros(2, 4).bfloat16()
    weight[0, 2:] = torch.tensor([1.0, 1.0])
    for cos, sin, kr in (
        ([2.0, 3.0], [0.0, 0.0], [2.0, 3.0]),
        ([0.0, 0.0], [2.0, 3.0], [-2.0, 3.0]),
    ):
        a = simple(weight_dkv_kr=weight)
        a |= {"rope_cos": torch.tensor([cos]).bfloat16(), "rope_sin": torch.tensor([sin]).bfloat16()}
        call(V3, **a)
        assert a["kr_cache"].flatten().tolist() == kr


def test_sine_comes_before_cosine() -> None:
    a = arguments()
    names = [x.name for x in torch.ops.npu.npu_mla_prolog_v3.default._schema.arguments]
    assert names.index("rope_sin") + 1 == names.index("rope_cos")
    weights = [a.pop(name) for name in names[:11]]
    right = torch.ops.npu.npu_mla_prolog_v3_functional(*weights, **a)
    weights[7], weights[8] = weights[8], weights[7]
    wrong = torch.ops.npu.npu_mla_prolog_v3_functional(*weights, **a)
    assert torch.equal(right[0], wrong[0])
    assert not torch.allclose(right[1], wrong[1], atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gamma_is_multiplied_before_the_only_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, gamma = torch.randn(16, HCQ).to(dtype), torch.randn(HCQ).to(dtype)
    a = arguments(tokens=(16,), dtype=dtype)
    a |= {"token_x": x, "weight_dq": torch.eye(HCQ).to(dtype), "rmsnorm_gamma_cq": gamma}
    a |= {"weight_dkv_kr": torch.zeros(HCQ, HCKV + DR).to(dtype), "qc_qr_scale": 1.0}
    a["cache_index"] = torch.full((16,), -1)
    norm = call(FUNCTIONAL, **a)[3]
    exact = x.double() / torch.sqrt((x.double() ** 2).mean(-1, keepdim=True) + 1e-2)
    assert_correctly_rounded(norm, exact * gamma.double())
    twice = exact.to(dtype) * gamma
    assert (norm != twice).double().mean() > 0.05


def test_kv_is_rounded_before_the_rotation() -> None:
    """Step 6: k_pe is (1 + 2^-9, 1), rounded (1, 1), and cos = sin = 1 subtracts them."""
    a = simple(token_x=torch.tensor([[1.0, 2.0**-9]]).bfloat16())
    a |= {"weight_dkv_kr": torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 0]]).bfloat16()}
    a |= {"rope_sin": torch.ones(1, 2).bfloat16()}
    call(V3, **a)
    assert a["kr_cache"].flatten().tolist() == [0.0, 2.0]


def test_cq_is_rounded_before_the_norm() -> None:
    """Step 1: cq is (1 + 2^-9, 1), rounded (1, 1). The factor takes only the former beyond a midpoint."""
    a = simple(token_x=torch.tensor([[1.0, 2.0**-9]]).bfloat16())
    a |= {"weight_dq": torch.tensor([[1.0, 1.0], [1.0, 0.0]]).bfloat16(), "rmsnorm_epsilon_cq": 0.0}
    a |= {"query_norm_flag": True, "qc_qr_scale": 1 + 0.9 * 2.0**-8}
    assert call(FUNCTIONAL, **a)[3].tolist() == [[1.0, 1.0]]


def test_columns_of_a_head_lie_together() -> None:
    """Zeroed columns of the first head leave the other heads as they are."""
    a = arguments()
    query, query_rope, *_ = call(FUNCTIONAL, **a)
    a["weight_uq_qr"][:, :D] = 0
    some, some_rope, *_ = call(FUNCTIONAL, **a)
    assert torch.equal(some_rope, query_rope)
    assert bool((some[:, 0] == 0).all()) and torch.equal(some[:, 1:], query[:, 1:])
    a["weight_uq_qr"][:, D : D + DR] = 0
    _, none, *_ = call(FUNCTIONAL, **a)
    assert bool((none[:, 0] == 0).all()) and torch.equal(none[:, 1:], query_rope[:, 1:])


def test_each_epsilon_and_gamma_belongs_to_its_norm() -> None:
    a = arguments()
    before = call(FUNCTIONAL, **a)
    other = call(
        FUNCTIONAL, **a | {"rmsnorm_epsilon_cq": 10.0, "rmsnorm_gamma_cq": a["rmsnorm_gamma_cq"] * 2}
    )
    assert torch.equal(before[5], other[5]) and torch.equal(before[6], other[6])
    assert not torch.equal(before[0], other[0]) and not torch.equal(before[1], other[1])
    other = call(
        FUNCTIONAL, **a | {"rmsnorm_epsilon_ckv": 10.0, "rmsnorm_gamma_ckv": a["rmsnorm_gamma_ckv"] * 2}
    )
    assert torch.equal(before[0], other[0]) and torch.equal(before[6], other[6])
    assert not torch.equal(before[5], other[5])


def test_query_meets_the_cached_latent_as_it_would_meet_the_expanded_key() -> None:
    """Absorption: query . ckv is q_nope . (ckv W_UK^T), what the model without it computes."""
    a = arguments(dtype=torch.float32) | {"qc_qr_scale": 1.0, "kc_scale": 1.0}
    query, _, _, norm, _, kv, _ = call(FUNCTIONAL, **a)
    ckv = kv.view(-1, HCKV)[a["cache_index"]]
    q_nope = (norm @ a["weight_uq_qr"]).view(6, N, D + DR)[..., :D]
    key = torch.einsum("th,ndh->tnd", ckv, a["weight_uk"])
    torch.testing.assert_close(
        torch.einsum("tnh,th->tn", query, ckv), (q_nope * key).sum(-1), rtol=1e-4, atol=1e-4
    )


def test_weights_and_caches_may_be_strided() -> None:
    a = arguments()
    wanted = call(FUNCTIONAL, **a)
    strided = dict(a)
    for name in ("weight_dq", "weight_uq_qr", "weight_dkv_kr", "token_x", "rope_sin"):
        strided[name] = a[name].T.contiguous().T
    strided["weight_uk"] = a["weight_uk"].transpose(1, 2).contiguous().transpose(1, 2)
    both = torch.cat([a["kv_cache"], a["kr_cache"]], dim=-1)
    strided |= {"kv_cache": both[..., :HCKV], "kr_cache": both[..., HCKV:]}
    for given, wanted_one in zip(call(FUNCTIONAL, **strided), wanted, strict=True):
        torch.testing.assert_close(given, wanted_one, rtol=1e-2, atol=1e-2)
    call(V3, **strided)
    torch.testing.assert_close(both, torch.cat(wanted[-2:], dim=-1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("modes", [(0, 0, 0), (1, 2, 0), (2, 1, 1), (3, 3, 0)])
@pytest.mark.parametrize("tokens", [(0,), (0, 3), (2, 0)])
def test_no_tokens(tokens: tuple[int, ...], modes: tuple[int, int, int]) -> None:
    a = arguments(modes, tokens)
    query, query_rope, _, norm, _, kv, kr = call(FUNCTIONAL, **a)
    assert query.shape == (*tokens, N, HCKV) and query_rope.shape == (*tokens, N, DR)
    assert norm.shape == (*tokens, HCQ)
    assert_same(kv, a["kv_cache"])
    assert_same(kr, a["kr_cache"])


@pytest.mark.parametrize("cache_mode", PAGED_MODES)
def test_a_cache_without_pages_takes_nothing(cache_mode: str) -> None:
    a = arguments(cache_mode=cache_mode)
    query = call(FUNCTIONAL, **a)[0]
    empty = {name: a[name][:0].clone() for name in ("kv_cache", "kr_cache")}
    assert torch.equal(call(V3, **a | empty)[0], query)


def test_a_token_of_zeros() -> None:
    a = arguments()
    a["token_x"][2] = 0
    query, query_rope, _, norm, _, kv, kr = call(FUNCTIONAL, **a)
    slot = int(a["cache_index"][2])
    for row in (query[2], query_rope[2], norm[2], kv.view(-1, HCKV)[slot], kr.view(-1, DR)[slot]):
        assert bool((row == 0).all())


def test_large_and_tiny_tokens_keep_their_norm() -> None:
    for factor in (2.0**40, 2.0**-40):
        a = arguments() | {"rmsnorm_epsilon_cq": 0.0, "rmsnorm_epsilon_ckv": 0.0}
        wanted = call(FUNCTIONAL, **a)
        a["token_x"] = a["token_x"] * factor
        given = call(FUNCTIONAL, **a)
        for output in (0, 1, 3, 5):
            torch.testing.assert_close(given[output], wanted[output], rtol=1e-2, atol=1e-3)
