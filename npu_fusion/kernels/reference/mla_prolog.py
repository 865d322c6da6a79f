"""npu_mla_prolog, _v2, _v3 and _v3_functional on the CPU; formula and traps in the file of this name in
meta_impls. The numbers in comments are the steps of that formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_fusion.kernels.reference._cache import page_slots, write_slots
from npu_fusion.kernels.reference._mla_prolog_quant import cache_rows, normalized, product, quantize_query
from npu_fusion.kernels.reference._norm import rms_normalize
from npu_fusion.kernels.reference.interleave_rope import npu_interleave_rope as rope
from npu_fusion.meta_impls._mla_prolog import BY_PAGE, DIRECT, Call, of_v2, of_v3
from npu_fusion.meta_impls._registry import cpu_kernel


@cpu_kernel("npu_mla_prolog")
def npu_mla_prolog(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    *weights, kv_cache, kr_cache = tensors
    caches = _copies(kv_cache, kr_cache)
    query, query_rope, *_ = _prolog(of_v2("npu_mla_prolog", *weights, *caches, **options))
    return query, query_rope, *caches


@cpu_kernel("npu_mla_prolog_v2")
def npu_mla_prolog_v2(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    *weights, kv_cache, kr_cache = tensors
    caches = _copies(kv_cache, kr_cache)
    call = of_v2("npu_mla_prolog_v2", *weights, *caches, **options)
    query, query_rope, scale, *_ = _prolog(call)
    return query, query_rope, *caches, scale if call.query_quant_mode else scale.new_zeros(1)


@cpu_kernel("npu_mla_prolog_v3")
def npu_mla_prolog_v3(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return _prolog(of_v3("npu_mla_prolog_v3", *tensors, **options))


@cpu_kernel("npu_mla_prolog_v3_functional")
def npu_mla_prolog_v3_functional(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    *weights, kv_cache, kr_cache = tensors
    caches = _copies(kv_cache, kr_cache)
    return *_prolog(of_v3("npu_mla_prolog_v3_functional", *weights, *caches, **options)), *caches


def _copies(kv_cache: Tensor, kr_cache: Tensor) -> tuple[Tensor, Tensor]:
    return (
        kv_cache.clone(memory_format=torch.contiguous_format),
        kr_cache.clone(memory_format=torch.contiguous_format),
    )


def _prolog(c: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five outputs of v3; writes the caches of ``c``."""
    n_heads, d, hckv = c.weight_uk.shape
    x = c.token_x.flatten(0, -2)
    sin, cos = c.rope_sin.flatten(0, -2), c.rope_cos.flatten(0, -2)

    # 1
    cq = product(x, c.dequant_scale_x, c.weight_dq, c.dequant_scale_w_dq, c.dtype)
    # 2
    n, _ = rms_normalize(cq, c.rmsnorm_gamma_cq, c.rmsnorm_epsilon_cq)
    qn, scale_norm = normalized(c, n * c.qc_qr_scale)
    # 3
    q = product(qn, scale_norm, c.weight_uq_qr, c.dequant_scale_w_uq_qr, c.dtype)
    q_nope, q_pe = q.unflatten(-1, (n_heads, -1)).tensor_split((d,), dim=-1)
    # 4: a product for each head
    heads = product(q_nope.to(c.dtype).transpose(0, 1), None, c.weight_uk, None, c.dtype)
    query = heads.transpose(0, 1).to(c.dtype)
    # 5
    query_rope = rope(q_pe, cos.unsqueeze(1), sin.unsqueeze(1)).to(c.dtype)
    query, query_rope, scale_nope = quantize_query(c, query, query_rope)

    # 6
    kv = product(x, c.dequant_scale_x, c.weight_dkv_kr, c.dequant_scale_w_dkv_kr, c.dtype)
    ckv, k_pe = kv.tensor_split((hckv,), dim=-1)
    ckv, _ = rms_normalize(ckv.contiguous(), c.rmsnorm_gamma_ckv, c.rmsnorm_epsilon_ckv)
    # 7
    kr = rope(k_pe, cos, sin).to(c.dtype)
    # 8
    _write(c, *cache_rows(c, ckv * c.kc_scale, kr))

    if c.query_norm_flag:
        qn = qn.unflatten(0, c.tokens)
    else:
        qn, scale_norm = qn.new_empty(0), scale_norm.new_empty(0)
    query, query_rope = (y.unflatten(0, c.tokens).contiguous() for y in (query, query_rope))
    return query, query_rope, scale_nope, qn, scale_norm


def _write(c: Call, kv_rows: Tensor, kr_rows: Tensor | None) -> None:
    """Write the rows, [R, width] each, into the caches; without ``kr_rows`` kr_cache has no elements."""
    if c.cache_mode in DIRECT:
        c.kv_cache.copy_(kv_rows.view(c.kv_cache.shape))
        if kr_rows is not None:
            c.kr_cache.copy_(kr_rows.view(c.kr_cache.shape))
        return
    slots = token_slots(c)
    write_slots(c.kv_cache, kv_rows, slots, nz=c.nz)
    if kr_rows is not None:
        write_slots(c.kr_cache, kr_rows, slots, nz=c.nz)


def token_slots(c: Call) -> Tensor:
    """Where each token goes, int64 [R]."""
    assert c.cache_index is not None
    index = c.cache_index.flatten()
    if c.cache_mode not in BY_PAGE:
        return index
    block = c.kv_cache.size(1)
    if c.actual_seq_len is None:
        batch, length = c.tokens
        return page_slots(index, index.new_full((batch,), length), block)
    ends = c.actual_seq_len.to(torch.int64)
    tokens = ends.diff(prepend=ends.new_zeros(1))
    rows = c.token_x.size(0)
    if bool((tokens < 0).any()) or int(tokens.sum()) != rows:
        raise ValueError(
            f"{c.op}: actual_seq_len is {ends.tolist()}; accepted: the ends of the sequences, ascending, "
            f"the last {rows}"
        )
    pages = int(((tokens + block - 1) // block).sum())
    if index.numel() != pages:
        raise ValueError(
            f"{c.op}: cache_index has {index.numel()} pages; accepted: {pages}, for actual_seq_len "
            f"{ends.tolist()} and a BlockSize of {block}"
        )
    return page_slots(index, tokens, block)
