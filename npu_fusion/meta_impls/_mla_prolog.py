"""What a call of any mla_prolog operator says, in the terms of npu_mla_prolog_v3.

Formula, layouts and traps: ``mla_prolog.py`` beside this file; the checks: ``_mla_prolog_checks.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_fusion.formats import mx
from npu_fusion.meta_impls._checks import check_choice

NOT_QUANTIZED, PARTIAL, FULL, MXFP8 = 0, 1, 2, 3
"""``weight_quant_mode``: no weight is quantized; weight_uq_qr is; token_x, weight_dq and weight_dkv_kr
are too; all four are in mxfp8."""

PER_TENSOR, PER_CHANNEL, PER_TILE = 1, 2, 3
"""``kv_cache_quant_mode``; 0 is not quantized."""

MX_BLOCK = mx.BLOCK
"""So many elements along the inner dimension of a product share one e8m0 scale."""

PAGED = ("PA_BSND", "PA_NZ")
BY_PAGE = ("PA_BLK_BSND", "PA_BLK_NZ")
DIRECT = ("BSND", "TND")

DATA = {FULL: torch.int8, MXFP8: torch.float8_e4m3fn}
"""What token_x and its two weights are in; a quantized query and a quantized kv_cache are in the same."""


@dataclass(frozen=True)
class Call:
    """The arguments of npu_mla_prolog_v3 by their names, and the operator that was called.

    ============================  ==========================================================================
    token_x                       [T, He] or [B, S, He]; R rows: T or B * S
    weight_dq                     [He, Hcq]
    weight_uq_qr                  [Hcq, N * (D + Dr)], D and then Dr columns for each head
    weight_uk                     [N, D, Hckv]
    weight_dkv_kr                 [He, Hckv + Dr]
    rmsnorm_gamma_cq, .._ckv      [Hcq], [Hckv]
    rope_sin, rope_cos            [T, Dr] or [B, S, Dr], as token_x
    kv_cache, kr_cache            PA_*: [BlockNum, BlockSize, 1, Hckv], [.., Dr]; BSND: [B, S, 1, ..];
                                  TND: [T, 1, ..]. Per tile: kv_cache [.., Dtile] (see mla_prolog.py),
                                  kr_cache without elements
    cache_index                   int64. PA_BSND, PA_NZ: slots, [T] or [B, S]. PA_BLK_*: pages, [B,
                                  ceil(S / BlockSize)], or for [T, He] all sequences' pages in one row.
                                  None for BSND, TND
    actual_seq_len                int32 [B], where each sequence ends: for PA_BLK_* with [T, He] only
    dequant_scale_x               fp32 [R, 1]; mxfp8: e8m0 [R, He / 32]
    dequant_scale_w_dq            fp32 [1, Hcq]; mxfp8: e8m0 [Hcq, He / 32]
    dequant_scale_w_uq_qr         fp32 [1, N * (D + Dr)]; mxfp8: e8m0 [N * (D + Dr), Hcq / 32]
    dequant_scale_w_dkv_kr        fp32 [1, Hckv + Dr]; mxfp8: e8m0 [Hckv + Dr, He / 32]
    quant_scale_ckv               fp32, multiplied. Per tensor: [1] or [1, Hckv], the first is used; per
                                  channel: [1, Hckv]
    quant_scale_ckr               fp32 [1, Dr], per channel only
    smooth_scales_cq              fp32 [1, Hcq], int8 modes only
    k_nope_clip_alpha             fp32 [1], int8 per tile only; none is 1
    ============================  ==========================================================================
    """

    op: str
    token_x: Tensor
    weight_dq: Tensor
    weight_uq_qr: Tensor
    weight_uk: Tensor
    weight_dkv_kr: Tensor
    rmsnorm_gamma_cq: Tensor
    rmsnorm_gamma_ckv: Tensor
    rope_sin: Tensor
    rope_cos: Tensor
    kv_cache: Tensor
    kr_cache: Tensor
    cache_index: Tensor | None = None
    dequant_scale_x: Tensor | None = None
    dequant_scale_w_dq: Tensor | None = None
    dequant_scale_w_uq_qr: Tensor | None = None
    dequant_scale_w_dkv_kr: Tensor | None = None
    quant_scale_ckv: Tensor | None = None
    quant_scale_ckr: Tensor | None = None
    smooth_scales_cq: Tensor | None = None
    actual_seq_len: Tensor | None = None
    k_nope_clip_alpha: Tensor | None = None
    rmsnorm_epsilon_cq: float = 1e-05
    rmsnorm_epsilon_ckv: float = 1e-05
    cache_mode: str = "PA_BSND"
    query_norm_flag: bool = False
    weight_quant_mode: int = 0
    kv_cache_quant_mode: int = 0
    query_quant_mode: int = 0
    ckvkr_repo_mode: int = 0
    quant_scale_repo_mode: int = 0
    tile_size: int = 128
    qc_qr_scale: float = 1.0
    kc_scale: float = 1.0
    token_x_dtype: int | None = None
    weight_dq_dtype: int | None = None
    weight_uq_qr_dtype: int | None = None
    weight_dkv_kr_dtype: int | None = None
    kv_cache_dtype: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the call: what is not quantized has it, and roundings go to it."""
        return self.weight_uk.dtype

    @property
    def tokens(self) -> torch.Size:
        """[T] or [B, S]."""
        return self.token_x.shape[:-1]

    @property
    def nz(self) -> bool:
        return self.cache_mode.endswith("NZ")

    @property
    def quantized_dtype(self) -> torch.dtype:
        """Of a quantized query and a quantized kv_cache."""
        return DATA.get(self.weight_quant_mode, torch.int8)


def of_v3(op: str, *tensors: Any, **options: Any) -> Call:
    return Call(op, *tensors, **options)


def of_v2(op: str, *tensors: Any, **options: Any) -> Call:
    """v1 and v2 have ``cache_index`` before the caches; the modes follow from dtypes and the scales given."""
    *weights, cache_index, kv_cache, kr_cache = tensors
    token_x, _, weight_uq_qr, *_ = weights
    check_choice(op, "cache_mode", options.get("cache_mode", "PA_BSND"), PAGED)
    if token_x.dtype == torch.int8 and op != "npu_mla_prolog":
        options["weight_quant_mode"] = FULL
        if options.get("quant_scale_ckv") is not None:
            options |= {"kv_cache_quant_mode": PER_TENSOR, "query_quant_mode": 1}
    elif weight_uq_qr.dtype == torch.int8:
        options["weight_quant_mode"] = PARTIAL
        if kv_cache.dtype == torch.int8:
            options["kv_cache_quant_mode"] = PER_CHANNEL
    return of_v3(op, *weights, kv_cache, kr_cache, cache_index, **options)
