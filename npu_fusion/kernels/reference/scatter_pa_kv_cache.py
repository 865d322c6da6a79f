"""npu_scatter_pa_kv_cache on the CPU; formula and traps in the file of this name in meta_impls."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.reference._cache import write_slots
from npu_fusion.meta_impls._registry import cpu_kernel
from npu_fusion.meta_impls.scatter_pa_kv_cache import PA_NZ


@cpu_kernel("npu_scatter_pa_kv_cache")
def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = PA_NZ,
) -> None:
    for cache, rows in ((key_cache, key), (value_cache, value)):
        # The NZ cache shows its memory; with its dimensions swapped, each row is [N * D / d0, d0].
        pages = cache.transpose(1, 2) if cache_mode == PA_NZ else cache
        write_slots(pages, rows.flatten(1), slot_mapping.to(torch.int64), nz=False)


@cpu_kernel("npu_scatter_pa_kv_cache_functional")
def npu_scatter_pa_kv_cache_functional(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = PA_NZ,
) -> tuple[Tensor, Tensor]:
    key_cache = key_cache.clone(memory_format=torch.contiguous_format)
    value_cache = value_cache.clone(memory_format=torch.contiguous_format)
    npu_scatter_pa_kv_cache(key, value, key_cache, value_cache, slot_mapping, cache_mode=cache_mode)
    return key_cache, value_cache
