"""npu_mla_prolog_v3(_functional) on CUDA where nothing is quantized and the cache is PA_BSND. Formula and
traps: the file of this name in meta_impls, whose numbers of steps these are; everything else is the reference
kernel's.

::

    1 cuBLAS ─▶ 2 rms_norm ─▶ 3 cuBLAS ─┬─▶ 4 cuBLAS, a product for each head ─▶ query
                                        └─▶ 5 rope ─▶ query_rope
    6 cuBLAS ─▶ one kernel: rms_norm of the latent, 7 rope of the key, 8 both rows into their pages

The kernels between the products read their rows where the products have left them, and write the pages in
place.

Traps: which of two tokens with the same slot stays is open, as on the device. A slot beyond the cache is not
written; the reference kernel raises, but here the host would have to wait for the device to know.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_fusion.kernels.triton._launch import Choice, RowKernel, held_or_looped, power_of_two
from npu_fusion.kernels.triton._norm import reciprocal_rms
from npu_fusion.kernels.triton._rows import load, store
from npu_fusion.meta_impls._mla_prolog import NOT_QUANTIZED, Call, of_v3

_DTYPES = (torch.bfloat16, torch.float16)
_WIDEST_LATENT = 4096
_HEADS_AT_ONCE = 16


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x: tl.tensor,
    gamma: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    epsilon: tl.tensor,
    factor: tl.tensor,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    LOOPED: tl.constexpr,
) -> None:
    """Step 2."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start_of_row = tl.cast(row, tl.int64) * WIDTH
        x_row = x + start_of_row
        y_row = y + start_of_row
        if LOOPED:
            RAGGED: tl.constexpr = WIDTH % MAIN != 0
            squares = tl.zeros([MAIN], tl.float32)
            for start in range(0, WIDTH, MAIN):
                value = load(x_row, start + tl.arange(0, MAIN), WIDTH, RAGGED).to(tl.float32)
                squares += value * value
            rstd = reciprocal_rms(tl.sum(squares, axis=0), WIDTH, epsilon)
            for start in range(0, WIDTH, MAIN):
                columns = start + tl.arange(0, MAIN)
                value = load(x_row, columns, WIDTH, RAGGED).to(tl.float32)
                n = value * rstd * load(gamma, columns, WIDTH, RAGGED).to(tl.float32) * factor
                store(y_row, columns, n.to(y.dtype.element_ty), WIDTH, RAGGED)
        else:
            columns = tl.arange(0, MAIN)
            value = load(x_row, columns, WIDTH, False).to(tl.float32)
            squares = tl.sum(value * value, axis=0)
            if TAIL > 0:
                CUT: tl.constexpr = MAIN + TAIL > WIDTH
                behind = MAIN + tl.arange(0, TAIL)
                rest = load(x_row, behind, WIDTH, CUT).to(tl.float32)
                squares += tl.sum(rest * rest, axis=0)
            rstd = reciprocal_rms(squares, WIDTH, epsilon)
            n = value * rstd * load(gamma, columns, WIDTH, False).to(tl.float32) * factor
            store(y_row, columns, n.to(y.dtype.element_ty), WIDTH, False)
            if TAIL > 0:
                n = rest * rstd * load(gamma, behind, WIDTH, CUT).to(tl.float32) * factor
                store(y_row, behind, n.to(y.dtype.element_ty), WIDTH, CUT)


@triton.jit
def _rotated(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    pairs: tl.tensor,
    mask: tl.tensor,
    valid: tl.tensor,
    HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of npu_interleave_rope, of the adjacent pairs at ``x``."""
    even = tl.load(x + 2 * pairs, mask=mask, other=0.0).to(tl.float32)
    odd = tl.load(x + 2 * pairs + 1, mask=mask, other=0.0).to(tl.float32)
    cos_first = tl.load(cos + pairs, mask=valid, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + pairs, mask=valid, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + HALF + pairs, mask=valid, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + HALF + pairs, mask=valid, other=0.0).to(tl.float32)
    return even * cos_first - odd * sin_first, odd * cos_second + even * sin_second


@triton.jit(do_not_specialize=["rows"])
def _query_rope_kernel(
    q: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
) -> None:
    """Step 5: the last 2 * HALF columns of each head of q."""
    pairs = tl.arange(0, PAIR_BLOCK)[None, :]
    valid = pairs < HALF
    WIDTH: tl.constexpr = NOPE + 2 * HALF
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        cos_row = cos + at * (2 * HALF)
        sin_row = sin + at * (2 * HALF)
        for first in range(0, HEADS, HEAD_BLOCK):
            head = first + tl.arange(0, HEAD_BLOCK)[:, None]
            mask = (head < HEADS) & valid
            q_heads = q + at * (HEADS * WIDTH) + head * WIDTH + NOPE
            y_heads = y + at * (HEADS * 2 * HALF) + head * (2 * HALF)
            left, right = _rotated(q_heads, cos_row, sin_row, pairs, mask, valid, HALF)
            tl.store(y_heads + pairs, left.to(y.dtype.element_ty), mask=mask)
            tl.store(y_heads + HALF + pairs, right.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "slots_there"])
def _latent_kernel(
    kv: tl.tensor,
    gamma: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    index: tl.tensor,
    kv_cache: tl.tensor,
    kr_cache: tl.tensor,
    rows: tl.tensor,
    slots_there: tl.tensor,
    page_rows: tl.tensor,
    kv_page: tl.tensor,
    kv_row: tl.tensor,
    kr_page: tl.tensor,
    kr_row: tl.tensor,
    epsilon: tl.tensor,
    factor: tl.tensor,
    LATENT: tl.constexpr,
    HALF: tl.constexpr,
    LATENT_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
) -> None:
    """Steps 6 (behind its product), 7 and 8."""
    CUT: tl.constexpr = LATENT != LATENT_BLOCK
    columns = tl.arange(0, LATENT_BLOCK)
    pairs = tl.arange(0, PAIR_BLOCK)
    valid = pairs < HALF
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        slot = tl.load(index + at)
        written = (slot >= 0) & (slot < slots_there)
        page = slot // page_rows
        place = slot - page * page_rows
        x = kv + at * (LATENT + 2 * HALF)

        value = load(x, columns, LATENT, CUT).to(tl.float32)
        rstd = reciprocal_rms(tl.sum(value * value, axis=0), LATENT, epsilon)
        n = value * rstd * load(gamma, columns, LATENT, CUT).to(tl.float32) * factor
        latent = kv_cache + page * kv_page + place * kv_row + columns
        tl.store(latent, n.to(kv_cache.dtype.element_ty), mask=written & (columns < LATENT))

        cos_row = cos + at * (2 * HALF)
        sin_row = sin + at * (2 * HALF)
        left, right = _rotated(x + LATENT, cos_row, sin_row, pairs, valid, valid, HALF)
        key = kr_cache + page * kr_page + place * kr_row + pairs
        tl.store(key, left.to(kr_cache.dtype.element_ty), mask=written & valid)
        tl.store(key + HALF, right.to(kr_cache.dtype.element_ty), mask=written & valid)


NORM = RowKernel(_norm_kernel, ("x", "y"), held_or_looped)
QUERY_ROPE = RowKernel(
    _query_rope_kernel, ("q", "cos", "sin", "y"), lambda constants: [Choice({}, warps) for warps in (4, 2, 8)]
)
# One choice, so that nothing is ever measured: a measurement would write into the caches.
LATENT = RowKernel(_latent_kernel, ("kv", "cos", "sin", "index"), lambda constants: [Choice({}, 4)])


def npu_mla_prolog_v3(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    c = of_v3("npu_mla_prolog_v3", *tensors, **options)
    return _prolog(c) if _is_plain(c) else NotImplemented


def npu_mla_prolog_v3_functional(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    *weights, kv_cache, kr_cache = tensors
    if not _is_plain(of_v3("npu_mla_prolog_v3_functional", *tensors, **options)):
        return NotImplemented
    caches = [cache.clone(memory_format=torch.contiguous_format) for cache in (kv_cache, kr_cache)]
    return *_prolog(of_v3("npu_mla_prolog_v3_functional", *weights, *caches, **options)), *caches


def _is_plain(c: Call) -> bool:
    quantized = (c.weight_quant_mode, c.kv_cache_quant_mode, c.query_quant_mode)
    return (
        quantized == (NOT_QUANTIZED, 0, 0)
        and c.cache_mode == "PA_BSND"
        and c.dtype in _DTYPES
        and c.weight_uk.shape[-1] <= _WIDEST_LATENT
        and all(cache.stride(-1) == 1 for cache in (c.kv_cache, c.kr_cache))
    )


def _prolog(c: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five outputs of v3; writes the caches of ``c``."""
    heads, nope, latent = c.weight_uk.shape
    x = c.token_x.flatten(0, -2)
    rows, rope = x.shape[0], c.rope_sin.shape[-1]
    sin, cos = (table.flatten(0, -2).contiguous() for table in (c.rope_sin, c.rope_cos))
    empty = x.new_empty(0, dtype=torch.float32)

    # 1, 2
    cq = torch.mm(x, c.weight_dq)
    qn = torch.empty_like(cq)
    NORM(
        rows,
        {
            "x": cq,
            "gamma": c.rmsnorm_gamma_cq.contiguous(),
            "y": qn,
            "epsilon": float(c.rmsnorm_epsilon_cq),
            "factor": float(c.qc_qr_scale),
        },
        {"WIDTH": cq.shape[1]},
        x.device,
    )
    # 3
    q = torch.mm(qn, c.weight_uq_qr)
    # 4
    query = x.new_empty((rows, heads, latent))
    q_nope = q.view(rows, heads, nope + rope)[..., :nope]
    torch.bmm(q_nope.transpose(0, 1), c.weight_uk, out=query.transpose(0, 1))
    # 5
    query_rope = x.new_empty((rows, heads, rope))
    pair_block = power_of_two(rope // 2)
    QUERY_ROPE(
        rows,
        {"q": q, "cos": cos, "sin": sin, "y": query_rope},
        {
            "HEADS": heads,
            "NOPE": nope,
            "HALF": rope // 2,
            "HEAD_BLOCK": min(_HEADS_AT_ONCE, power_of_two(heads)),
            "PAIR_BLOCK": pair_block,
        },
        x.device,
    )
    # 6, 7, 8
    _write(c, torch.mm(x, c.weight_dkv_kr), cos, sin, latent, rope)

    norm = qn.unflatten(0, c.tokens) if c.query_norm_flag else qn.new_empty(0)
    return query.unflatten(0, c.tokens), query_rope.unflatten(0, c.tokens), empty, norm, empty.clone()


def _write(c: Call, kv: Tensor, cos: Tensor, sin: Tensor, latent: int, rope: int) -> None:
    assert c.cache_index is not None
    pages, page_rows = c.kv_cache.shape[:2]
    LATENT(
        kv.shape[0],
        {
            "kv": kv,
            "gamma": c.rmsnorm_gamma_ckv.contiguous(),
            "cos": cos,
            "sin": sin,
            "index": c.cache_index.flatten().contiguous(),
            "kv_cache": c.kv_cache,
            "kr_cache": c.kr_cache,
            "slots_there": pages * page_rows,
            "page_rows": page_rows,
            "kv_page": c.kv_cache.stride(0),
            "kv_row": c.kv_cache.stride(1),
            "kr_page": c.kr_cache.stride(0),
            "kr_row": c.kr_cache.stride(1),
            "epsilon": float(c.rmsnorm_epsilon_ckv),
            "factor": float(c.kc_scale),
        },
        {
            "LATENT": latent,
            "HALF": rope // 2,
            "LATENT_BLOCK": power_of_two(latent),
            "PAIR_BLOCK": power_of_two(rope // 2),
        },
        kv.device,
    )
