"""The prolog of multi-head latent attention in every spelling of ``_mla``: fused, with eager's numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion import get_npu_backend
from tests.passes._harness import DIALECTS, Outcome
from tests.passes._mla import NORMS, NPU_WRITES, UKS, WRITES, Dims, Prolog, Spelling, inputs
from tests.passes._mla_judge import (
    LEFT,
    PAIRED,
    V3,
    altered,
    from_nz,
    judged,
    options,
    oracle,
    sorted_pairs,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TURNS = ("slices", "transposed", "interleave_rope", *PAIRED)

PLAIN = Spelling()
ALONE = [
    PLAIN,
    *(PLAIN.but(norm=norm) for norm in NORMS if norm != PLAIN.norm),
    *(PLAIN.but(down=down) for down in ("merged", "matmul")),
    PLAIN.but(up="matmul"),
    *(PLAIN.but(uk=uk) for uk in (*UKS, "sliced") if uk != PLAIN.uk),
    *(PLAIN.but(rope=rope) for rope in TURNS if rope != PLAIN.rope),
    *(PLAIN.but(cache=cache) for cache in WRITES if cache != PLAIN.cache),
    *(PLAIN.but(cache=cache, rope="interleave_rope") for cache in NPU_WRITES),
    PLAIN.but(tokens=2),
]
"""Each axis varied alone. npu_kv_rmsnorm_rope_cache rotates as npu_interleave_rope does."""


def combinations(count: int) -> list[Spelling]:
    chosen: list[Spelling] = []
    pick = random.Random(0)
    while len(chosen) < count:
        spelling = Spelling(
            pick.choice(list(NORMS)),
            pick.choice(("linear", "merged", "matmul")),
            pick.choice(("linear", "matmul")),
            pick.choice((*UKS, "sliced")),
            pick.choice(TURNS),
            pick.choice((*WRITES, *NPU_WRITES)),
            pick.choice((2, 3)),
        )
        flat = spelling.tokens == 2 and spelling.cache.startswith("static")
        if not flat and (spelling.cache not in NPU_WRITES or spelling.rope == "interleave_rope"):
            chosen.append(spelling)
    return chosen


def named(spelling: Any) -> str | None:
    return "-".join(str(v) for v in vars(spelling).values()) if isinstance(spelling, Spelling) else None


TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def as_rows(model: Prolog, results: Sequence[Tensor], before: Sequence[Tensor], paired: bool) -> list[Tensor]:
    """Results as the oracle has them: NZ caches as rows, rotated pairs (if ``paired``) as halves."""
    query, turned, *kept = results
    kept = [from_nz(c) if model.spelling.cache == "npu_nz" else c for c in kept]
    if paired:
        turned = sorted_pairs(turned)
        kept[1] = torch.where((kept[1] != before[1]).any(-1, keepdim=True), sorted_pairs(kept[1]), kept[1])
    return [query, turned, *kept]


def check(model: Prolog, args: list[Tensor], **given: Any) -> Outcome:
    """It is fused, into the operator alone; it writes what eager writes; it is as exact as eager."""
    dtype, s = args[0].dtype, model.spelling
    first = [a.clone() for a in args]
    before = [from_nz(c) if s.cache == "npu_nz" else c for c in first[4:]]
    outcome = judged(model, args, **options(s), **given)
    assert outcome.fused == {V3: 1}, outcome.report.refused
    assert outcome.report.operators_before["aten.mm"] >= 2
    assert set(outcome.report.operators_after) <= LEFT, outcome.code
    assert outcome.report.operators_after[f"npu.{V3}"] == 1
    results, expected = outcome.result[:4], outcome.expected[:4]
    if s.cache not in ("npu_v1", "npu_functional"):
        for cache, result in zip(args[4:], results[2:], strict=True):
            assert torch.equal(cache, result)
    for arg, copy in zip(args[:4], first[:4], strict=True):
        assert torch.equal(arg, copy)
    exact = oracle(model, *first)
    fused = as_rows(model, results, before, False)
    eager = as_rows(model, expected, before, s.rope in PAIRED)
    for have, want, right in zip(fused, eager, exact, strict=True):
        assert (have.dtype, have.shape) == (want.dtype, want.shape)
        torch.testing.assert_close(have, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        error, theirs = ((y.double() - right).abs().mean() for y in (have, want))
        assert error <= 1.05 * theirs, (float(error), float(theirs))
    for have, want, old in zip(fused[2:], eager[2:], before, strict=True):
        untouched = (want == old).all(-1)
        assert untouched.any() and not untouched.all()
        assert torch.equal(have[untouched], old[untouched])
    return outcome


def model_of(spelling: Spelling, dtype: torch.dtype, dims: Dims | None = None) -> tuple[Prolog, list[Tensor]]:
    model = Prolog(spelling, dims or Dims(S=11), dtype)
    return model, inputs(model, dtype)


@pytest.mark.by_turns("dialect", "dynamic", "dtype")
@pytest.mark.parametrize(
    ("dialect", "dynamic", "dtype"), [("aot", False, torch.bfloat16), ("inductor", True, torch.float16)]
)
@pytest.mark.parametrize("spelling", ALONE, ids=named)
def test_each_axis_alone(spelling: Spelling, dialect: str, dynamic: bool, dtype: torch.dtype) -> None:
    check(*model_of(spelling, dtype), dialect=dialect, dynamic=dynamic)


@pytest.mark.parametrize(("spelling", "number"), [(s, i) for i, s in enumerate(combinations(20))], ids=named)
def test_combinations(spelling: Spelling, number: int) -> None:
    dialect, dynamic = DIALECTS[number % 2], number % 4 in (0, 3)
    check(*model_of(spelling, FLOATS[number % 3]), dialect=dialect, dynamic=dynamic)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_float32(dynamic: bool, dialect: str) -> None:
    check(*model_of(PLAIN, torch.float32), dialect=dialect, dynamic=dynamic)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "sizes", [{"N": 1}, {"B": 1}, {"S": 1}, {"B": 1, "S": 1}, {"N": 1, "B": 1, "S": 1}], ids=str
)
@pytest.mark.parametrize(
    "spelling", [PLAIN, PLAIN.but(uk="bmm", rope="transposed", cache="static_copy")], ids=named
)
def test_sizes_of_one(spelling: Spelling, sizes: dict[str, int], dialect: str) -> None:
    check(*model_of(spelling, torch.float32, Dims(**sizes)), dialect=dialect)


def scores(model: Prolog, results: Sequence[Tensor], slots: Tensor) -> Tensor:
    """Of each token's heads with every row that was written."""
    query, turned, *kept = (y.double() for y in results)
    latent, key = (c.flatten(0, -2)[slots.flatten()] for c in kept)
    return query.flatten(0, 1) @ latent.T + turned.flatten(0, 1) @ key.T


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rope", PAIRED)
def test_another_order_in_the_cache_has_the_same_scores(rope: str, dtype: torch.dtype) -> None:
    model, args = model_of(PLAIN.but(rope=rope), dtype)
    outcome = check(model, args)
    assert not torch.equal(outcome.result[3], outcome.expected[3])
    have, want = (scores(model, y, args[3]) for y in (outcome.result, outcome.expected))
    torch.testing.assert_close(have, want, rtol=TOLERANCE[dtype], atol=20 * TOLERANCE[dtype])


def normed_too(self: Any, *values: Tensor) -> tuple[Tensor, ...]:
    return (*values[:4], values[4] * 2)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_second_reader_of_the_normed_query_gets_query_norm(dynamic: bool, dialect: str) -> None:
    model, args = altered(dims=Dims(S=11), dtype=torch.float16, results=normed_too)
    outcome = check(model, args, dialect=dialect, dynamic=dynamic)
    assert "query_norm_flag = True" in outcome.code
    torch.testing.assert_close(outcome.result[4], outcome.expected[4], rtol=4e-3, atol=4e-3)


def by_root(number: float) -> Any:
    return lambda self, q: q * number


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_that_scale_query_and_latent_are_arguments(dtype: torch.dtype, dialect: str) -> None:
    def latent(self: Any, x: Tensor) -> Tensor:
        return NORMS["hf"](x, self.g_ckv, 1e-6) * 1.75

    model, args = altered(dtype=dtype, scaled=by_root(2.5), norm_latent=latent)
    outcome = judged(model, args, dialect=dialect)
    assert outcome.fused == {V3: 1}, outcome.report.refused
    assert set(outcome.report.operators_after) <= LEFT
    assert "qc_qr_scale = 2.5" in outcome.code and "kc_scale = 1.75" in outcome.code
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        torch.testing.assert_close(have, want, rtol=TOLERANCE[dtype], atol=3 * TOLERANCE[dtype])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_added_to_the_query_stays(dialect: str) -> None:
    def heads(self: Any, nope: Tensor) -> Tensor:
        return UKS["einsum"](nope, self.w_uk) + self.w_uk[:, 0]

    model, args = altered(dtype=torch.float32, heads=heads)
    outcome = judged(model, args, dialect=dialect)
    assert outcome.fused == {V3: 1}, outcome.report.refused
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_angles_of_full_width_that_repeat(dynamic: bool, dialect: str) -> None:
    def turn(self: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        c, s = (t.squeeze(2)[..., :half].unsqueeze(2) for t in (cos, sin))
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.cat((even * c - odd * s, odd * c + even * s), -1)

    model, args = altered(dims=Dims(S=11), dtype=torch.float32, turn_query=turn, turn_key=turn)
    x, cos, sin, *rest = args
    frequencies = torch.atan2(sin, cos)[..., : model.dims.Dr // 2]

    def fn(x: Tensor, f: Tensor, *rest: Tensor) -> Any:
        angles = torch.cat((f, f), -1)
        return model(x, angles.cos(), angles.sin(), *rest)

    outcome = judged(fn, [x, frequencies, *rest], dialect=dialect, dynamic=dynamic)
    assert outcome.fused == {V3: 1}, outcome.report.refused
    if (dialect, dynamic) == ("aot", False):
        assert outcome.report.operators_after["aten.cat"] == 1  # the model's own, not one for the operator
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_angles_that_batches_share(dynamic: bool, dialect: str) -> None:
    model, (x, cos, sin, *rest) = altered(dims=Dims(S=11), dtype=torch.float16)
    outcome = judged(model, [x, cos[:1].clone(), sin[:1].clone(), *rest], dialect=dialect, dynamic=dynamic)
    assert outcome.fused == {V3: 1}, outcome.report.refused
    assert set(outcome.report.operators_after) <= LEFT
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        torch.testing.assert_close(have, want, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("cache", ["paged_put", "static_put", "npu", "npu_nz"])
def test_negative_slots(cache: str, dialect: str) -> None:
    """They count from the end for index_put; the torch_npu operators skip the row."""
    rope = "interleave_rope" if cache in NPU_WRITES else "slices"
    model, args = model_of(PLAIN.but(cache=cache, rope=rope), torch.float32, Dims())
    slots = args[3]
    slots.view(-1)[1::2] -= model.dims.pages * model.dims.page
    before = [a.clone() for a in args]
    outcome = judged(model, args, dialect=dialect)
    assert outcome.fused == {V3: 1}, outcome.report.refused
    for have, want, old in zip(outcome.result[2:], outcome.expected[2:], before[4:], strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
        rows = model.dims.S if cache.startswith("static") else model.dims.T
        batches = model.dims.B if cache.startswith("static") else 1
        kept = rows - rows // 2 if not cache.endswith("_put") else rows
        if cache != "npu_nz":
            assert int((have != old).any(-1).sum()) == kept * batches


class Decoder(torch.nn.Module):
    """One layer over the prolog: attention to the latent, and the next token's logits."""

    def __init__(self, spelling: Spelling, dims: Dims, vocabulary: int = 40) -> None:
        super().__init__()
        self.prolog = Prolog(spelling, dims, torch.float32)
        generator = torch.Generator().manual_seed(3)
        self.embedding = torch.nn.Parameter(torch.randn(vocabulary, dims.He, generator=generator))
        self.w_uv = torch.nn.Parameter(torch.randn(dims.N, dims.Hckv, dims.Dv, generator=generator))
        self.w_o = torch.nn.Parameter(torch.randn(dims.N * dims.Dv, dims.He, generator=generator))

    def forward(
        self, token: Tensor, position: Tensor, table: Tensor, kv_cache: Tensor, kr_cache: Tensor
    ) -> Tensor:
        """``token`` [B]; ``table`` [B, pages of a sequence]."""
        d = self.prolog.dims
        x = self.embedding[token].unsqueeze(1)
        frequencies = position * 100.0 ** -(torch.arange(d.Dr // 2) / (d.Dr // 2))
        angles = torch.cat((frequencies, frequencies)).expand(d.B, 1, d.Dr)
        page = table.index_select(1, (position // d.page).view(1))
        slots = page * d.page + position % d.page
        query, turned, latent, key = self.prolog(x, angles.cos(), angles.sin(), slots, kv_cache, kr_cache)
        latent, key = (c[table].flatten(1, 3) for c in (latent, key))
        scores = torch.einsum("bsnc,blc->bnl", query, latent) + torch.einsum("bsnr,blr->bnl", turned, key)
        seen = torch.arange(latent.shape[1]) <= position
        weights = (scores * (d.D + d.Dr) ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        heads = torch.einsum("bnl,blc,ncv->bnv", weights, latent, self.w_uv)
        return (x[:, 0] + heads.flatten(1) @ self.w_o) @ self.embedding.T


def decoded(step: Any, dims: Dims, count: int) -> tuple[list[list[int]], Tensor, Tensor]:
    """Greedy tokens, and the caches afterwards."""
    pages = torch.arange(dims.pages).flip(0).view(dims.B, -1)
    caches = [torch.zeros(dims.pages, dims.page, 1, width) for width in (dims.Hckv, dims.Dr)]
    token = torch.arange(dims.B)
    found = []
    with torch.no_grad():
        for position in range(count):
            token = step(token, torch.tensor(position), pages, *caches).argmax(-1)
            found.append(token.tolist())
    return found, caches[0], caches[1]


@pytest.mark.parametrize("host", ["eager", "inductor"])
@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_on_paged_caches(batch: int, host: str) -> None:
    torch._dynamo.reset()
    dims = Dims(B=batch, S=1, page=16, pages=2 * batch)
    model = Decoder(PLAIN, dims)
    backend = get_npu_backend(host=host, fusion_config={"expect": {V3: 1}})
    tokens, kv, kr = decoded(torch.compile(model, backend=backend, fullgraph=True), dims, 32)
    want, *caches = decoded(model, dims, 32)
    assert len(backend.reports) == 1
    assert tokens == want and len({tuple(t) for t in tokens}) > 4
    assert not (kv == 0).all(-1).any()
    for have, right in zip((kv, kr), caches, strict=True):
        torch.testing.assert_close(have, right, rtol=1e-4, atol=1e-4)
