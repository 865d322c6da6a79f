"""The key side of multi-head latent attention, fused alone: with eager's numbers, and near misses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from tests.passes._harness import DIALECTS, Outcome, fuse, fuse_only
from tests.passes._mla import NORMS, NPU_WRITES, ROPES, WRITES, Dims, Prolog, Spelling, inputs
from tests.passes._mla_judge import oracle, separately

NAME = "kv_rmsnorm_rope_cache"
OPERATOR = "npu_kv_rmsnorm_rope_cache_v2_functional"
BY_SEQUENCE = ("static_copy", "static_put")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COMPUTED = ("aten.rsqrt", "aten.mean", "aten.pow", "aten.index_put", "aten.index_copy", "aten.neg")

PLAIN = Spelling()
SPELLINGS = [
    PLAIN,
    *(PLAIN.but(norm=norm) for norm in NORMS if norm != PLAIN.norm),
    *(PLAIN.but(down=down) for down in ("merged", "matmul")),
    *(PLAIN.but(rope=rope) for rope in ("transposed", "interleave_rope")),
    *(PLAIN.but(cache=cache) for cache in WRITES if cache != PLAIN.cache),
    PLAIN.but(tokens=2),
]


class Keys(Prolog):
    """The key side; a query without a low rank, of which nothing is fused."""

    bias: Tensor | None = None
    key_angles = 1.0
    scale = 1.0
    offset = False

    def rows(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized latent and rotated key [B, S, ..]."""
        d, s = self.dims, self.spelling
        _, kv = self.down(x)
        if self.bias is not None:
            kv = F.linear(x, self.w_dkv, self.bias)
        latent, key = kv.view(*cos.shape[:2], d.Hckv + d.Dr).split((d.Hckv, d.Dr), -1)
        gamma = self.g_ckv + 1 if self.offset else self.g_ckv
        rotated = ROPES[s.rope](key.unsqueeze(2), cos.unsqueeze(2), sin.unsqueeze(2)).squeeze(2)
        return NORMS[s.norm](latent, gamma, 1e-6), rotated

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, kv_cache: Tensor, kr_cache: Tensor
    ) -> tuple[Tensor, ...]:
        latent, rotated = self.rows(x, cos, sin)
        latent = latent * self.scale if self.scale != 1 else latent
        WRITES[self.spelling.cache](kv_cache, latent, slots)
        WRITES[self.spelling.cache](kr_cache, rotated, slots)
        return kv_cache + 0, kr_cache + 0


def named(value: Any) -> str | None:
    return "-".join(str(v) for v in vars(value).values()) if isinstance(value, Spelling) else None


def as_close_as_eager(results: Sequence[Tensor], outcome: Outcome, exact: Sequence[Tensor]) -> None:
    """Both caches, rows that are not written included (those are the same in all three)."""
    for fused, eager, true in zip(results, outcome.expected[:2], exact, strict=True):
        assert fused.dtype == eager.dtype
        errors = [(t.double() - true).abs() for t in (fused, eager)]
        assert errors[0].mean() <= errors[1].mean() * 1.05 + 1e-8
        assert torch.equal((errors[0] == 0).all(-1), (errors[1] == 0).all(-1))


def made(outcome: Outcome) -> str:
    """The one call, and nothing of what it replaces left."""
    assert outcome.fused == {OPERATOR: 1}, outcome.reasons(NAME)
    assert outcome.report.fusions[0].level == "accurate"
    after = outcome.report.operators_after
    assert after[f"npu.{OPERATOR}"] == 1
    assert not set(COMPUTED) & set(after), after
    assert not any(name.startswith(("npu.npu_scatter", "npu.npu_rms", "npu.npu_int")) for name in after)
    return outcome.code


@pytest.mark.by_turns("dialect", "dynamic")
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_it_fuses_and_is_as_close_as_eager(spelling: Spelling, dynamic: bool, dialect: str) -> None:
    model = Keys(spelling)
    args = inputs(model)
    before = [a.clone() for a in args]
    outcome = fuse_only(NAME, separately(model), args, dynamic=dynamic, dialect=dialect)
    code = made(outcome)
    assert ("cache_mode" not in code) == (spelling.cache in BY_SEQUENCE)  # 'Norm' is the default
    as_close_as_eager(outcome.result, outcome, oracle(model, *before)[2:])
    for have, want in zip(args[4:], outcome.result, strict=True):
        assert torch.equal(have, want)  # the caches that came in are written


@pytest.mark.parametrize("cache", WRITES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_dtype(dtype: torch.dtype, cache: str) -> None:
    model = Keys(PLAIN.but(cache=cache, norm="functional"), dtype=dtype)
    args = inputs(model, dtype)
    before = [a.clone() for a in args]
    outcome = fuse_only(NAME, separately(model), args)
    made(outcome)
    as_close_as_eager(outcome.result, outcome, oracle(model, *before)[2:])


class Sliced(Keys):
    """Latent and key are columns of one product with the query, and nothing holds the two alone."""

    def rows(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        d, s = self.dims, self.spelling
        product = F.linear(x, self.merged).view(*cos.shape[:2], -1)
        latent, key = product[..., d.Hcq : d.Hcq + d.Hckv], product[..., d.Hcq + d.Hckv :]
        rotated = ROPES[s.rope](key.unsqueeze(2), cos.unsqueeze(2), sin.unsqueeze(2)).squeeze(2)
        return NORMS[s.norm](latent, self.g_ckv, 1e-6), rotated


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_range_of_the_columns_of_a_product(dynamic: bool, dialect: str) -> None:
    model = Sliced(PLAIN)
    args = inputs(model)
    before = [a.clone() for a in args]
    outcome = fuse_only(NAME, separately(model), args, dynamic=dynamic, dialect=dialect)
    made(outcome)
    as_close_as_eager(outcome.result, outcome, oracle(model, *before)[2:])


@pytest.mark.parametrize("rope", ["complex", "pairs"])
def test_pairs_side_by_side(rope: str) -> None:
    """Whoever reads the cache is not rewritten; with another order in other graphs that is an error."""
    model = Keys(PLAIN.but(rope=rope))
    kept = fuse_only(NAME, separately(model), inputs(model))
    assert kept.reasons(NAME) == [
        "rotated pairs are stored side by side, the operator stores halves: "
        "mla_prolog with cache_layout='npu' may use another order in the cache"
    ]
    assert all(map(torch.equal, kept.expected, kept.result))
    with pytest.raises(BackendCompilerFailed, match="would write rotated pairs to a cache"):
        fuse_only(
            NAME, separately(model), inputs(model), numerics="relaxed", cache_layout="npu", strict=False
        )


class Read(Keys):
    """The fresh rows are read, too: the latent by an expansion, the key by all heads."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, kv_cache: Tensor, kr_cache: Tensor
    ) -> tuple[Tensor, ...]:
        latent, rotated = self.rows(x, cos, sin)
        WRITES[self.spelling.cache](kv_cache, latent, slots)
        WRITES[self.spelling.cache](kr_cache, rotated, slots)
        expanded = F.linear(latent, self.w_kvb)
        heads = rotated.unsqueeze(1).expand(-1, self.dims.N, -1, -1) * 2
        return kv_cache + 0, kr_cache + 0, expanded, heads, latent.transpose(0, 1).contiguous()


@pytest.mark.by_turns("dialect", "dynamic")
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("cache", ["paged_put", "static_copy", "static_slice"])
def test_rows_that_are_read_elsewhere_are_returned(cache: str, dynamic: bool, dialect: str) -> None:
    model = Read(PLAIN.but(cache=cache))
    args = inputs(model)
    before = [a.clone() for a in args]
    outcome = fuse_only(NAME, separately(model), args, dynamic=dynamic, dialect=dialect)
    code = made(outcome)
    assert "'PA'" in code and "is_output_kv = True" in code
    as_close_as_eager(outcome.result[:2], outcome, oracle(model, *before)[2:])
    for have, want in zip(outcome.result[2:], outcome.expected[2:], strict=True):
        assert have.shape == want.shape
        torch.testing.assert_close(have, want, rtol=2e-2, atol=4e-2)


class OtherAngles(Prolog):
    """The whole prolog, with the query turned by other angles than the key, or a bias for the key."""

    def __init__(self, bias: bool) -> None:
        super().__init__(PLAIN)
        self.keys = Keys(PLAIN)
        self.keys.w_dkv = self.w_dkv
        self.bias = bias
        if bias:
            self.keys.bias = torch.linspace(-1, 1, self.dims.Hckv + self.dims.Dr).bfloat16()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        d, (B, S) = self.dims, cos.shape[:2]
        cq = NORMS["hf"](F.linear(x, self.w_dq), self.g_cq, 1e-6)
        nope, turning = F.linear(cq, self.w_uq).view(B, S, d.N, d.D + d.Dr).split((d.D, d.Dr), -1)
        angles = (cos, sin) if self.bias else (sin, cos)
        turned = ROPES["slices"](turning, *(t.unsqueeze(2) for t in angles))
        return (
            torch.einsum("bsnd,ndc->bsnc", nope, self.w_uk),
            turned,
            *self.keys(x, cos, sin, slots, *caches),
        )


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("bias", "reason"),
    [(True, "a projection has a bias"), (False, "query and key are rotated by different angles")],
)
def test_what_the_prolog_refuses_for_its_query_is_fused_for_the_key(
    bias: bool, reason: str, dialect: str
) -> None:
    model = OtherAngles(bias)
    only = {"rms_norm": False, "interleave_rope": False, "rotary_mul": False}
    outcome = fuse(separately(model), inputs(model), dialect=dialect, **only)
    assert outcome.fused == {OPERATOR: 1}
    assert outcome.report.operators_after[f"npu.{OPERATOR}"] == 1
    assert outcome.reasons("mla_prolog") == [f"{reason}: "]
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        torch.testing.assert_close(have, want, rtol=2e-2, atol=4e-2)


def test_the_report_has_the_refusal_of_the_prolog_and_the_part_that_is_fused() -> None:
    model = Keys(PLAIN)
    model.w_q = torch.nn.Parameter(torch.randn(model.dims.N * 16, model.dims.He).bfloat16())

    def without_low_rank(x: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        B, S = cos.shape[:2]
        q = F.linear(x, model.w_q).view(B, S, -1, 16)
        query = ROPES["slices"](q, cos.unsqueeze(2), sin.unsqueeze(2))
        return query, *model(x, cos, sin, *rest)

    outcome = fuse(separately(without_low_rank), inputs(model), rotary_mul=False, interleave_rope=False)
    assert outcome.fused == {OPERATOR: 1}
    assert outcome.reasons("mla_prolog") == [
        "the query has no low-rank projection of the same hidden states: "
    ]
    torch.testing.assert_close(outcome.result[0], outcome.expected[0], rtol=0, atol=0)
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        torch.testing.assert_close(have, want, rtol=2e-2, atol=2e-2)


def test_a_whole_prolog_is_left_to_mla_prolog() -> None:
    model = Prolog(PLAIN)
    outcome = fuse(separately(model), inputs(model))
    assert outcome.fused == {"npu_mla_prolog_v3_functional": 1}
    assert outcome.reasons(NAME) == []


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("cache", NPU_WRITES)
def test_a_model_that_calls_the_operator_is_left_alone(cache: str, dialect: str) -> None:
    model = Prolog(PLAIN.but(cache=cache, rope="interleave_rope"))
    outcome = fuse_only(NAME, separately(model), inputs(model), dialect=dialect)
    assert outcome.fused == {} and outcome.reasons(NAME) == []
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        assert torch.equal(have, want)


def test_a_call_that_returns_the_rows_is_left_alone() -> None:
    model = Prolog(PLAIN)
    d = model.dims

    def calls(x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, kv: Tensor, kr: Tensor) -> Any:
        rows = F.linear(x, model.w_dkv).view(d.T, 1, 1, -1)
        angles = [t.view(d.T, 1, 1, -1) for t in (cos, sin)]
        return getattr(torch.ops.npu, OPERATOR)(
            rows, model.g_ckv, *angles, slots.view(-1), kr, kv, cache_mode="PA", is_output_kv=True
        )

    outcome = fuse_only(NAME, separately(calls), inputs(model))
    assert outcome.fused == {} and outcome.reasons(NAME) == []
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        assert torch.equal(have, want)


def refused(fn: Callable[..., Any], args: list[Tensor], reason: str, **options: Any) -> None:
    """Not fused, for this reason alone; results and caches are eager's to the bit."""
    eager = [a.clone() for a in args]
    fn(*eager)
    outcome = fuse_only(NAME, separately(fn), args, **options)
    assert outcome.fused == {}
    assert {text.startswith(reason) for text in outcome.reasons(NAME)} == {True}, outcome.reasons(NAME)
    for have, want in zip((*outcome.result, *args), (*outcome.expected, *eager), strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0)


def changed(**attributes: Any) -> Keys:
    model = Keys(attributes.pop("spelling", PLAIN))
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


class Elsewhere(Keys):
    """The key goes to other rows than the latent."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        latent, rotated = self.rows(x, cos, sin)
        WRITES["paged_put"](caches[0], latent, slots)
        WRITES["paged_put"](caches[1], rotated, slots.flip(0))
        return caches[0] + 0, caches[1] + 0


class Grown(Keys):
    """The latent is appended to a cache; what is cached of the key is beside the point."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        latent, rotated = self.rows(x, cos, sin)
        WRITES["paged_put"](caches[1], rotated, slots)
        return torch.cat(
            (caches[0].view(1, -1, self.dims.Hckv), latent.view(1, -1, self.dims.Hckv)), 1
        ), caches[1] + 0


class ReadBefore(Keys):
    """Reads the old cache after the new rows are written."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        latent, rotated = self.rows(x, cos, sin)
        width = self.dims.Hckv
        new = caches[0].view(-1, width).index_copy(0, slots.view(-1), latent.view(-1, width))
        turned = (
            caches[1].view(-1, self.dims.Dr).index_copy(0, slots.view(-1), rotated.view(-1, self.dims.Dr))
        )
        return new, turned, caches[0] * new.sum()


class Unwritten(Keys):
    """Only the latent is cached."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        latent, rotated = self.rows(x, cos, sin)
        WRITES["paged_put"](caches[0], latent, slots)
        return caches[0] + 0, rotated


MISSES = [
    (changed(spelling=PLAIN.but(rope="halves")), "halves are rotated, the operator rotates adjacent pairs"),
    (changed(offset=True), "the weight of a norm has an offset (1 + w)"),
    (changed(scale=0.5), "the latent or the rotated key is scaled: latent by 0.5"),
    (Elsewhere(PLAIN), "the two caches are written at different places"),
    (Grown(PLAIN), "the cache grows: it is put together with cat"),
    (ReadBefore(PLAIN), "the old cache is read after the write"),
    (Unwritten(PLAIN), "the rotated key is not written to a cache of its own"),
]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("model", "reason"), MISSES, ids=[reason for _, reason in MISSES])
def test_near_misses(model: Keys, reason: str, dialect: str) -> None:
    refused(model, inputs(model), reason, dialect=dialect)


def test_a_cache_of_another_type_is_refused() -> None:
    model = Keys(PLAIN)
    model.g_ckv = torch.nn.Parameter(model.g_ckv.float(), requires_grad=False)
    model.spelling = PLAIN.but(norm="once")
    refused(model, inputs(model), "the operator takes one type throughout: float32, the cache bfloat16")


def test_strict_numerics_leave_it_alone() -> None:
    model = Keys(PLAIN)
    refused(model, inputs(model), "numerics='strict' does not allow the difference", numerics="strict")


def test_the_envelope_of_a_target() -> None:
    model = Keys(PLAIN)
    reason = "a size is outside of what the operator takes on the target: Dv is 32, Dr 16"
    refused(model, inputs(model), reason, target="ascend910b")
    wide = Keys(PLAIN.but(norm="functional"), dtype=torch.float32)
    reason = "the operator does not take caches of this type: float32"
    refused(wide, inputs(wide, torch.float32), reason, target="ascend910b")
    device = Keys(PLAIN, Dims(Hckv=512, Dr=64))
    made(fuse_only(NAME, separately(device), inputs(device), target="ascend910b"))


def test_a_negative_slot_counts_from_the_end_as_in_eager_mode() -> None:
    """The operator alone would skip such a row."""
    model = Keys(PLAIN)
    args = inputs(model)
    args[3] = args[3] - model.dims.pages * model.dims.page
    outcome = fuse_only(NAME, separately(model), args)
    made(outcome)
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        torch.testing.assert_close(have, want, rtol=2e-2, atol=2e-2)
