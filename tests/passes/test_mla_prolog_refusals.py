"""What looks like the prolog of latent attention and is none: not fused, said why, computed as eager does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes._harness import DIALECTS
from tests.passes._mla import NORMS, ROPES, UKS, WRITES, Dims, Prolog, Spelling, inputs
from tests.passes._mla_judge import V3, altered, judged, refused

F32 = torch.float32

Step = Callable[..., Any]

PLAIN = Spelling()
SIDE_BY_SIDE = "rotated pairs are stored side by side, the operator stores halves"
EXPANDED = "keys and values are expanded from the latent before they are cached, or not cached"


def test_without_a_change_it_fuses() -> None:
    model, args = altered(dtype=F32)
    assert judged(model, args).fused == {V3: 1}


def turned_by(rope: str) -> dict[str, Step]:
    def turn(self: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ROPES[rope](x, cos, sin)

    return {"turn_query": turn, "turn_key": turn}


@pytest.mark.parametrize(("dialect", "dynamic"), [("aot", False), ("inductor", True)])
@pytest.mark.parametrize(
    ("rope", "reason", "detail"),
    [
        ("pairs", SIDE_BY_SIDE, "mla_prolog with cache_layout='npu'"),
        ("complex", SIDE_BY_SIDE, "mla_prolog with cache_layout='npu'"),
        (
            "halves",
            "halves are rotated, the operator rotates adjacent pairs",
            "npu_fusion.prepare(model) permutes the weights for it",
        ),
    ],
)
def test_other_rotations(rope: str, reason: str, detail: str, dynamic: bool, dialect: str) -> None:
    model, args = altered(**turned_by(rope))
    refused(model, args, reason, detail, dynamic=dynamic, dialect=dialect)


def test_another_order_in_the_cache_does_not_allow_halves() -> None:
    model, args = altered(**turned_by("halves"))
    reason = "halves are rotated, the operator rotates adjacent pairs"
    refused(model, args, reason, numerics="relaxed", cache_layout="npu")


# Steps, each for altered(), and the reason.

Case = tuple[dict[str, Step], str, str]


def _expanded(self: Any, kv_cache: Tensor, kr_cache: Tensor, kv: Tensor, kr: Tensor, at: Tensor) -> None:
    """Stands for a key cache: one latent per token, expanded and reduced to the cache's width."""
    both = F.linear(kv, self.w_kvb)
    WRITES["paged_put"](kv_cache, both[..., : kv.shape[-1]].contiguous(), at)
    WRITES["paged_put"](kr_cache, kr, at)


def _only_key(self: Any, kv_cache: Tensor, kr_cache: Tensor, kv: Tensor, kr: Tensor, at: Tensor) -> None:
    WRITES["paged_put"](kr_cache, kr, at)


def _only_latent(self: Any, kv_cache: Tensor, kr_cache: Tensor, kv: Tensor, kr: Tensor, at: Tensor) -> None:
    WRITES["paged_put"](kv_cache, kv, at)


def _other_slots(self: Any, kv_cache: Tensor, kr_cache: Tensor, kv: Tensor, kr: Tensor, at: Tensor) -> None:
    WRITES["paged_put"](kv_cache, kv, at)
    WRITES["paged_put"](kr_cache, kr, at + 1)


def _flipped(self: Any, kv_cache: Tensor, kr_cache: Tensor, kv: Tensor, kr: Tensor, at: Tensor) -> None:
    WRITES["paged_put"](kv_cache, kv.transpose(0, 1), at)
    WRITES["paged_put"](kr_cache, kr.transpose(0, 1), at)


def _scaled_key(self: Any, kv_cache: Tensor, kr_cache: Tensor, kv: Tensor, kr: Tensor, at: Tensor) -> None:
    WRITES["paged_put"](kv_cache, kv, at)
    WRITES["paged_put"](kr_cache, kr * 2, at)


def _twice(self: Any, kv_cache: Tensor, kr_cache: Tensor, kv: Tensor, kr: Tensor, at: Tensor) -> None:
    for place in (at, 63 - at):
        WRITES["paged_put"](kv_cache, kv, place)
    WRITES["paged_put"](kr_cache, kr, at)


def _everything(self: Any, *values: Tensor) -> tuple[Tensor, ...]:
    return values


def _offset(name: str) -> Step:
    def norm(self: Any, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (wide * (1.0 + getattr(self, name).float())).to(x.dtype)

    return norm


def _nope_doubled(self: Any, nope: Tensor) -> Tensor:
    return UKS["einsum"](nope * 2, self.w_uk)


def _rope_trebled(self: Any, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ROPES["slices"](q * 3, cos, sin)


def _own_cosine(self: Any, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ROPES["slices"](k, cos * 1.5, sin)


def _whole_width(self: Any, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ROPES["transposed"](k, cos, sin)


def _partial(self: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = ROPES["slices"](x[..., :half], cos[..., :half], sin[..., :half])
    return torch.cat((turned, x[..., half:]), -1)


def _bias(name: str, weight: str) -> dict[str, Step]:
    def project(self: Any, x: Tensor) -> Tensor:
        w = getattr(self, weight)
        return F.linear(x, w, torch.full_like(w[:, 0], 0.5))

    return {name: project}


def _other_input(self: Any, x: Tensor) -> Tensor:
    return F.linear(x * 2, self.w_dkv)


def _plain_cq(self: Any, cq: Tensor) -> Tensor:
    return cq


def _epsilon_of(name: str) -> Step:
    def norm(self: Any, x: Tensor) -> Tensor:
        gamma = getattr(self, name)
        return NORMS["once"](x, gamma, gamma[0] * 1e-6)

    return norm


BIAS = "a projection has a bias"

CASES: dict[str, Case] = {
    "bias of the query's down projection": (_bias("down_query", "w_dq"), BIAS, ""),
    "bias of the latent's": (_bias("down_latent", "w_dkv"), BIAS, ""),
    "bias of the up projection": (_bias("up", "w_uq"), BIAS, ""),
    "offset of the query's norm": (
        {"norm_query": _offset("g_cq")},
        "the weight of a norm has an offset (1 + w)",
        "",
    ),
    "offset of the latent's norm": (
        {"norm_latent": _offset("g_ckv")},
        "the weight of a norm has an offset (1 + w)",
        "",
    ),
    "expanded caches": ({"write": _expanded}, EXPANDED, "mla_absorb attends to a cached latent"),
    "no latent cache": (
        {"write": _only_key, "results": _everything},
        "the latent is not written to a cache in this graph",
        "",
    ),
    "no key cache": (
        {"write": _only_latent, "results": _everything},
        "the rotated key is not written to a cache of its own",
        "",
    ),
    "other slots": ({"write": _other_slots}, "the two caches are written at different places", ""),
    "rows of another token": ({"write": _flipped}, "the new rows are not one per token", ""),
    "a scaled key": ({"write": _scaled_key}, "the rotated key is not written to a cache of its own", ""),
    "stored twice": ({"write": _twice}, "the latent or the rotated key is written to several caches", ""),
    "parts scaled differently": (
        {"heads": _nope_doubled, "turn_query": _rope_trebled},
        "the parts of the query are scaled by different numbers",
        "2.0 and 3.0",
    ),
    "angles of the key's own": (
        {"turn_key": _own_cosine},
        "query and key are rotated by different angles",
        "",
    ),
    "one reads half of the cosine, one all": (
        {"turn_key": _whole_width},
        "query and key are rotated by different angles",
        "",
    ),
    "partial rotation": (
        {"turn_query": _partial, "turn_key": _partial},
        "the rotated key is not written to a cache of its own",
        "",
    ),
    "no low-rank query": (
        {"norm_query": _plain_cq},
        "the query has no low-rank projection of the same hidden states",
        "",
    ),
    "an epsilon of the query that is a tensor": (
        {"norm_query": _epsilon_of("g_cq")},
        "the query has no low-rank projection of the same hidden states",
        "",
    ),
    "another input for the latent": (
        {"down_latent": _other_input},
        "the query has no low-rank projection of the same hidden states",
        "",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_near_misses(name: str) -> None:
    steps, reason, detail = CASES[name]
    model, args = altered(dtype=F32, **steps)
    refused(model, args, reason, detail)


def test_an_epsilon_that_is_a_tensor() -> None:
    model, args = altered(dtype=F32, norm_latent=_epsilon_of("g_ckv"))
    outcome = judged(model, args)
    assert outcome.fused == {}
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        assert torch.equal(have, want)


Results = tuple[Tensor, ...]


def flat(rows: Tensor) -> Tensor:
    return rows.flatten(0, 1)


def put(cache: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    width = cache.shape[-1]
    return cache.view(-1, width).index_put((slots.view(-1),), flat(rows)).view(cache.shape)


def _read_later(kv: Tensor, kr: Tensor, kv_cache: Tensor, kr_cache: Tensor, at: Tensor) -> Results:
    new = put(kv_cache, kv, at), put(kr_cache, kr, at)
    return (*new, new[0] - kv_cache)


def _grown(kv: Tensor, kr: Tensor, kv_cache: Tensor, kr_cache: Tensor, at: Tensor) -> Results:
    return tuple(torch.cat((c.flatten(0, 2), flat(r))) for c, r in ((kv_cache, kv), (kr_cache, kr)))


def _in_one(kv: Tensor, kr: Tensor, kv_cache: Tensor, kr_cache: Tensor, at: Tensor) -> Results:
    return (put(torch.cat((kv_cache, kr_cache), -1), torch.cat((kv, kr), -1), at),)


def _as_type(kv: Tensor, kr: Tensor, kv_cache: Tensor, kr_cache: Tensor, at: Tensor) -> Results:
    narrow = torch.float16
    return tuple(put(c.to(narrow), r.to(narrow), at) for c, r in ((kv_cache, kv), (kr_cache, kr)))


def _for_heads(kv: Tensor, kr: Tensor, kv_cache: Tensor, kr_cache: Tensor, at: Tensor) -> Results:
    """Caches [B, 2, L, C] with a row for each of two heads."""
    places = torch.arange(2, 5)
    new = []
    for cache, rows in ((kv_cache, kv), (kr_cache, kr)):
        by_head = cache.view(2, 2, 16, cache.shape[-1]).clone()
        by_head[:, :, places] = rows.unsqueeze(1).expand(-1, 2, -1, -1)
        new.append(by_head)
    return tuple(new)


FUNCTIONAL: dict[str, tuple[Callable[..., Results], str, str]] = {
    "the old cache is read": (_read_later, "the old cache is read after the write", "by "),
    "grown": (_grown, "the cache grows: it is put together with cat", "use a static cache"),
    "in one tensor": (_in_one, "latent and rotated key are stored in one tensor", ""),
    "of another type": (_as_type, "the operator takes one type throughout", ""),
    "of several heads": (_for_heads, "a cache has rows of several heads", ""),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_other_caches(name: str) -> None:
    write, reason, detail = FUNCTIONAL[name]
    nothing: Step = lambda self, *values: None  # noqa: E731 - a step
    model, args = altered(dtype=F32, write=nothing, results=_everything)

    def fn(x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, kv: Tensor, kr: Tensor) -> Any:
        query, turned, _, _, _, latent, key = model(x, cos, sin, slots, kv, kr)
        return (query, turned, *write(latent, key, kv, kr, slots))

    refused(fn, args, reason, detail)


PREPARED = Spelling(down="matmul", up="matmul")
FITS = Dims(B=1, S=2, He=1024, Hcq=1536, N=1, D=128, Dr=64, Hckv=512, page=16)
V1 = Dims(B=1, S=2, He=7168, Hcq=1536, N=32, D=128, Dr=64, Hckv=512, page=16)


def sized(dims: Dims, spelling: Spelling = PREPARED, **changes: int) -> tuple[Prolog, list[Tensor]]:
    model = Prolog(spelling, dataclasses.replace(dims, **changes), torch.bfloat16)
    return model, inputs(model, torch.bfloat16)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_prepared_weights_fuse_for_a_target(dialect: str) -> None:
    outcome = judged(*sized(FITS), target="ascend910b", dialect=dialect)
    assert outcome.fused == {V3: 1}, outcome.report.refused
    assert outcome.report.operators_after["npu." + V3] == 1
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        torch.testing.assert_close(have, want, rtol=4e-2, atol=4e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "operator", "changes"),
    [
        ("ascend910b-7.0", "npu_mla_prolog", {}),
        ("ascend910b-7.1", "npu_mla_prolog_v2", {"N": 8}),
        ("ascend910_93-7.1", "npu_mla_prolog_v2", {"N": 8, "page": 128, "S": 16}),
    ],
)
def test_a_release_without_v3_gets_its_own_operator(
    target: str, operator: str, changes: dict[str, int]
) -> None:
    model, args = sized(V1, **changes)
    outcome = judged(model, args, target=target)
    assert outcome.fused == {operator: 1}, outcome.report.refused
    assert outcome.report.operators_after["npu." + operator] == 1
    assert not {"aten.mm", "aten.bmm", "aten.index_put"} & set(outcome.report.operators_after)
    for cache, result in zip(args[4:], outcome.result[2:], strict=True):
        assert torch.equal(cache, result)
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        torch.testing.assert_close(have, want, rtol=4e-2, atol=4e-2)


@pytest.mark.parametrize(
    "spelling", [Spelling(), PREPARED.but(down="merged"), PREPARED.but(uk="sliced")], ids=str
)
def test_weights_that_are_not_prepared(spelling: Spelling) -> None:
    reason = "the weights are not laid out as the operator takes them"
    detail = "npu_fusion.prepare(model) lays them out once"
    refused(*sized(FITS, spelling), reason, detail, target="ascend910b")


OUTSIDE = "a size is outside of what the operator takes on the target"


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"He": 1000}, "He is 1000; accepted: 1024, 2048"),
        ({"Hcq": 512}, "Hcq is 512; accepted: 1536, 2048"),
        ({"N": 3}, "N is 3; accepted: 1, 2, 4"),
        ({"D": 64}, "D is 64; accepted: 128, 192"),
        ({"Dr": 32}, "Dr is 32; accepted: 64"),
        ({"Hckv": 256}, "Hckv is 256; accepted: 512"),
        ({"page": 24}, "BlockSize is 24; accepted: 16, 32"),
    ],
    ids=str,
)
def test_sizes_that_a_target_does_not_take(changes: dict[str, int], detail: str) -> None:
    refused(*sized(FITS, **changes), OUTSIDE, detail, target="ascend910b")


def test_older_releases_take_less() -> None:
    refused(*sized(FITS), OUTSIDE, "He is 1024; accepted: 7168", target="ascend910b-7.1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "changes", "reason", "detail"),
    [
        ("ascend910b-7.0", {"N": 16}, OUTSIDE, "N is 16; accepted: 32, 64, 128"),
        ("ascend910b-7.1", {"N": 4}, OUTSIDE, "N is 4; accepted: 8, 16"),
        ("ascend910b-7.1", {"N": 8, "D": 192}, OUTSIDE, "D is 192; accepted: 128"),
        ("ascend910b-7.1", {"N": 8, "page": 32}, OUTSIDE, "BlockSize is 32; accepted: 16, 128"),
        (
            "ascend910_93-7.1",
            {"N": 8, "S": 17},
            "the operator takes fewer tokens per sequence on the target",
            "S is 17, at most 16",
        ),
    ],
)
def test_limits_of_older_releases(target: str, changes: dict[str, int], reason: str, detail: str) -> None:
    refused(*sized(V1, **changes), reason, detail, target=target)


def test_a_target_takes_bfloat16_only() -> None:
    model = Prolog(PREPARED, dtype=torch.float16)
    reason = "the operator does not take caches of this type"
    refused(model, inputs(model, torch.float16), reason, "float16", target="ascend910b")
