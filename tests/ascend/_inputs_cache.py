"""Rotary embedding, and the operators that write caches; mla_prolog is in ``_inputs_mla.py``."""

from __future__ import annotations

from tests.ascend._inputs import Case, Grid, bf16, boolean, f16, f32, f64, i8, i16, i32, i64

_rotary = Grid("npu_rotary_mul", input=bf16(2, 3, 5, 8), r1=bf16(2, 1, 5, 8), r2=bf16(2, 1, 5, 8))
_rotary.accepts("float16", input=f16(2, 3, 5, 8), r1=f16(1, 1, 5, 8), r2=f16(1, 1, 5, 8))
_rotary.accepts("float32", input=f32(2, 3, 5, 8), r1=f32(1, 1, 1, 8), r2=f32(1, 1, 1, 8))
_rotary.accepts("pairs", rotary_mode="interleave")
_rotary.accepts("matrix", rotate=bf16(8, 8))
_rotary.accepts("strided", input=bf16(2, 5, 3, 8).transpose(1, 2))
_rotary.accepts("no rows", input=bf16(2, 3, 0, 8), r1=bf16(2, 1, 0, 8), r2=bf16(2, 1, 0, 8))
_rotary.refuses("dtype float64", input=f64(2, 3, 5, 8), r1=f64(1, 1, 5, 8), r2=f64(1, 1, 5, 8))
_rotary.refuses("rank 3", input=bf16(3, 5, 8), r1=bf16(1, 5, 8), r2=bf16(1, 5, 8))
_rotary.refuses("odd size", input=bf16(2, 3, 5, 7), r1=bf16(1, 1, 5, 7), r2=bf16(1, 1, 5, 7))
_rotary.refuses("r1 of another dtype", r1=f32(2, 1, 5, 8))
_rotary.refuses("r1 of another size", r1=bf16(2, 1, 4, 8), r2=bf16(2, 1, 4, 8))
_rotary.refuses("r2 of another shape", r2=bf16(1, 1, 5, 8))
_rotary.refuses("mode unknown", rotary_mode="quarter")
_rotary.refuses("matrix of another size", rotate=bf16(4, 4))
_rotary.refuses("matrix int8", rotate=i8(8, 8))

_interleave = Grid("npu_interleave_rope", x=bf16(2, 3, 5, 8), cos=bf16(2, 1, 5, 8), sin=bf16(2, 1, 5, 8))
_interleave.accepts("float16", x=f16(2, 3, 5, 8), cos=f16(1, 1, 5, 8), sin=f16(1, 1, 5, 8))
_interleave.accepts("float32", x=f32(2, 3, 5, 8), cos=f32(2, 1, 1, 8), sin=f32(2, 1, 1, 8))
_interleave.accepts("strided", x=bf16(2, 5, 3, 8).transpose(1, 2))
_interleave.accepts("no rows", x=bf16(2, 3, 0, 8), cos=bf16(2, 1, 0, 8), sin=bf16(2, 1, 0, 8))
_interleave.refuses("dtype int32", x=i32(2, 3, 5, 8), cos=i32(2, 1, 5, 8), sin=i32(2, 1, 5, 8))
_interleave.refuses("rank 3", x=bf16(3, 5, 8), cos=bf16(1, 5, 8), sin=bf16(1, 5, 8))
_interleave.refuses("odd size", x=bf16(2, 3, 5, 7), cos=bf16(2, 1, 5, 7), sin=bf16(2, 1, 5, 7))
_interleave.refuses("cos for each head", cos=bf16(2, 3, 5, 8), sin=bf16(2, 3, 5, 8))
_interleave.refuses("cos of another dtype", cos=f32(2, 1, 5, 8))
_interleave.refuses("sin of another shape", sin=bf16(1, 1, 5, 8))

_KV = "npu_kv_rmsnorm_rope_cache"
_BOTH = (_KV, f"{_KV}_v2", f"{_KV}_v2_functional")
_arguments = {
    "kv": bf16(2, 1, 3, 48),
    "gamma": bf16(32),
    "cos": bf16(2, 1, 3, 16),
    "sin": bf16(2, 1, 3, 16),
    "index": i64(2, 3),
    "k_cache": bf16(2, 1, 9, 16),
    "ckv_cache": bf16(2, 1, 9, 32),
}
_paged = {"index": i64(6), "k_cache": bf16(4, 5, 1, 16), "ckv_cache": bf16(4, 5, 1, 32)}
_kv = Grid(*_BOTH, **_arguments)
_kv.accepts("cos for all tokens", cos=bf16(2, 1, 1, 16), sin=bf16(2, 1, 1, 16))
_kv.accepts("strided", ckv_cache=bf16(9, 1, 2, 32).permute(2, 1, 0, 3))
_kv.accepts("rows returned", is_output_kv=True, epsilon=1e-6)
for _mode in ("PA", "PA_BNSD", "PA_NZ"):
    _kv.accepts(_mode, cache_mode=_mode, **_paged)
for _mode in ("PA_BLK_BNSD", "PA_BLK_NZ"):
    _kv.accepts(_mode, cache_mode=_mode, **{**_paged, "index": i64(2)})
_kv.accepts(
    "int8",
    k_cache=i8(2, 1, 9, 16),
    ckv_cache=i8(2, 1, 9, 32),
    k_rope_scale=f32(16),
    c_kv_scale=f32(1, 32),
    k_rope_offset=f32(16),
    c_kv_offset=f32(1),
)
_kv.accepts("int8 latent", ckv_cache=i8(2, 1, 9, 32), c_kv_scale=f32(32))
_kv.refuses("kv int8", kv=i8(2, 1, 3, 48))
_kv.refuses("kv of rank 3", kv=bf16(2, 3, 48))
_kv.refuses("kv of two heads", kv=bf16(2, 2, 3, 48))
_kv.refuses("kv of another width", kv=bf16(2, 1, 3, 40))
_kv.refuses("gamma of two dimensions", gamma=bf16(1, 32))
_kv.refuses("gamma of another dtype", gamma=f32(32))
_kv.refuses("cos of rank 3", cos=bf16(2, 3, 16))
_kv.refuses("cos of another batch", cos=bf16(1, 1, 3, 16))
_kv.refuses("sin of another shape", sin=bf16(2, 1, 1, 16))
_kv.refuses("index int32", index=i32(2, 3))
_kv.refuses("index of another shape", index=i64(6))
_kv.refuses("k_cache of another dtype", k_cache=f16(2, 1, 9, 16))
_kv.refuses("k_cache of another width", k_cache=bf16(2, 1, 9, 32))
_kv.refuses("ckv_cache of other rows", ckv_cache=bf16(2, 1, 8, 32))
_kv.refuses("int8 without scale", k_cache=i8(2, 1, 9, 16))
_kv.refuses("scale without int8", k_rope_scale=f32(16))
_kv.refuses("offset alone", k_rope_offset=f32(16))
_kv.refuses("scale of another size", ckv_cache=i8(2, 1, 9, 32), c_kv_scale=f32(16))
_kv.refuses("mode unknown", cache_mode="BNSD")
_kv.refuses("v", v=bf16(2, 1, 3, 32))
_kv.refuses("v of another dtype", v=f32(2, 1, 3, 32))
_kv_v2 = Grid(*_BOTH[1:], **_arguments)
_kv_v2.refuses("k_cache_dtype", k_cache_dtype=290)
_kv_v2.refuses("ckv_cache_dtype", ckv_cache_dtype=290)

_pa = Grid(
    "npu_scatter_pa_kv_cache",
    "npu_scatter_pa_kv_cache_functional",
    key=bf16(3, 2, 16),
    value=bf16(3, 2, 32),
    key_cache=bf16(4, 5, 2, 16),
    value_cache=bf16(4, 5, 2, 32),
    slot_mapping=i32(3),
    cache_mode="Norm",
)
_nz = {"key_cache": bf16(4, 2, 5, 16), "value_cache": bf16(4, 4, 5, 16)}
_pa.accepts("mode None", cache_mode=None)
_pa.accepts("PA_NZ", cache_mode="PA_NZ", **_nz)
_pa.accepts("strided", key_cache=bf16(4, 2, 5, 16).transpose(1, 2))
_pa.accepts("slots int64", slot_mapping=i64(3))
_pa.accepts(
    "int16", key=i16(3, 2, 8), value=i16(3, 2, 8), key_cache=i16(4, 5, 2, 8), value_cache=i16(4, 5, 2, 8)
)
_pa.refuses("mode unknown", cache_mode="PA")
_pa.refuses("key int64", key=i64(3, 2, 16))
_pa.refuses("key of rank 4", key=bf16(1, 3, 2, 16))
_pa.refuses("value of another dtype", value=f16(3, 2, 32))
_pa.refuses("value of other heads", value=bf16(3, 1, 32))
_pa.refuses("key_cache of another dtype", key_cache=f16(4, 5, 2, 16))
_pa.refuses("key_cache of another shape", key_cache=bf16(4, 5, 1, 16))
_pa.refuses("value_cache of other pages", value_cache=bf16(3, 5, 2, 32))
_pa.refuses("slots int16", slot_mapping=i16(3))
_pa.refuses("slots of another size", slot_mapping=i32(2))
_pa.refuses("compressed", compress_lens=i32(3))

_nd = Grid(
    "npu_scatter_nd_update",
    "npu_scatter_nd_update_",
    input=bf16(4, 5, 8),
    indices=i64(3, 1),
    updates=bf16(3, 5, 8),
)
_nd.accepts("two coordinates", indices=i32(3, 2), updates=bf16(3, 8))
_nd.accepts("all coordinates", indices=i64(2, 3, 3), updates=bf16(2, 3))
_nd.accepts("strided", input=bf16(5, 4, 8).transpose(0, 1))
_nd.accepts("bool", input=boolean(4, 5, 8), updates=boolean(3, 5, 8))
_nd.accepts("nothing", indices=i64(0, 1), updates=bf16(0, 5, 8))
_nd.refuses("dtype int16", input=i16(4, 5, 8), updates=i16(3, 5, 8))
_nd.refuses("rank 0", input=bf16(), indices=i64(1, 1), updates=bf16(1))
_nd.refuses("indices int16", indices=i16(3, 1))
_nd.refuses("indices of rank 1", indices=i64(3))
_nd.refuses("too many coordinates", indices=i64(3, 4), updates=bf16(3))
_nd.refuses("no coordinates", indices=i64(3, 0), updates=bf16(3, 4, 5, 8))
_nd.refuses("updates of another dtype", updates=f32(3, 5, 8))
_nd.refuses("updates of another shape", updates=bf16(3, 8))

_along = Grid(
    "scatter_update",
    "scatter_update_",
    input=bf16(4, 3, 9, 8),
    indices=i64(4),
    updates=bf16(4, 3, 1, 8),
    axis=-2,
)
_along.accepts("some batches", indices=i32(3), updates=bf16(3, 3, 1, 8))
_along.accepts("batch and offset", indices=i64(3, 2), updates=bf16(3, 3, 6, 8))
_along.accepts("strided", input=bf16(4, 9, 3, 8).transpose(1, 2))
_along.accepts("axis 1", updates=bf16(4, 1, 9, 8), axis=1)
_along.accepts("int8", input=i8(4, 3, 9, 8), updates=i8(4, 3, 1, 8))
_along.refuses("dtype float64", input=f64(4, 3, 9, 8), updates=f64(4, 3, 1, 8))
_along.refuses("rank 1", input=bf16(4), updates=bf16(4))
_along.refuses("axis 0", axis=0)
_along.refuses("axis out of range", axis=4)
_along.refuses("updates of another dtype", updates=f32(4, 3, 1, 8))
_along.refuses("updates of another rank", updates=bf16(4, 3, 8))
_along.refuses("updates of another shape", updates=bf16(4, 1, 1, 8))
_along.refuses("updates too long", updates=bf16(4, 3, 10, 8))
_along.refuses("indices int16", indices=i16(4))
_along.refuses("indices of another size", indices=i64(3))

_cast = Grid("npu_format_cast", input=bf16(4, 8), acl_format=29)
_cast.accepts("ND", input=i8(3, 4, 8), acl_format=2)
_cast.accepts("dtypes", customize_dtype=1, input_dtype=1)
_cast.refuses("format unknown", acl_format=5)
_like = Grid("npu_format_cast.Tensor", input=bf16(4, 8), dst=bf16(4, 8))

CASES: list[Case] = [
    *_rotary.cases,
    *_interleave.cases,
    *_kv.cases,
    *(case for case in _kv_v2.cases if not case.accepted),
    *_pa.cases,
    *_nd.cases,
    *_along.cases,
    *_cast.cases,
    *_like.cases,
]
