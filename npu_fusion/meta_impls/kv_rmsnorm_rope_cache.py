"""npu_kv_rmsnorm_rope_cache: the keys and values of multi-head latent attention, normalized, rotated, stored.

::

    x, r    = kv[..., :Dv], kv[..., Dv:]                                 Dv and Dr: sizes of gamma and cos
    y       = x / sqrt(mean(x^2) + epsilon) * gamma                      goes to ckv_cache
    q       = the even elements of r, then the odd ones
    k_embed = q * cos + cat(-q2, q1) * sin       (q1, q2: halves of q)   goes to k_cache

all in fp32, with one rounding to the dtype of kv; or, into an int8 cache, ``sat(rint(value * scale (+
offset)))`` of the fp32 value.

``cache_mode`` says what ``index`` means. A negative index: that row (that page) is not written.

=================  ======================  ==================================================================
mode               caches                  index
=================  ======================  ==================================================================
Norm               [B, 1, Smax, D]         [B, S]: row within its own sequence
PA, PA_BNSD        [blocks, size, 1, D]    [B * S]: slot, page * size + offset
PA_NZ              the same, NZ order      the same
PA_BLK_BNSD        [blocks, size, 1, D]    [B * ceil(S / size)]: slot where a page begins (the offset within
                                           the page is ignored); the tokens of a sequence fill its pages
PA_BLK_NZ          the same, NZ order      the same
=================  ======================  ==================================================================

NZ: the memory of a page is [D / d0][size][d0] with d0 = 32 bytes (16 columns of bfloat16, 32 of int8).

Three spellings: ``npu_kv_rmsnorm_rope_cache`` returns (k_cache, ckv_cache, k_embed, y), ``_v2`` writes its
caches in place and returns (k_embed, y), ``_v2_functional`` returns (k_embed, y, k_cache, ckv_cache).

Traps:

* k_cache, which comes first, holds the rope part; ckv_cache the normalized part.
* k_embed and y are not quantized, and not written at all unless ``is_output_kv`` and the mode is not Norm:
  devices leave garbage, the CPU kernel zeros.
* The schema of the first spelling is functional, and so it is here: new caches are returned. On a device the
  eager call writes into the caches that it is given.
* The rotation is that of npu_interleave_rope, not of npu_rotary_mul.
* An int8 cache may be beside one that is not, each following its own scale. The op-plugin documentation
  wants both or none; the kernels and the newer aclnn documentation do not.

Narrower on devices: A2 and A3 take Dv 512 and Dr 64, no offsets (they are ignored), no scale in mode Norm,
and no single scale for all columns; no device takes fp32, which is here for models on the CPU. ``v`` (keys
and values apart, 192 and 128 wide) and float8 caches are not implemented.

Formula: op-plugin and aclnn documentation, goldens and public kernel sources of torch_npu 2.13.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_fusion.meta_impls._cache import check_cache
from npu_fusion.meta_impls._checks import (
    FLOATS,
    check,
    check_broadcastable,
    check_choice,
    check_dtype,
    check_rank,
    check_shape,
    check_size,
)
from npu_fusion.meta_impls._registry import operator

Size = int | torch.SymInt

NORM = "Norm"
BY_SLOT = ("PA", "PA_BNSD", "PA_NZ")
BY_PAGE = ("PA_BLK_BNSD", "PA_BLK_NZ")
NZ = ("PA_NZ", "PA_BLK_NZ")

_TENSORS = "Tensor kv, Tensor gamma, Tensor cos, Tensor sin, Tensor index"
_OPTIONS = (
    "Tensor? k_rope_scale=None, Tensor? c_kv_scale=None, Tensor? k_rope_offset=None, "
    "Tensor? c_kv_offset=None, Tensor? v=None, float epsilon=1e-5, str cache_mode='Norm', "
    "bool is_output_kv=False"
)
_OPTIONS_V2 = f"{_OPTIONS}, int? k_cache_dtype=None, int? ckv_cache_dtype=None"


@operator(
    f"npu_kv_rmsnorm_rope_cache({_TENSORS}, Tensor k_cache, Tensor ckv_cache, *, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
def npu_kv_rmsnorm_rope_cache(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k_cache and ckv_cache, updated copies; k_embed and y. Arguments and errors: :func:`new_rows`."""
    rows = new_rows("npu_kv_rmsnorm_rope_cache", *tensors, **options)
    return *_new_caches(*tensors), *rows


@operator(
    f"npu_kv_rmsnorm_rope_cache_v2({_TENSORS}, Tensor(a!) k_cache, Tensor(b!) ckv_cache, *, {_OPTIONS_V2}) "
    "-> (Tensor, Tensor)"
)
def npu_kv_rmsnorm_rope_cache_v2(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """k_embed and y; the caches are written in place. Arguments and errors: :func:`new_rows`."""
    return new_rows("npu_kv_rmsnorm_rope_cache_v2", *tensors, **options)


@operator(
    f"npu_kv_rmsnorm_rope_cache_v2_functional({_TENSORS}, Tensor k_cache, Tensor ckv_cache, *, "
    f"{_OPTIONS_V2}) -> (Tensor, Tensor, Tensor, Tensor)"
)
def npu_kv_rmsnorm_rope_cache_v2_functional(
    *tensors: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k_embed and y; k_cache and ckv_cache, updated copies. Arguments and errors: :func:`new_rows`."""
    rows = new_rows("npu_kv_rmsnorm_rope_cache_v2_functional", *tensors, **options)
    return *rows, *_new_caches(*tensors)


def new_rows(
    op: str,
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
    """Check the arguments of the operator ``op``; k_embed [B, 1, S, Dr] and y [B, 1, S, Dv], of kv's dtype.

    Args:
        kv: [B, 1, S, Dv + Dr]; fp16, bf16 or fp32.
        gamma: [Dv], the dtype of ``kv``.
        cos, sin: [B, 1, S or 1, Dr] with Dr even, the dtype of ``kv``.
        index: int64; shape and meaning in the module docstring.
        k_cache: Dr columns, shape in the module docstring; the dtype of ``kv``, int8 with ``k_rope_scale``.
        ckv_cache: Dv columns; the dtype of ``kv``, int8 with ``c_kv_scale``.
        k_rope_scale, k_rope_offset: fp32 [Dr], [1, Dr] or [1]; the offset only with the scale.
        c_kv_scale, c_kv_offset: fp32 [Dv], [1, Dv] or [1]; the offset only with the scale.
        v: None.
        epsilon: any number.
        cache_mode: a mode of the module docstring.
        is_output_kv: whether k_embed and y are written.
        k_cache_dtype, ckv_cache_dtype: None; they reinterpret caches whose dtype PyTorch lacks.

    Raises ``ValueError`` for anything else, and on the CPU for an index beyond the caches.
    """
    for argument, value in (("k_cache_dtype", k_cache_dtype), ("ckv_cache_dtype", ckv_cache_dtype)):
        check(value is None, op, argument, value, "None")
    check(v is None, op, "v", "given", "None")
    check_choice(op, "cache_mode", cache_mode, (NORM, *BY_SLOT, *BY_PAGE))
    check_dtype(op, "kv", kv, *FLOATS)
    check_rank(op, "kv", kv, 4, 4)
    for argument, tensor in (("gamma", gamma), ("cos", cos), ("sin", sin)):
        check_dtype(op, argument, tensor, kv.dtype)
    check_rank(op, "gamma", gamma, 1, 1)
    check_rank(op, "cos", cos, 4, 4)
    batch, _, tokens, _ = kv.shape
    normalized, rotated = gamma.size(0), cos.size(3)
    check_size(normalized != 0, op, "gamma has shape [0]; accepted: sizes above 0")
    check_size(rotated % 2 == 0, op, f"cos has shape {list(cos.shape)}; accepted: an even last dimension")
    check_shape(op, "kv", kv, (batch, 1, tokens, normalized + rotated))
    check_broadcastable(op, "cos", cos, (batch, 1, tokens, rotated), dims=(2,))
    check_shape(op, "sin", sin, cos.shape)
    _check_caches(op, kv, rotated, normalized, [k_cache, ckv_cache], cache_mode)
    check_dtype(op, "index", index, torch.int64)
    check_shape(op, "index", index, _index_shape(op, kv, k_cache, cache_mode))
    _check_quantization(op, "k_cache", k_cache, kv, "k_rope", k_rope_scale, k_rope_offset)
    _check_quantization(op, "ckv_cache", ckv_cache, kv, "c_kv", c_kv_scale, c_kv_offset)
    return kv.new_empty((batch, 1, tokens, rotated)), kv.new_empty((batch, 1, tokens, normalized))


def _new_caches(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    *_, k_cache, ckv_cache = tensors
    return k_cache.new_empty(k_cache.shape), ckv_cache.new_empty(ckv_cache.shape)


def _check_caches(
    op: str, kv: Tensor, rotated: Size, normalized: Size, caches: list[Tensor], mode: str
) -> None:
    """Two caches of one kind, with as many rows each."""
    k_cache, ckv_cache = caches
    if mode == NORM:
        check_rank(op, "k_cache", k_cache, 4, 4)
        check_shape(op, "k_cache", k_cache, (kv.size(0), 1, k_cache.size(2), rotated))
    else:
        check_cache(op, "k_cache", k_cache, rotated, nz=mode in NZ)
        check_cache(op, "ckv_cache", ckv_cache, normalized, nz=mode in NZ)
    check_shape(op, "ckv_cache", ckv_cache, (*k_cache.shape[:3], normalized))


def _index_shape(op: str, kv: Tensor, k_cache: Tensor, mode: str) -> tuple[Size, ...]:
    batch, _, tokens, _ = kv.shape
    if mode == NORM:
        return batch, tokens
    if mode in BY_SLOT:
        return (batch * tokens,)
    size = k_cache.size(1)
    check_size(size != 0, op, f"k_cache has shape {list(k_cache.shape)}; accepted: pages with rows")
    return (batch * ((tokens + size - 1) // size),)


def _check_quantization(
    op: str,
    argument: str,
    cache: Tensor,
    kv: Tensor,
    prefix: str,
    scale: Tensor | None,
    offset: Tensor | None,
) -> None:
    """``scale``, ``offset`` and the dtype of the cache that they are for."""
    check_dtype(op, argument, cache, kv.dtype if scale is None else torch.int8)
    check(
        offset is None or scale is not None, op, f"{prefix}_offset", "given", f"None without {prefix}_scale"
    )
    for name, parameter in ((f"{prefix}_scale", scale), (f"{prefix}_offset", offset)):
        if parameter is None:
            continue
        check_dtype(op, name, parameter, torch.float32)
        check_rank(op, name, parameter, 1, 2)
        if parameter.dim() == 1:
            check_broadcastable(op, name, parameter, (cache.size(3),), dims=(0,))
        else:
            check_shape(op, name, parameter, (1, cache.size(3)))
