"""npu_mla_prolog, _v2, _v3 and _v3_functional at speed (src/mla_prolog.cpp). Formula and traps: the file of
this name in meta_impls; the numbers in comments are the steps of that formula.

Products take most of the time, with few tokens that of reading their weights. Each step between them is one
pass over what the product before it left, and the rows of the caches are written where they belong, once.

The reference's are mxfp8, caches quantized tile by tile, and calls without tokens or pages.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from npu_fusion.kernels.cpu._bf16_matmul import matmul
from npu_fusion.kernels.cpu._key_rows import Cache, Product, write_key_rows
from npu_fusion.kernels.cpu._library import finished, library
from npu_fusion.kernels.cpu._tensors import TYPES, address, contiguous, optional_contiguous
from npu_fusion.kernels.cpu.quant_matmul import npu_quant_matmul
from npu_fusion.kernels.reference.mla_prolog import token_slots
from npu_fusion.kernels.reference.quant_matmul import int8_matmul
from npu_fusion.meta_impls._dtypes import enum_value
from npu_fusion.meta_impls._mla_prolog import (
    DIRECT,
    MXFP8,
    PER_CHANNEL,
    PER_TENSOR,
    PER_TILE,
    Call,
    of_v2,
    of_v3,
)
from npu_fusion.meta_impls._registry import compiled_kernel

_INT32 = enum_value(torch.int32)
# A scale for int8 products whose sums are taken as they are.
_ONE = torch.ones(1)


class _Functions(NamedTuple):
    norm: Callable[..., int]
    query: Callable[..., int]
    quantize_query: Callable[..., int]


@functools.cache
def _functions() -> _Functions | None:
    found = library()
    if found is None:
        return None
    return _Functions(
        found.function("mla_norm", "12q2d"),
        found.function("mla_query", "15q"),
        found.function("mla_quantize_query", "9q"),
    )


@compiled_kernel("npu_mla_prolog")
def npu_mla_prolog(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    results = _functional(of_v2("npu_mla_prolog", *tensors, **options))
    if results is NotImplemented:
        return NotImplemented
    query, query_rope, _, _, _, *caches = results
    return query, query_rope, *caches


@compiled_kernel("npu_mla_prolog_v2")
def npu_mla_prolog_v2(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    results = _functional(of_v2("npu_mla_prolog_v2", *tensors, **options))
    if results is NotImplemented:
        return NotImplemented
    query, query_rope, scale, _, _, *caches = results
    return query, query_rope, *caches, scale if scale.numel() else scale.new_zeros(1)


@compiled_kernel("npu_mla_prolog_v3")
def npu_mla_prolog_v3(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    c = of_v3("npu_mla_prolog_v3", *tensors, **options)
    return _prolog(c) if _takes(c) else NotImplemented


@compiled_kernel("npu_mla_prolog_v3_functional")
def npu_mla_prolog_v3_functional(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return _functional(of_v3("npu_mla_prolog_v3_functional", *tensors, **options))


def _functional(c: Call) -> tuple[Tensor, ...]:
    """The outputs of v3, and updated copies of the caches."""
    if not _takes(c):
        return NotImplemented
    copies = [cache.clone(memory_format=torch.contiguous_format) for cache in (c.kv_cache, c.kr_cache)]
    results = _prolog(dataclasses.replace(c, kv_cache=copies[0], kr_cache=copies[1]))
    return NotImplemented if results is NotImplemented else (*results, *copies)


def _takes(c: Call) -> bool:
    return (
        _functions() is not None
        and c.weight_quant_mode != MXFP8
        and c.kv_cache_quant_mode != PER_TILE
        and c.token_x.numel() != 0
        and c.kv_cache.numel() != 0
    )


def _caches(c: Call) -> tuple[Cache, Cache]:
    kv, kr = (t if t.dim() == 4 else t.unsqueeze(0) for t in (c.kv_cache, c.kr_cache))
    kv_scale = kr_scale = None
    if c.kv_cache_quant_mode in (PER_TENSOR, PER_CHANNEL):
        assert c.quant_scale_ckv is not None
        kv_scale = contiguous(c.quant_scale_ckv.flatten())
        if c.kv_cache_quant_mode == PER_TENSOR:
            kv_scale = kv_scale[:1]
    if c.kv_cache_quant_mode == PER_CHANNEL:
        assert c.quant_scale_ckr is not None
        kr_scale = contiguous(c.quant_scale_ckr.flatten())
    return Cache(kv, kv_scale), Cache(kr, kr_scale)


def _prolog(c: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five outputs of v3; writes the caches of ``c`` last, and not if it returns NotImplemented."""
    functions = _functions()
    assert functions is not None
    threads, dtype = torch.get_num_threads(), TYPES[c.dtype]
    n_heads, d, hckv = c.weight_uk.shape
    x = c.token_x.flatten(0, -2)
    rows, hcq, dr = x.size(0), c.weight_dq.size(1), c.rope_sin.size(-1)
    sin, cos = (contiguous(angles.flatten(0, -2)) for angles in (c.rope_sin, c.rope_cos))

    # 1
    cq = Product(_product(x, c.weight_dq), c.dequant_scale_x, c.dequant_scale_w_dq)
    # 2
    quantized = c.weight_uq_qr.dtype is torch.int8
    qn = torch.empty(rows, hcq, dtype=c.weight_uq_qr.dtype)
    scale_norm = torch.empty((rows, 1) if quantized else (0,), dtype=torch.float32)
    gamma, smooth = contiguous(c.rmsnorm_gamma_cq), optional_contiguous(c.smooth_scales_cq)
    status = functions.norm(
        *cq.arguments(),
        dtype,
        gamma.data_ptr(),
        address(smooth),
        qn.data_ptr(),
        address(scale_norm if quantized else None),
        threads,
        c.rmsnorm_epsilon_cq,
        c.qc_qr_scale,
    )
    if not finished(status):
        return NotImplemented
    # 3
    q = Product(_product(qn, c.weight_uq_qr), scale_norm, c.dequant_scale_w_uq_qr)
    # 5, and the query's other part in the order that its product with weight_uk takes
    nope = torch.empty(n_heads, rows, d, dtype=c.dtype)
    query_rope = torch.empty(*c.tokens, n_heads, dr, dtype=c.dtype)
    status = functions.query(
        *q.arguments(),
        dtype,
        cos.data_ptr(),
        sin.data_ptr(),
        nope.data_ptr(),
        query_rope.data_ptr(),
        n_heads,
        d,
        dr,
        threads,
    )
    if not finished(status):
        return NotImplemented
    # 4
    query = torch.empty(rows, n_heads, hckv, dtype=c.dtype)
    matmul(nope, c.weight_uk, query.transpose(0, 1))
    scale_nope = torch.empty((rows, n_heads, 1) if c.query_quant_mode else (0,), dtype=torch.float32)
    if c.query_quant_mode:
        assert c.quant_scale_ckv is not None
        rounded, query = query, torch.empty(query.shape, dtype=torch.int8)
        quant_scale = contiguous(c.quant_scale_ckv)
        status = functions.quantize_query(
            rounded.data_ptr(),
            query_rope.data_ptr(),
            quant_scale.data_ptr(),
            query.data_ptr(),
            scale_nope.data_ptr(),
            rows * n_heads,
            hckv,
            dr,
            threads,
        )
        if not finished(status):
            return NotImplemented
    # 6 to 8
    kv = Product(_product(x, c.weight_dkv_kr), c.dequant_scale_x, c.dequant_scale_w_dkv_kr)
    latent, rope = _caches(c)
    slots = None if c.cache_mode in DIRECT else contiguous(token_slots(c))
    if not write_key_rows(
        kv,
        contiguous(c.rmsnorm_gamma_ckv),
        cos,
        sin,
        c.rmsnorm_epsilon_ckv,
        c.kc_scale,
        slots,
        latent,
        rope,
        nz=c.nz,
        round_rope=True,
    ):
        return NotImplemented
    if c.query_norm_flag:
        qn = qn.unflatten(0, c.tokens)
    else:
        qn, scale_norm = qn.new_empty(0), scale_norm.new_empty(0)
    return query.unflatten(0, c.tokens), query_rope, scale_nope, qn, scale_norm


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight``, contiguous: int32 of int8 operands, otherwise in their dtype."""
    if weight.dtype is torch.int8:
        y = npu_quant_matmul(x, weight, _ONE, output_dtype=_INT32)
        return int8_matmul(x, weight) if y is NotImplemented else y
    y = torch.empty(x.size(0), weight.size(1), dtype=weight.dtype)
    matmul(x, weight, y)
    return y
