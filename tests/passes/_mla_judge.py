"""What the tests of mla_prolog judge by: a float64 oracle, the operators that may be left, refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes._harness import Outcome, fuse_only
from tests.passes._mla import NORMS, NPU_WRITES, ROPES, UKS, WRITES, Dims, Prolog, Spelling, inputs

NAME = "mla_prolog"
V3 = "npu_mla_prolog_v3_functional"

PAIRED = ("complex", "pairs")
"""Rotations whose pairs stay side by side."""

LEFT = {
    f"npu.{V3}",
    *(f"aten.{op}" for op in ("add", "arange", "cat", "copy_", "expand", "mul", "permute", "remainder")),
    *(f"aten.{op}" for op in ("reshape", "select", "slice", "sym_size", "t", "unsqueeze", "view")),
    *(f"aten.{op}" for op in ("_to_copy", "clone", "complex", "slice_scatter", "view_as_real")),
    *(f"prims.{op}" for op in ("iota", "convert_element_type")),
}
"""Angles, slots (a product if the cache has batches) and views of caches; nothing that computes queries or
keys."""


def separately(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` for :func:`fuse`, which runs it in eager mode first: that writes copies of the caches, so that
    they do not hide what the compiled graph does or does not write."""

    def run(*args: Tensor) -> Any:
        if not torch.compiler.is_compiling():
            args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        return fn(*args)

    return run


def options(spelling: Spelling) -> dict[str, Any]:
    """What a config must allow for the spelling to fuse."""
    return {"numerics": "relaxed", "cache_layout": "npu"} if spelling.rope in PAIRED else {}


def judged(fn: Callable[..., Any], args: Sequence[Tensor], **given: Any) -> Outcome:
    return fuse_only(NAME, separately(fn), args, **given)


def refused(
    fn: Callable[..., Any], args: Sequence[Tensor], reason: str, detail: str = "", **given: Any
) -> Outcome:
    """Not fused, for this reason alone; the results and what is written are eager's to the bit."""
    eager = [a.clone() for a in args]
    fn(*eager)
    outcome = judged(fn, args, **given)
    assert outcome.fused == {}, outcome.code
    said = {(r.reason, r.detail) for r in outcome.report.refused if r.fusion == NAME}
    assert {r for r, _ in said} == {reason}, said
    assert any(d.startswith(detail) for _, d in said), said
    for have, want in zip((*outcome.result, *args), (*outcome.expected, *eager), strict=True):
        assert have.dtype == want.dtype
        assert torch.equal(have, want)
    return outcome


def sorted_pairs(x: Tensor) -> Tensor:
    """Even elements, then odd ones: from the order of a model that keeps pairs to the operator's."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), -1)


def from_nz(cache: Tensor) -> Tensor:
    """The rows of a cache in NZ order."""
    pages, block, _, width = cache.shape
    group = 32 // cache.dtype.itemsize
    return cache.view(pages, width // group, block, group).transpose(1, 2).reshape(cache.shape)


def _normalized(x: Tensor, gamma: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gamma.double()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    even, odd, c, s = x[..., 0::2], x[..., 1::2], cos[..., :half], sin[..., :half]
    return torch.cat((even * c - odd * s, odd * c + even * s), -1)


def oracle(
    model: Prolog, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, *caches: Tensor
) -> tuple[Tensor, ...]:
    """Query, rotated query and both caches in float64, in the operator's order; NZ caches as rows."""
    d, how = model.dims, model.spelling.cache
    B, S = cos.shape[:2]
    x, cos, sin = x.double().view(B, S, d.He), cos.double(), sin.double()
    q = _normalized(x @ model.w_dq.double().T, model.g_cq) @ model.w_uq.double().T
    nope, turning = q.view(B, S, d.N, d.D + d.Dr).split((d.D, d.Dr), -1)
    latent, key = (x @ model.w_dkv.double().T).split((d.Hckv, d.Dr), -1)
    rows = _normalized(latent, model.g_ckv), _rotated(key, cos, sin)
    kept = []
    write = WRITES["paged_put" if how in (*NPU_WRITES, "scatter_nd") else how]
    for cache, new in zip(caches, rows, strict=True):
        kept.append((from_nz(cache) if how == "npu_nz" else cache).double())
        write(kept[-1], new, slots)
    turned = _rotated(turning, cos.unsqueeze(2), sin.unsqueeze(2))
    return torch.einsum("bsnd,ndc->bsnc", nope, model.w_uk.double()), turned, *kept


class Steps(Prolog):
    """The plain spelling with every step a method, see :func:`altered`."""

    def down_query(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w_dq)

    def down_latent(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w_dkv)

    def norm_query(self, cq: Tensor) -> Tensor:
        return NORMS["hf"](cq, self.g_cq, 1e-6)

    def norm_latent(self, latent: Tensor) -> Tensor:
        return NORMS["hf"](latent, self.g_ckv, 1e-6)

    def up(self, cq: Tensor) -> Tensor:
        return F.linear(cq, self.w_uq)

    def scaled(self, q: Tensor) -> Tensor:
        return q

    def heads(self, nope: Tensor) -> Tensor:
        return UKS["einsum"](nope, self.w_uk)

    def turn_query(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ROPES["slices"](q, cos, sin)

    def turn_key(self, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ROPES["slices"](k, cos, sin)

    def write(self, kv_cache: Tensor, kr_cache: Tensor, kv: Tensor, kr: Tensor, slots: Tensor) -> None:
        write = WRITES[self.spelling.cache]
        write(kv_cache, kv, slots)
        write(kr_cache, kr, slots)

    def results(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Out of query, rotated query, both caches after the write, normed query, written rows."""
        return values[:4]

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, kv_cache: Tensor, kr_cache: Tensor
    ) -> tuple[Tensor, ...]:
        d = self.dims
        normed = self.norm_query(self.down_query(x))
        q = self.up(normed).view(*x.shape[:2], d.N, d.D + d.Dr)
        nope, turning = self.scaled(q).split((d.D, d.Dr), -1)
        query = self.heads(nope)
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        turned = self.turn_query(turning, cos, sin)
        latent, key = self.down_latent(x).split((d.Hckv, d.Dr), -1)
        latent = self.norm_latent(latent)
        key = self.turn_key(key.unsqueeze(2), cos, sin).squeeze(2)
        self.write(kv_cache, kr_cache, latent, key, slots)
        return self.results(query, turned, kv_cache + 0, kr_cache + 0, normed, latent, key)


def altered(
    spelling: Spelling | None = None,
    dims: Dims | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **steps: Callable[..., Any],
) -> tuple[Prolog, list[Tensor]]:
    """:class:`Steps` with some of them replaced, and arguments for it."""
    model = type("Altered", (Steps,), steps)(spelling or Spelling(), dims, dtype)
    return model, inputs(model, dtype)
