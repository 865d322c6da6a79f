"""mla_prolog in its four spellings."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.ascend._inputs import Case, Grid, bf16, e4m3, e8m0, f16, f32, i8, i32, i64

T, HE, HCQ, N, D, HCKV, DR = 6, 64, 32, 2, 8, 32, 32
UP, DOWN = N * (D + DR), HCKV + DR


def _floats(make: Any) -> dict[str, Tensor]:
    return {
        "token_x": make(T, HE),
        "weight_dq": make(HE, HCQ),
        "weight_uq_qr": make(HCQ, UP),
        "weight_uk": make(N, D, HCKV),
        "weight_dkv_kr": make(HE, DOWN),
        "rmsnorm_gamma_cq": make(HCQ),
        "rmsnorm_gamma_ckv": make(HCKV),
        "rope_sin": make(T, DR),
        "rope_cos": make(T, DR),
        "kv_cache": make(4, 16, 1, HCKV),
        "kr_cache": make(4, 16, 1, DR),
    }


_SLOTS = {"cache_index": i64(T)}
_BATCHES = {
    "token_x": bf16(2, 3, HE),
    "rope_sin": bf16(2, 3, DR),
    "rope_cos": bf16(2, 3, DR),
    "cache_index": i64(2, 3),
}
_PARTIAL = {"weight_uq_qr": i8(HCQ, UP), "dequant_scale_w_uq_qr": f32(1, UP)}
_PER_CHANNEL = {
    "kv_cache": i8(4, 16, 1, HCKV),
    "kr_cache": i8(4, 16, 1, DR),
    "quant_scale_ckv": f32(1, HCKV),
    "quant_scale_ckr": f32(1, DR),
}
_FULL = {
    **_PARTIAL,
    "token_x": i8(T, HE),
    "weight_dq": i8(HE, HCQ),
    "weight_dkv_kr": i8(HE, DOWN),
    "dequant_scale_x": f32(T, 1),
    "dequant_scale_w_dq": f32(1, HCQ),
    "dequant_scale_w_dkv_kr": f32(1, DOWN),
}
_PER_TENSOR = {"kv_cache": i8(4, 16, 1, HCKV), "quant_scale_ckv": f32(1)}
_MX = {
    "token_x": e4m3(T, HE),
    "weight_dq": e4m3(HE, HCQ),
    "weight_uq_qr": e4m3(HCQ, UP),
    "weight_dkv_kr": e4m3(HE, DOWN),
    "dequant_scale_x": e8m0(T, HE // 32),
    "dequant_scale_w_dq": e8m0(HCQ, HE // 32),
    "dequant_scale_w_uq_qr": e8m0(UP, HCQ // 32),
    "dequant_scale_w_dkv_kr": e8m0(DOWN, HE // 32),
    "weight_quant_mode": 3,
}
_TILES = HCKV + 2 * DR + HCKV // 16 * 4
_PER_TILE = {
    "kv_cache": i8(4, 16, 1, _TILES),
    "kr_cache": bf16(0),
    "kv_cache_quant_mode": 3,
    "ckvkr_repo_mode": 1,
    "quant_scale_repo_mode": 1,
    "tile_size": 16,
}


def _refuse_what_all_do(grid: Grid) -> None:
    grid.refuses("token_x of rank 1", token_x=bf16(HE))
    grid.refuses("token_x of another width", token_x=bf16(T, HE + 1))
    grid.refuses("weight_uk of rank 2", weight_uk=bf16(N * D, HCKV))
    grid.refuses("weight_uk of another dtype", weight_uk=i8(N, D, HCKV))
    grid.refuses("weight_uq_qr of another width", weight_uq_qr=bf16(HCQ, UP + 1))
    grid.refuses("weight_dkv_kr of another width", weight_dkv_kr=bf16(HE, DOWN + 1))
    grid.refuses("gamma of another size", rmsnorm_gamma_cq=bf16(HCQ + 1))
    grid.refuses("rope_sin of rank 4", rope_sin=bf16(1, 1, T, DR))
    grid.refuses("rope_sin of rank 3 for rows", rope_sin=bf16(1, T, DR))
    grid.refuses("rope_cos of another shape", rope_cos=bf16(1, DR))
    grid.refuses("rope_cos of another dtype", rope_cos=f32(T, DR))
    grid.refuses("kv_cache of another dtype", kv_cache=i8(4, 16, 1, HCKV))
    grid.refuses("kv_cache of two heads", kv_cache=bf16(4, 16, 2, HCKV))
    grid.refuses("kr_cache of other pages", kr_cache=bf16(3, 16, 1, DR))
    grid.refuses("cache_index int32", cache_index=i32(T))
    grid.refuses("cache_index of another size", cache_index=i64(T + 1))
    grid.refuses("cache_mode unknown", cache_mode="BNSD")
    grid.refuses("a scale that belongs to no mode", smooth_scales_cq=f32(1, HCQ))
    grid.refuses("partly quantized, no scale", weight_uq_qr=i8(HCQ, UP))


_v2 = Grid("npu_mla_prolog", "npu_mla_prolog_v2", **_floats(bf16), **_SLOTS)
_v2.accepts("batches", **_BATCHES)
_v2.accepts("PA_NZ", cache_mode="PA_NZ")
_v2.accepts("no tokens", token_x=bf16(0, HE), rope_sin=bf16(0, DR), rope_cos=bf16(0, DR), cache_index=i64(0))
_v2.accepts("float16", **_floats(f16))
_v2.accepts("float32", **_floats(f32))
_v2.accepts("partly quantized", **_PARTIAL)
_v2.accepts("partly quantized, smooth, int8 caches", **_PARTIAL, **_PER_CHANNEL, smooth_scales_cq=f32(1, HCQ))
_v2.refuses("PA_BLK_BSND", cache_mode="PA_BLK_BSND")
_refuse_what_all_do(_v2)
_v2_int8 = Grid("npu_mla_prolog_v2", **{**_floats(bf16), **_SLOTS, **_FULL})
_v2_int8.accepts("quantized, int8 cache", **_PER_TENSOR)
_v2_int8.refuses("quantized, int8 cache, no scale", kv_cache=i8(4, 16, 1, HCKV))
_v1_int8 = Grid("npu_mla_prolog", **_floats(bf16), **_SLOTS)
_v1_int8.refuses("quantized", **_FULL)

_v3 = Grid("npu_mla_prolog_v3", "npu_mla_prolog_v3_functional", **_floats(bf16), **_SLOTS)
_v3.accepts("batches", **_BATCHES)
_v3.accepts("PA_NZ", cache_mode="PA_NZ")
_v3.accepts("PA_BLK_BSND", **{**_BATCHES, "cache_mode": "PA_BLK_BSND", "cache_index": i64(2, 1)})
_v3.accepts("PA_BLK_NZ, rows", cache_mode="PA_BLK_NZ", cache_index=i64(3), actual_seq_len=i32(2))
_v3.accepts("TND", cache_mode="TND", cache_index=None, kv_cache=bf16(T, 1, HCKV), kr_cache=bf16(T, 1, DR))
_v3.accepts(
    "BSND",
    **{
        **_BATCHES,
        "cache_mode": "BSND",
        "cache_index": None,
        "kv_cache": bf16(2, 3, 1, HCKV),
        "kr_cache": bf16(2, 3, 1, DR),
    },
)
_v3.accepts("float16", **_floats(f16))
_v3.accepts("float32", **_floats(f32))
_v3.accepts("norm returned", query_norm_flag=True)
_v3.accepts("scaled", qc_qr_scale=10.0, kc_scale=2.0)
for _norm in (False, True):
    _suffix = ", norm returned" if _norm else ""
    _options = {"query_norm_flag": _norm}
    _v3.accepts(f"partly quantized{_suffix}", **_PARTIAL, weight_quant_mode=1, **_options)
    _v3.accepts(
        f"partly quantized, int8 caches{_suffix}",
        **_PARTIAL,
        **_PER_CHANNEL,
        weight_quant_mode=1,
        kv_cache_quant_mode=2,
        **_options,
    )
    _v3.accepts(f"quantized{_suffix}", **_FULL, weight_quant_mode=2, **_options)
    _v3.accepts(
        f"quantized, int8 cache{_suffix}",
        **_FULL,
        **_PER_TENSOR,
        weight_quant_mode=2,
        kv_cache_quant_mode=1,
        query_quant_mode=1,
        **_options,
    )
    _v3.accepts(f"quantized, tiles{_suffix}", **_FULL, **_PER_TILE, weight_quant_mode=2, **_options)
    _v3.accepts(f"mxfp8{_suffix}", **_MX, **_options)
    _v3.accepts(
        f"mxfp8, float8 cache{_suffix}",
        **_MX,
        kv_cache=e4m3(4, 16, 1, HCKV),
        quant_scale_ckv=f32(1),
        kv_cache_quant_mode=1,
        query_quant_mode=1,
        **_options,
    )
_refuse_what_all_do(_v3)
_v3.refuses("weight_quant_mode 4", weight_quant_mode=4)
_v3.refuses("weight_quant_mode 6", weight_quant_mode=6)
_v3.refuses("int8 cache of a float", kv_cache_quant_mode=1)
_v3.refuses("query_quant_mode alone", query_quant_mode=1)
_v3.refuses("query_quant_mode missing", **_FULL, **_PER_TENSOR, weight_quant_mode=2, kv_cache_quant_mode=1)
_v3.refuses("no cache_index", cache_index=None)
_v3.refuses("actual_seq_len for slots", actual_seq_len=i32(2))
_v3.refuses("ckvkr_repo_mode", ckvkr_repo_mode=1)
_v3.refuses("token_x_dtype", token_x_dtype=290)
_v3.refuses("mxfp8, scale float32", **{**_MX, "dequant_scale_x": f32(T, HE // 32)})
_v3.refuses("mxfp8, no scale", **{**_MX, "dequant_scale_x": None})

CASES: list[Case] = [
    *_v2.cases,
    *_v2_int8.cases[1:],
    *(case for case in _v1_int8.cases if not case.accepted),
    *_v3.cases,
]
