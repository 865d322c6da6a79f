"""Graphs that differ from the operator in one detail: fused or not, the result is eager's.

Each was once taken for the operator, or made the pass fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from npu_fusion.passes.compose._mla_sites import sites
from npu_fusion.passes.pattern import Context
from tests.passes._harness import DIALECTS, Outcome
from tests.passes._mla import NORMS, ROPES, UKS, Dims, Prolog, QuantizedProlog, Spelling, inputs
from tests.passes._mla_judge import V3, altered, judged

SQUARE = Dims(B=3, S=3)
STATIC = Spelling(cache="static_put")
Step = Callable[..., Any]


def results(read: Callable[..., tuple[Tensor, ...]]) -> dict[str, Step]:
    """Other readers of query, rotated query and normed query."""
    return {"results": lambda self, q, t, kv, kr, normed, *_: (*read(q, t, normed), kv, kr)}


def rotated_after(change: Callable[[Tensor], Tensor], how: str = "slices") -> dict[str, Step]:
    def turn(self: Prolog, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ROPES[how](change(x), cos, sin)

    return {"turn_query": turn, "turn_key": turn}


def with_angles(change: Callable[[Tensor], Tensor], *, query: bool = True) -> dict[str, Step]:
    def turn(self: Prolog, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ROPES["slices"](x, change(cos), change(sin))

    return {"turn_key": turn} | ({"turn_query": turn} if query else {})


def grouped(x: Tensor, groups: int, dim: int = -1) -> Tensor:
    """The entries of a dimension in another order."""
    dim %= x.dim()
    size = x.shape[dim]
    return x.unflatten(dim, (groups, size // groups)).transpose(dim, dim + 1).reshape(x.shape)


def at_positions(begin: int, end: int) -> dict[str, Step]:
    def write(self: Prolog, kv_cache: Tensor, kr_cache: Tensor, kv: Tensor, kr: Tensor, _: Tensor) -> None:
        positions = torch.arange(begin, end)
        kv_cache[:, :, positions] = kv.unsqueeze(1)
        kr_cache[:, :, positions] = kr.unsqueeze(1)

    return {"write": write}


def rows_permuted(
    self: Prolog, kv_cache: Tensor, kr_cache: Tensor, kv: Tensor, kr: Tensor, slots: Tensor
) -> None:
    for cache, rows in ((kv_cache, kv), (kr_cache, kr)):
        cache.view(-1, cache.shape[-1])[slots.view(-1)] = rows.transpose(0, 1).flatten(0, 1)


def _scaled(self: Prolog, q: Tensor) -> Tensor:
    return q * 2.5


def tokens_permuted(self: Prolog, x: Tensor) -> Tensor:
    return F.linear(x.transpose(0, 1).contiguous(), self.w_dq)


CASES: dict[str, tuple[Dims, Spelling, dict[str, Step], bool | None]] = {
    "columns of the query": (
        Dims(), Spelling(), results(lambda q, t, n: (grouped(q, 2) * 1, t)), None),
    "columns of the rotated query": (
        Dims(), Spelling(), results(lambda q, t, n: (q, grouped(t, 2) * 1)), None),
    "heads in groups": (
        Dims(), Spelling(), results(lambda q, t, n: (grouped(q, 2, 2) * 1, grouped(t, 2, 2) * 1)), None),
    "heads and columns": (
        Dims(), Spelling(), results(lambda q, t, n: (q.transpose(2, 3) * 1, t.transpose(1, 3) * 1)), True),
    "columns of the normed query": (
        Dims(), Spelling(), results(lambda q, t, n: (q, t, grouped(n, 4) * 1)), None),
    "normed query transposed": (
        Dims(), Spelling(), results(lambda q, t, n: (q, t, n.transpose(0, 1) * 1)), True),
    "normed query of a scaled one": (
        Dims(), Spelling(), {"scaled": _scaled, **results(lambda q, t, n: (q, t, n * 1))}, False),
    "sorted twice": (
        Dims(), Spelling(), rotated_after(lambda x: grouped(x, x.shape[-1] // 2)), False),
    "sorted before the operator": (
        Dims(), Spelling(), rotated_after(lambda x: grouped(x, x.shape[-1] // 2), "interleave_rope"), False),
    "sorted otherwise": (
        Dims(), Spelling(), rotated_after(lambda x: grouped(x, 4)), False),
    "angles per sequence": (
        SQUARE, Spelling(), with_angles(lambda c: c[:, :1]), False),
    "angles shared by sequences": (
        SQUARE, Spelling(), with_angles(lambda c: c[:1]), True),
    "angles transposed": (
        SQUARE, Spelling(), with_angles(lambda c: c.transpose(0, 1)), None),
    "angles of the key transposed": (
        SQUARE, Spelling(), with_angles(lambda c: c.transpose(0, 1), query=False), False),
    "positions from below 0": (
        Dims(), STATIC, at_positions(-3, 0), None),
    "positions across 0": (
        Dims(), STATIC, at_positions(-1, 2), None),
    "positions from 0": (
        Dims(), STATIC, at_positions(0, 3), True),
    "rows permuted": (
        SQUARE, Spelling(), {"write": rows_permuted}, False),
    "query of permuted tokens": (
        SQUARE, Spelling(), {"down_query": tokens_permuted}, False),
}  # fmt: skip


def same_as_eager(outcome: Outcome, args: list[Tensor], fused: bool | None) -> None:
    if fused is not None:
        assert outcome.fused == ({V3: 1} if fused else {}), outcome.report.refused
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", CASES)
def test_one_detail_differs(case: str, dialect: str) -> None:
    dims, spelling, steps, fused = CASES[case]
    model, args = altered(spelling, dims, torch.float32, **steps)
    same_as_eager(judged(model, args, dialect=dialect), args, fused)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("position", [-7, 5])
def test_a_slice_at_a_symbolic_position(position: int, dialect: str) -> None:
    """Negative positions count from the end."""

    def write(self: Prolog, kv_cache: Tensor, kr_cache: Tensor, kv: Tensor, kr: Tensor, at: Any) -> None:
        kv_cache[:2, at : at + 3] = kv
        kr_cache[:2, at : at + 3] = kr

    model, args = altered(Spelling(cache="static_slice"), None, torch.float32, write=write)
    same_as_eager(judged(model, [*args[:3], position, *args[4:]], dynamic=True, dialect=dialect), args, None)


@pytest.mark.parametrize("cache", ["paged_put", "static_put"])
def test_a_single_token(cache: str) -> None:
    """Its row comes to index_put without the first dimension."""
    model = Prolog(Spelling(cache=cache), Dims(B=1, S=1), torch.float32)
    args = inputs(model, torch.float32)
    same_as_eager(judged(model, args), args, True)


class _OtherScale(QuantizedProlog):
    """The scales of the tokens come to the up projection in another order."""

    def project(self, x: Tensor, scale: Tensor, which: int) -> Tensor:
        if which == 2:
            scale = scale.view(self.dims.B, self.dims.S).t().reshape(-1)
        return super().project(x, scale, which)


@pytest.mark.parametrize("how", ["npu", "plain", "npu partial"])
def test_scales_of_other_tokens(how: str) -> None:
    model = _OtherScale(how, Dims(B=6, S=6))
    args = inputs(model)
    outcome = judged(model, args)
    assert outcome.fused == {}
    assert [r.reason for r in outcome.report.refused] == [
        "a quantized projection is scaled by another token's scale"
    ]
    assert all(map(torch.equal, outcome.result, outcome.expected))


@pytest.mark.parametrize(
    "spelling", [Spelling(uk="matmul"), Spelling(rope="interleave_rope", cache="npu"), Spelling()], ids=str
)
def test_verify(spelling: Spelling) -> None:
    """Views of one input agree, and indices stay inside of the cache."""
    model = Prolog(spelling)
    assert judged(model, inputs(model), verify=True).fused == {V3: 1}


def test_nothing_is_looked_for_without_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watched(context: Context) -> Any:
        found = sites(context)
        seen.append(len(found.norms))
        return found

    monkeypatch.setattr("npu_fusion.passes.compose.mla_prolog.sites", watched)
    gamma = torch.ones(32)
    judged(lambda x: NORMS["once"](x @ x.T, gamma, 1e-6), [torch.randn(32, 32)])
    assert seen and not any(seen)


def test_the_query_of_one_head() -> None:
    """Nothing tells the axis of the heads but its place."""
    model, args = altered(None, Dims(N=1), torch.float32, heads=lambda self, q: UKS["matmul"](q, self.w_uk))
    same_as_eager(judged(model, args), args, True)
