"""npu_kv_rmsnorm_rope_cache, _v2 and _v2_functional at speed (src/kv_rmsnorm_rope_cache.cpp). Formula and
traps: the file of this name in meta_impls. Every call is taken but those without elements, and
those that read rows out of the cache they write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_fusion.kernels.cpu._key_rows import Cache, Product, rows_of, write_key_rows
from npu_fusion.kernels.cpu._tensors import contiguous, optional_contiguous
from npu_fusion.kernels.reference.kv_rmsnorm_rope_cache import token_slots
from npu_fusion.meta_impls._registry import compiled_kernel
from npu_fusion.meta_impls.kv_rmsnorm_rope_cache import NORM, NZ


@compiled_kernel("npu_kv_rmsnorm_rope_cache")
def npu_kv_rmsnorm_rope_cache(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = npu_kv_rmsnorm_rope_cache_v2_functional(*tensors, **options)
    if results is NotImplemented:
        return NotImplemented
    k_embed, y, k_cache, ckv_cache = results
    return k_cache, ckv_cache, k_embed, y


@compiled_kernel("npu_kv_rmsnorm_rope_cache_v2_functional")
def npu_kv_rmsnorm_rope_cache_v2_functional(
    *tensors: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    copies = [cache.clone(memory_format=torch.contiguous_format) for cache in tensors[-2:]]
    results = npu_kv_rmsnorm_rope_cache_v2(*[*tensors[:-2], *copies], **options)
    if results is NotImplemented:
        return NotImplemented
    return *results, copies[0], copies[1]


@compiled_kernel("npu_kv_rmsnorm_rope_cache_v2")
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
    batch, _, tokens, width = kv.shape
    if cache_mode == NORM:
        # Seen as pages, one for each sequence.
        k_cache, ckv_cache = k_cache.transpose(1, 2), ckv_cache.transpose(1, 2)
    rope = Cache(k_cache, optional_contiguous(k_rope_scale), optional_contiguous(k_rope_offset))
    latent = Cache(ckv_cache, optional_contiguous(c_kv_scale), optional_contiguous(c_kv_offset))
    caches = (k_cache.untyped_storage().data_ptr(), ckv_cache.untyped_storage().data_ptr())
    if kv.numel() == 0 or k_cache.numel() == 0 or kv.untyped_storage().data_ptr() in caches:
        return NotImplemented  # rows that lie in the cache would be overwritten before they are read
    shape = (batch, 1, tokens, cos.size(3))
    written = is_output_kv and cache_mode != NORM
    new = torch.empty if written else torch.zeros
    k_embed, y = new(shape, dtype=kv.dtype), new((batch, 1, tokens, gamma.size(0)), dtype=kv.dtype)
    done = write_key_rows(
        Product(kv.reshape(-1, width)),
        contiguous(gamma),
        rows_of(cos, shape),
        rows_of(sin, shape),
        epsilon,
        1.0,
        contiguous(token_slots(index, k_cache.size(1), tokens, cache_mode)),
        latent,
        rope,
        nz=cache_mode in NZ,
        round_rope=False,
        outputs=(y, k_embed) if written else None,
    )
    return (k_embed, y) if done else NotImplemented
