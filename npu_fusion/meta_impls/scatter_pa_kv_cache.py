"""npu_scatter_pa_kv_cache: keys and values of new tokens into their paged caches.

::

    page, offset = slot_mapping[t] // size, slot_mapping[t] % size
    Norm    key_cache[page, offset] = key[t]                             caches [blocks, size, N, D]
    PA_NZ   key_cache[page, :, offset, :] = key[t].view(N * D / d0, d0)  caches [blocks, N * D / d0, size, d0]

and the same for values, whose D may be another; d0 is 32 bytes.

``npu_scatter_pa_kv_cache`` writes in place and returns nothing; ``npu_scatter_pa_kv_cache_functional``
returns updated copies.

Traps: the default mode is PA_NZ, and None means Norm. An NZ cache has here the shape of its memory; the
caches of npu_kv_rmsnorm_rope_cache in mode PA_NZ lie the same way but show [blocks, size, 1, D]. A token with
a negative slot is not written. Of tokens with the same slot devices keep any one; here it is the last.

Narrower on devices: contiguous tensors; A2 and A3 take fp16, bf16 and int8. Not implemented: compressed
caches (4-dimensional keys, ``compress_lens``, ``compress_seq_offsets``, ``seq_lens``), 8-bit floats, uint16,
uint32.

Source: op-plugin and aclnn documentation, golden and public kernel sources of torch_npu 2.13.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.meta_impls._cache import nz_width
from npu_fusion.meta_impls._checks import (
    check,
    check_choice,
    check_dtype,
    check_rank,
    check_shape,
    check_size,
)
from npu_fusion.meta_impls._registry import operator

PA_NZ = "PA_NZ"

_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
)
_OPTIONS = (
    "Tensor slot_mapping, *, Tensor? compress_lens=None, Tensor? compress_seq_offsets=None, "
    "Tensor? seq_lens=None, str? cache_mode='PA_NZ'"
)


@operator(
    "npu_scatter_pa_kv_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    f"{_OPTIONS}) -> ()"
)
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
    """Write ``key`` and ``value`` in place into their caches.

    Args:
        key: [T, N, Dk]; fp16, bf16, fp32, int8, uint8, int16 or int32.
        value: [T, N, Dv], the dtype of ``key``.
        key_cache: [blocks, size, N, Dk], or [blocks, N * Dk / d0, size, d0] in mode PA_NZ with Dk a multiple
            of d0; the dtype of ``key``.
        value_cache: as ``key_cache``, with Dv.
        slot_mapping: int32 or int64 [T].
        compress_lens, compress_seq_offsets, seq_lens: None.
        cache_mode: None, "Norm" or "PA_NZ".

    Raises ``ValueError`` for anything else, and on the CPU for a slot beyond the caches.
    """
    compressed = (compress_lens, compress_seq_offsets, seq_lens)
    _check(
        "npu_scatter_pa_kv_cache", key, value, key_cache, value_cache, slot_mapping, compressed, cache_mode
    )


@operator(
    "npu_scatter_pa_kv_cache_functional(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, "
    f"{_OPTIONS}) -> (Tensor, Tensor)"
)
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
    """As :func:`npu_scatter_pa_kv_cache`, but returns updated copies of the caches."""
    op = "npu_scatter_pa_kv_cache_functional"
    compressed = (compress_lens, compress_seq_offsets, seq_lens)
    _check(op, key, value, key_cache, value_cache, slot_mapping, compressed, cache_mode)
    return key_cache.new_empty(key_cache.shape), value_cache.new_empty(value_cache.shape)


def _check(
    op: str,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    compressed: tuple[Tensor | None, Tensor | None, Tensor | None],
    cache_mode: str | None,
) -> None:
    for argument, given in zip(
        ("compress_lens", "compress_seq_offsets", "seq_lens"), compressed, strict=True
    ):
        check(given is None, op, argument, "given", "None")
    check_choice(op, "cache_mode", cache_mode, (None, "Norm", PA_NZ))
    check_dtype(op, "key", key, *_DTYPES)
    check_rank(op, "key", key, 3, 3)
    check_rank(op, "value", value, 3, 3)
    tokens, heads, _ = key.shape
    check_dtype(op, "value", value, key.dtype)
    check_shape(op, "value", value, (tokens, heads, value.size(2)))
    check_dtype(op, "slot_mapping", slot_mapping, torch.int32, torch.int64)
    check_shape(op, "slot_mapping", slot_mapping, (tokens,))
    check_rank(op, "key_cache", key_cache, 4, 4)
    blocks, size = key_cache.size(0), key_cache.size(2 if cache_mode == PA_NZ else 1)
    for argument, rows, cache in (("key", key, key_cache), ("value", value, value_cache)):
        width = rows.size(2)
        shape = (blocks, size, heads, width)
        if cache_mode == PA_NZ:
            d0 = nz_width(key.dtype)
            accepted = f"a multiple of {d0} for this dtype in mode {PA_NZ!r}"
            check_size(width % d0 == 0, op, f"{argument} has {width} columns; accepted: {accepted}")
            shape = (blocks, heads * width // d0, size, d0)
        check_dtype(op, f"{argument}_cache", cache, key.dtype)
        check_shape(op, f"{argument}_cache", cache, shape)
