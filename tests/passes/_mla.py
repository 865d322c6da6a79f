"""The query, key and cache part of multi-head latent attention in the spellings of real models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

npu = torch.ops.npu


@dataclass(frozen=True)
class Dims:
    B: int = 2
    S: int = 3
    He: int = 48
    Hcq: int = 32
    N: int = 4
    D: int = 16
    Dr: int = 16
    Hckv: int = 32
    Dv: int = 12
    pages: int = 4
    page: int = 16

    @property
    def T(self) -> int:
        return self.B * self.S


@dataclass(frozen=True)
class Spelling:
    """One way of writing it: the keys of the tables below."""

    norm: str = "hf"
    down: str = "linear"
    up: str = "linear"
    uk: str = "einsum"
    rope: str = "slices"
    cache: str = "paged_put"
    tokens: int = 3
    """Rank of the hidden states."""

    def but(self, **changes: Any) -> Spelling:
        return replace(self, **changes)


def _hf(x: Tensor, g: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return g * wide.to(x.dtype)


def _once(x: Tensor, g: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * g.float()).to(x.dtype)


def _divided(x: Tensor, g: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps) * g).to(x.dtype)


NORMS: dict[str, Callable[..., Tensor]] = {
    "hf": _hf,
    "once": _once,
    "divided": _divided,
    "functional": lambda x, g, eps: F.rms_norm(x, (x.shape[-1],), g, eps),
    "npu": lambda x, g, eps: npu.npu_rms_norm(x, g, eps)[0],
}


def _slices(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    a, b, c, s = x[..., 0::2], x[..., 1::2], cos[..., :half], sin[..., :half]
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _transposed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    *lead, width = x.shape
    x = x.view(*lead, width // 2, 2).transpose(-1, -2).reshape(*lead, width)
    return x * cos + _rotate_half(x) * sin


def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + _rotate_half(x) * sin


def _complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turn = torch.complex(cos[..., :half].float(), sin[..., :half].float())
    pairs = torch.view_as_complex(x.float().unflatten(-1, (half, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def _pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    c, s = (t[..., :half].repeat_interleave(2, -1) for t in (cos, sin))
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return x * c + turned * s


def _interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    B, S, _, D = x.shape
    turned = npu.npu_interleave_rope(x.transpose(1, 2), cos.view(B, 1, S, D), sin.view(B, 1, S, D))
    return turned.transpose(1, 2)


ROPES: dict[str, Callable[..., Tensor]] = {
    "slices": _slices,
    "transposed": _transposed,
    "interleave_rope": _interleave_rope,
    "halves": _halves,
    "complex": _complex,
    "pairs": _pairs,
}
"""x [B, S, N, Dr], cos and sin [B, S, 1, Dr]."""


def _npu_bmm(q: Tensor, w: Tensor) -> Tensor:
    flat = q.flatten(0, 1)
    y = npu.npu_transpose_batchmatmul(flat, w, perm_x1=[1, 0, 2], perm_x2=[0, 1, 2], perm_y=[1, 0, 2])
    return y.view(*q.shape[:2], *y.shape[1:])


UKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum": lambda q, w: torch.einsum("bsnd,ndc->bsnc", q, w),
    "matmul": lambda q, w: torch.matmul(q.transpose(1, 2), w).transpose(1, 2),
    "bmm": lambda q, w: (
        torch.bmm(q.flatten(0, 1).transpose(0, 1), w).transpose(0, 1).unflatten(0, q.shape[:2])
    ),
    "npu": _npu_bmm,
}
"""q [B, S, N, D], w [N, D, Hckv] to [B, S, N, Hckv]."""


def _paged_put(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    cache.view(-1, cache.shape[-1])[slots.view(-1)] = rows.flatten(0, 1)


def _paged_copy(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    cache.view(-1, cache.shape[-1]).index_copy_(0, slots.view(-1), rows.flatten(0, 1))


def _scatter_nd(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    width = cache.shape[-1]
    npu.npu_scatter_nd_update_(cache.view(-1, 1, width), slots.view(-1, 1), rows.reshape(-1, 1, width))


def _static_copy(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    cache.index_copy_(2, slots, rows.unsqueeze(1))


def _static_put(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    cache[:, :, slots] = rows.unsqueeze(1)


def _static_slice(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    B, S, _ = rows.shape
    cache[:B, 5 : 5 + S] = rows


WRITES: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "paged_put": _paged_put,
    "paged_copy": _paged_copy,
    "scatter_nd": _scatter_nd,
    "static_copy": _static_copy,
    "static_put": _static_put,
    "static_slice": _static_slice,
}
"""cache, rows [B, S, width], slots."""

NPU_WRITES = ("npu", "npu_nz", "npu_v1", "npu_functional")
"""The caches are written by npu_kv_rmsnorm_rope_cache."""


def caches(dims: Dims, spelling: Spelling, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    if spelling.cache in ("static_copy", "static_put"):
        lead: tuple[int, ...] = (dims.B, 1, dims.pages * dims.page)
    elif spelling.cache == "static_slice":
        lead = (dims.B + 1, dims.pages * dims.page)
    else:
        lead = (dims.pages, dims.page, 1)
    return [torch.randn(*lead, w, generator=generator).to(dtype) for w in (dims.Hckv, dims.Dr)]


def slots(dims: Dims, spelling: Spelling, generator: torch.Generator) -> Tensor:
    if spelling.cache in ("static_copy", "static_put", "static_slice"):
        return torch.arange(7, 7 + dims.S)
    order = torch.randperm(dims.pages * dims.page, generator=generator)
    return order[: dims.T].view(dims.B, dims.S)


class Prolog(torch.nn.Module):
    """Hidden states to query, rotated query and the two caches, one spelling."""

    def __init__(
        self, spelling: Spelling, dims: Dims | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> None:
        super().__init__()
        self.spelling, self.dims = spelling, dims or Dims()
        d = self.dims
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> torch.nn.Parameter:
            values = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
            return torch.nn.Parameter(values.to(dtype), requires_grad=False)

        def gamma(size: int) -> torch.nn.Parameter:
            values = 1 + 0.1 * torch.randn(size, generator=generator)
            return torch.nn.Parameter(values.to(dtype), requires_grad=False)

        self.w_dq, self.w_dkv = weight(d.Hcq, d.He), weight(d.Hckv + d.Dr, d.He)
        self.w_uq = weight(d.N * (d.D + d.Dr), d.Hcq)
        self.w_kvb = weight(d.N * (d.D + d.Dv), d.Hckv)
        self.w_uk = torch.nn.Parameter(
            self.w_kvb.view(d.N, d.D + d.Dv, d.Hckv)[:, : d.D].contiguous(), requires_grad=False
        )
        self.g_cq, self.g_ckv = gamma(d.Hcq), gamma(d.Hckv)
        self.merged = torch.nn.Parameter(torch.cat((self.w_dq, self.w_dkv)), requires_grad=False)
        self.in_out = [
            torch.nn.Parameter(w.t().contiguous(), requires_grad=False)
            for w in (self.w_dq, self.w_dkv, self.w_uq)
        ]

    def down(self, x: Tensor) -> tuple[Tensor, Tensor]:
        d, how = self.dims, self.spelling.down
        if how == "merged":
            cq, kv = F.linear(x, self.merged).split((d.Hcq, d.Hckv + d.Dr), -1)
            return cq, kv
        if how == "matmul":
            return x @ self.in_out[0], x @ self.in_out[1]
        return F.linear(x, self.w_dq), F.linear(x, self.w_dkv)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, kv_cache: Tensor, kr_cache: Tensor
    ) -> tuple[Tensor, ...]:
        """x [B, S, He] (or [T, He]), cos and sin [B, S, Dr]; the caches are written in place."""
        d, s = self.dims, self.spelling
        B, S = cos.shape[:2]
        cq, kv = self.down(x)
        cq = NORMS[s.norm](cq, self.g_cq, 1e-6)
        q = cq @ self.in_out[2] if s.up == "matmul" else F.linear(cq, self.w_uq)
        q_nope, q_pe = q.view(B, S, d.N, d.D + d.Dr).split((d.D, d.Dr), -1)
        kv = kv.view(B, S, d.Hckv + d.Dr)
        uk = UKS["einsum" if s.uk == "sliced" else s.uk]
        w_uk = self.w_kvb.view(d.N, -1, d.Hckv)[:, : d.D] if s.uk == "sliced" else self.w_uk
        query = uk(q_nope, w_uk)
        rope = ROPES[s.rope]
        query_rope = rope(q_pe, cos.unsqueeze(2), sin.unsqueeze(2))
        if s.cache in NPU_WRITES:
            kv_cache, kr_cache = self.npu_write(kv, cos, sin, slots, kv_cache, kr_cache)
            return query, query_rope, kv_cache + 0, kr_cache + 0
        ckv, k_pe = kv.split((d.Hckv, d.Dr), -1)
        ckv = NORMS[s.norm](ckv, self.g_ckv, 1e-6)
        k_rope = rope(k_pe.unsqueeze(2), cos.unsqueeze(2), sin.unsqueeze(2)).squeeze(2)
        write = WRITES[s.cache]
        write(kv_cache, ckv, slots)
        write(kr_cache, k_rope, slots)
        return query, query_rope, kv_cache + 0, kr_cache + 0

    def npu_write(
        self, kv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, kv_cache: Tensor, kr_cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        d, how = self.dims, self.spelling.cache
        T, width = kv.shape[0] * kv.shape[1], d.Hckv + d.Dr
        kv, cos, sin = kv.view(T, 1, 1, width), cos.view(T, 1, 1, d.Dr), sin.view(T, 1, 1, d.Dr)
        mode = "PA_NZ" if how == "npu_nz" else "PA"
        given = (kv, self.g_ckv, cos, sin, slots.view(-1), kr_cache, kv_cache)
        if how == "npu_v1":
            kr, ckv, _, _ = npu.npu_kv_rmsnorm_rope_cache(*given, epsilon=1e-6, cache_mode=mode)
            return ckv, kr
        if how == "npu_functional":
            _, _, kr, ckv = npu.npu_kv_rmsnorm_rope_cache_v2_functional(*given, epsilon=1e-6, cache_mode=mode)
            return ckv, kr
        npu.npu_kv_rmsnorm_rope_cache_v2(*given, epsilon=1e-6, cache_mode=mode)
        return kv_cache, kr_cache


def inputs(model: Prolog, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> list[Tensor]:
    """Arguments of :meth:`Prolog.forward`."""
    d, s = model.dims, model.spelling
    generator = torch.Generator().manual_seed(seed)
    shape = (d.B, d.S, d.He) if s.tokens == 3 else (d.T, d.He)
    x = torch.randn(*shape, generator=generator).to(dtype)
    angles = torch.rand(d.B, d.S, d.Dr // 2, generator=generator) * 6.28
    angles = torch.cat((angles, angles), -1)
    written = caches(d, s, dtype, generator)
    return [x, angles.cos().to(dtype), angles.sin().to(dtype), slots(d, s, generator), *written]


class QuantizedProlog(Prolog):
    """The same with int8 projections, as torch_npu's operators or plain arithmetic. They read flat tokens."""

    def __init__(
        self,
        how: str,
        dims: Dims | None = None,
        dtype: torch.dtype = torch.bfloat16,
        cache: str = "paged_copy",
    ) -> None:
        super().__init__(Spelling(rope="transposed", cache=cache), dims, dtype)
        self.how = how
        self.int8 = [self.quantized(w) for w in (self.w_dq, self.w_dkv, self.w_uq)]
        self.smooth = torch.nn.Parameter(torch.rand(self.dims.Hcq) + 0.5, requires_grad=False)

    @staticmethod
    def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
        """int8 [in, out] and a scale for each column."""
        scale = weight.float().abs().amax(1) / 127
        values = (weight.float() / scale.unsqueeze(1)).round().to(torch.int8).t().contiguous()
        return values, scale

    def quantize(self, x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if "npu" in self.how:
            return npu.npu_dynamic_quant(x, smooth_scales=None if smooth is None else smooth.to(x.dtype))
        wide = x.float() if smooth is None else x.float() * smooth
        scale = wide.abs().amax(-1, keepdim=True) / 127
        return (wide / scale).round().clamp(-128, 127).to(torch.int8), scale.squeeze(-1)

    def project(self, x: Tensor, scale: Tensor, which: int) -> Tensor:
        weight, channels = self.int8[which]
        dtype = self.g_cq.dtype
        if "npu" in self.how:
            return npu.npu_quant_matmul(x, weight, channels, pertoken_scale=scale, output_dtype=dtype)
        return (torch._int_mm(x, weight).float() * channels * scale.unsqueeze(1)).to(dtype)

    def batches(self, kv: Tensor, B: int, S: int) -> Tensor:
        """[T, Hckv + Dr] as [B, S, Hckv + Dr]."""
        return kv.view(B, S, -1)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, kv_cache: Tensor, kr_cache: Tensor
    ) -> tuple[Tensor, ...]:
        d, (B, S) = self.dims, cos.shape[:2]
        x = x.view(B * S, d.He)
        if "partial" in self.how:
            cq, kv = F.linear(x, self.w_dq), F.linear(x, self.w_dkv)
        else:
            q8, token = self.quantize(x)
            cq, kv = self.project(q8, token, 0), self.project(q8, token, 1)
        cq = NORMS["once"](cq, self.g_cq, 1e-6)
        c8, token = self.quantize(cq, self.smooth if "smooth" in self.how else None)
        q = self.project(c8, token, 2)
        q_nope, q_pe = q.view(B, S, d.N, d.D + d.Dr).split((d.D, d.Dr), -1)
        query = UKS["einsum"](q_nope, self.w_uk)
        query_rope = ROPES["transposed"](q_pe, cos.unsqueeze(2), sin.unsqueeze(2))
        ckv, k_pe = self.batches(kv, B, S).split((d.Hckv, d.Dr), -1)
        ckv = NORMS["once"](ckv, self.g_ckv, 1e-6)
        k_rope = ROPES["transposed"](k_pe.unsqueeze(2), cos.unsqueeze(2), sin.unsqueeze(2)).squeeze(2)
        for cache, rows in ((kv_cache, ckv), (kr_cache, k_rope)):
            WRITES[self.spelling.cache](cache, rows, slots)
        return query, query_rope, kv_cache + 0, kr_cache + 0
