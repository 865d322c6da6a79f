"""npu_kv_rmsnorm_rope_cache on the CPU; formula and traps in the file of this name in meta_impls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_fusion.kernels.reference._cache import page_slots, write_slots
from npu_fusion.kernels.reference._norm import rms_normalize
from npu_fusion.kernels.reference._quant import saturate
from npu_fusion.kernels.reference.interleave_rope import npu_interleave_rope
from npu_fusion.meta_impls._registry import cpu_kernel
from npu_fusion.meta_impls.kv_rmsnorm_rope_cache import BY_PAGE, NORM, NZ


@cpu_kernel("npu_kv_rmsnorm_rope_cache")
def npu_kv_rmsnorm_rope_cache(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k_embed, y, k_cache, ckv_cache = npu_kv_rmsnorm_rope_cache_v2_functional(*tensors, **options)
    return k_cache, ckv_cache, k_embed, y


@cpu_kernel("npu_kv_rmsnorm_rope_cache_v2_functional")
def npu_kv_rmsnorm_rope_cache_v2_functional(
    *tensors: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    copies = [cache.clone(memory_format=torch.contiguous_format) for cache in tensors[-2:]]
    k_embed, y = npu_kv_rmsnorm_rope_cache_v2(*[*tensors[:-2], *copies], **options)
    return k_embed, y, copies[0], copies[1]


@cpu_kernel("npu_kv_rmsnorm_rope_cache_v2")
def npu_kv_rmsnorm_rope_cache_v2(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = NORM,
    is_output_kv: bool = False,
    k_cache_dtype: int | None = None,
    ckv_cache_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    x, r = kv.to(torch.float32).split((gamma.size(0), cos.size(3)), dim=-1)
    y, _ = rms_normalize(x.contiguous(), gamma, epsilon)
    k_embed = npu_interleave_rope(r, cos, sin)

    if cache_mode == NORM:
        # Seen as pages, one for each sequence.
        k_cache, ckv_cache = k_cache.transpose(1, 2), ckv_cache.transpose(1, 2)
    slots = token_slots(index, k_cache.size(1), kv.size(2), cache_mode)
    for cache, rows, scale, offset in (
        (k_cache, k_embed, k_rope_scale, k_rope_offset),
        (ckv_cache, y, c_kv_scale, c_kv_offset),
    ):
        stored = _stored(rows.flatten(0, 2), cache.dtype, scale, offset)
        write_slots(cache, stored, slots, nz=cache_mode in NZ)

    if cache_mode == NORM or not is_output_kv:
        k_embed, y = torch.zeros_like(k_embed), torch.zeros_like(y)
    return k_embed.to(kv.dtype), y.to(kv.dtype)


def token_slots(index: Tensor, size: int, tokens: int, cache_mode: str) -> Tensor:
    """The slot of each token, for pages of ``size`` rows."""
    if cache_mode == NORM:
        if index.numel() and int(index.max()) >= size:
            # Left alone, it would be a row of the next sequence.
            given = f"npu_kv_rmsnorm_rope_cache: index is {int(index.max())}"
            raise ValueError(f"{given}; accepted: below {size}, negative for a row that is not written")
        first = torch.arange(index.size(0), device=index.device).unsqueeze(1) * size
        return torch.where(index < 0, -1, index + first).flatten()
    if cache_mode in BY_PAGE:
        # No tokens: no pages, whatever the number of sequences.
        sequences = index.numel() // max((tokens + size - 1) // size, 1)
        return page_slots(index // size, index.new_full((sequences,), tokens), size)
    return index


def _stored(rows: Tensor, dtype: torch.dtype, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """``rows`` (fp32) as their cache holds them."""
    if scale is None:
        return rows.to(dtype)
    scaled = rows * scale
    return saturate(scaled if offset is None else scaled + offset, dtype)
