"""Quantization and the products of quantized tensors."""

from __future__ import annotations

import torch

from tests.ascend._inputs import (
    Case,
    Grid,
    bf16,
    boolean,
    e4m3,
    e5m2,
    e8m0,
    f16,
    f32,
    f64,
    i8,
    i16,
    i32,
    i64,
    u8,
)

_dynamic = Grid("npu_dynamic_quant", "npu_dynamic_quant_asymmetric", input=bf16(2, 3, 16))
_dynamic.accepts("float16", input=f16(3, 16))
_dynamic.accepts("float32", input=f32(3, 16))
_dynamic.accepts("rank 4", input=bf16(2, 1, 3, 16))
_dynamic.accepts("strided", input=bf16(16, 3).t())
_dynamic.accepts("no rows", input=bf16(0, 16))
_dynamic.accepts("smooth scales", smooth_scales=bf16(16))
_dynamic.accepts("groups", smooth_scales=bf16(4, 16), group_index=i32(4))
_dynamic.accepts("dst_type int8", dst_type=1)
_dynamic.accepts("quint4x2", dst_type=16)
_dynamic.accepts("per token", quant_mode="pertoken")
_dynamic.accepts("per channel", quant_mode="perchannel", smooth_scales=bf16(3))
_dynamic.accepts("per tensor", quant_mode="pertensor")
_dynamic.accepts("per tensor, quint4x2", quant_mode="pertensor", dst_type=16)
for _dtype in (23, 24, 290, 291, 292):
    _dynamic.accepts(f"dst_type {_dtype}", dst_type=_dtype)
_dynamic.accepts("hifloat8, maximum", dst_type=290, dst_type_max=15.0)
_dynamic.accepts("float8, strided", input=bf16(16, 3).t(), dst_type=24)
_dynamic.accepts("float8, per channel", dst_type=24, quant_mode="perchannel", smooth_scales=bf16(3))
_dynamic.accepts("hifloat8, per tensor", dst_type=290, quant_mode="pertensor")
_dynamic.refuses("dtype int32", input=i32(3, 16))
_dynamic.refuses("rank 1", input=bf16(16))
_dynamic.refuses("quant_mode unknown", quant_mode="static")
_dynamic.refuses("dst_type int16", dst_type=2)
_dynamic.refuses("dst_type float4_e2m1", dst_type=296)
_dynamic.refuses("quint4x2 of 12 columns", input=bf16(3, 12), dst_type=16)
_dynamic.refuses("per channel, quint4x2", quant_mode="perchannel", dst_type=16)
_dynamic.refuses("dst_type_max", dst_type_max=15.0)
_dynamic.refuses("dst_type_max of float8", dst_type=24, dst_type_max=15.0)
_dynamic.refuses("dst_type_max beyond hifloat8", dst_type=290, dst_type_max=65536.0)
_dynamic.refuses("smooth scales of another size", smooth_scales=bf16(8))
_dynamic.refuses("smooth scales of two dimensions", smooth_scales=bf16(1, 16))
_dynamic.refuses("smooth scales int32", smooth_scales=i32(16))
_dynamic.refuses("groups without smooth scales", group_index=i32(4))
_dynamic.refuses("groups int64", smooth_scales=bf16(4, 16), group_index=i64(4))
_dynamic.refuses("groups of another number", smooth_scales=bf16(3, 16), group_index=i32(4))
_dynamic.refuses("groups per tensor", smooth_scales=bf16(4, 16), group_index=i32(4), quant_mode="pertensor")

_static = Grid("npu_quantize", input=bf16(3, 16), scales=f32(1), zero_points=None, dtype=1)
for _dtype in (0, 3, 12, 13, 14):
    _static.accepts(f"dtype {_dtype}", dtype=_dtype)
for _dtype in (23, 24):
    _static.accepts(f"float8 {_dtype}", dtype=_dtype, zero_points=i32(1))
for _dtype in (23, 24, 291, 292):
    _static.accepts(f"multiplied, float8 {_dtype}", dtype=_dtype, scales=bf16(16), div_mode=False)
_static.accepts("hifloat8", dtype=290)
_static.accepts("multiplied, hifloat8", dtype=290, div_mode=False)
_static.accepts("float8, strided", input=bf16(16, 3).t(), dtype=24)
_static.accepts("float16", input=f16(2, 3, 16), scales=f16(16), axis=2)
_static.accepts("float32, axis -1", input=f32(3, 16), scales=f32(16), axis=-1)
_static.accepts("axis 0", scales=f32(3), axis=0)
_static.accepts("zero points", zero_points=i32(1))
_static.accepts("multiplied", div_mode=False)
_static.accepts("multiplied, per column", scales=bf16(16), zero_points=bf16(16), div_mode=False)
_static.accepts("multiplied, axis -2", scales=f32(3, 1), axis=-2, div_mode=False)
_static.accepts("multiplied, quint4x2", dtype=16, div_mode=False)
_static.accepts("strided", input=bf16(16, 3).t())
_static.accepts("rank 1", input=bf16(16))
_static.refuses("dtype float64", input=f64(3, 16))
_static.refuses("rank 0", input=bf16())
_static.refuses("scales int8", scales=i8(1))
_static.refuses("scales of another size", scales=f32(4))
_static.refuses("scales of two dimensions", scales=f32(1, 16))
_static.refuses("zero points of another size", scales=f32(16), zero_points=i32(1))
_static.refuses("zero points int16", zero_points=i16(1))
_static.refuses("axis out of range", scales=f32(16), axis=2)
_static.refuses("result int16", dtype=2)
_static.refuses("result 292, divided", dtype=292)
_static.refuses("result 291, divided", dtype=291)
_static.refuses("result float4_e2m1", dtype=296)
_static.refuses("result quint4x2, divided", dtype=16)
_static.refuses("result uint8, multiplied", dtype=0, div_mode=False)
_static.refuses("quint4x2 of 12 columns", input=bf16(3, 12), dtype=16, div_mode=False)

_mx = Grid("npu_dynamic_mx_quant", input=bf16(3, 96))
for _dtype in (23, 24, 291, 292, 297):
    _mx.accepts(f"dst_type {_dtype}", dst_type=_dtype)
_mx.accepts("float16", input=f16(2, 3, 70), dst_type=24)
_mx.accepts("float32", input=f32(3, 64), dst_type=24)
_mx.accepts("rank 1", input=bf16(6))
_mx.accepts("strided", input=bf16(64, 3).t(), dst_type=24)
_mx.accepts("axis 0", axis=0)
_mx.accepts("axis 1 of 3", input=f16(2, 70, 6), axis=1, dst_type=24)
_mx.accepts("axis -2", axis=-2, dst_type=23)
_mx.accepts("blocks of 64", block_size=64)
_mx.accepts("blocks of 1024", block_size=1024, dst_type=24)
_mx.accepts("no rows", input=bf16(0, 64))
_mx.accepts("no columns", input=bf16(3, 0), dst_type=24)
_mx.accepts("scale_alg None", scale_alg=None)
_mx.accepts("nothing saturates", scale_alg=1, dst_type=24)
_mx.refuses("dtype int8", input=i8(3, 64))
_mx.refuses("rank 0", input=bf16())
_mx.refuses("rank 8", input=bf16(1, 1, 1, 1, 1, 1, 2, 64))
_mx.refuses("axis out of range", axis=2)
_mx.refuses("odd columns", input=bf16(3, 63))
_mx.refuses("dst_type int8", dst_type=1)
_mx.refuses("dst_type hifloat8", dst_type=290)
_mx.refuses("round_mode floor", round_mode="floor")
_mx.refuses("round_mode unknown", round_mode="nearest")
_mx.refuses("blocks of 16", block_size=16)
_mx.refuses("blocks of 2048", block_size=2048)
_mx.refuses("float32 in blocks of 64", input=f32(3, 64), block_size=64)
_mx.refuses("float32 of less than a block", input=f32(3, 16))
_mx.refuses("scale_alg 1 for 4 bits", scale_alg=1)
_mx.refuses("scale_alg 2", scale_alg=2)
_mx.refuses("scale_alg 3", scale_alg=3)
_mx.refuses("dst_type_max", scale_alg=2, dst_type_max=7.0)
_mx.refuses("max_low_bound", scale_alg=1, dst_type=24, max_low_bound=1.0)

_param = Grid("npu_trans_quant_param", scale=f32(8))
_param.accepts("one entry", scale=f32(1))
_param.accepts("two dimensions", scale=f32(1, 8))
_param.accepts("offset", offset=f32(8))
_param.accepts("one offset", offset=f32(1))
_param.accepts("one scale", scale=f32(1), offset=f32(8))
_param.accepts("offset of two dimensions", scale=f32(1, 8), offset=f32(1, 8))
_param.accepts("rounded", round_mode=1)
_param.accepts("round_mode None", round_mode=None)
_param.refuses("scale bfloat16", scale=bf16(8))
_param.refuses("scale of rank 0", scale=f32())
_param.refuses("scale of rank 3", scale=f32(1, 1, 8))
_param.refuses("scale of two rows", scale=f32(2, 8))
_param.refuses("no scale", scale=f32(0))
_param.refuses("offset int32", offset=i32(8))
_param.refuses("offset of another size", offset=f32(4))
_param.refuses("offset of another rank", offset=f32(1, 8))
_param.refuses("offset of one dimension", scale=f32(1, 8), offset=f32(8))
_param.refuses("round_mode 2", round_mode=2)

_bias = Grid("npu_dequant_bias", x=i32(3, 8), weight_scale=f32(8), activation_scale=f32(3), bias=None)
_bias.accepts("no activation_scale", activation_scale=None)
_bias.accepts("result float16", output_dtype=torch.float16)
_bias.accepts("result bfloat16", weight_scale=bf16(8), output_dtype=torch.bfloat16)
_bias.accepts("bias int32", bias=i32(8))
_bias.accepts("bias float32", bias=f32(8))
_bias.accepts("strided", x=i32(8, 3).t())
_bias.accepts("no rows", x=i32(0, 8), activation_scale=f32(0))
_bias.refuses("x int8", x=i8(3, 8))
_bias.refuses("x of rank 3", x=i32(1, 3, 8))
_bias.refuses("weight_scale float16", weight_scale=f16(8))
_bias.refuses("weight_scale of another size", weight_scale=f32(1))
_bias.refuses("activation_scale bfloat16", activation_scale=bf16(3))
_bias.refuses("activation_scale of another size", activation_scale=f32(8))
_bias.refuses("bias int8", bias=i8(8))
_bias.refuses("bias of another size", bias=i32(3))
_bias.refuses("result float32", output_dtype=torch.float32)
_bias.refuses("result of another scale", output_dtype=torch.bfloat16)

_matmul = Grid("npu_quant_matmul", x1=i8(3, 16), x2=i8(16, 8), scale=f32(1), output_dtype=15)
_matmul.accepts("result of the schema", output_dtype=None)
_matmul.accepts("result int8", output_dtype=1, offset=f32(8))
_matmul.accepts("result int8, packed scale", output_dtype=1, scale=i64(8))
_matmul.accepts("result int32", output_dtype=3, bias=i32(8))
_matmul.accepts("result float16", output_dtype=5, scale=i64(8))
_matmul.accepts("scale for each column", scale=f32(8))
_matmul.accepts("scale bfloat16", scale=bf16(8))
_matmul.accepts("scale for each row", pertoken_scale=f32(3))
_matmul.accepts("bias bfloat16", bias=bf16(8))
_matmul.accepts("bias float32", bias=f32(8))
_matmul.accepts("bias float16", output_dtype=5, pertoken_scale=f32(3), bias=f16(8))
_matmul.accepts("batches", x1=i8(2, 3, 16), x2=i8(2, 16, 8), bias=i32(2, 1, 8))
_matmul.accepts("broadcast batches", x1=i8(2, 1, 3, 16), x2=i8(4, 16, 8))
_matmul.accepts("x2 transposed", x2=i8(8, 16).t())
_matmul.accepts("no rows", x1=i8(0, 16))
_matmul.accepts("no batches", x1=i8(0, 3, 16))
_matmul.refuses("x1 float16", x1=f16(3, 16))
_matmul.refuses("x1 int32", x1=i32(3, 2), x2=i32(16, 1), scale=f32(8), output_dtype=5)
_matmul.refuses("x1 of rank 1", x1=i8(16))
_matmul.refuses("x1 of rank 7", x1=i8(1, 1, 1, 1, 1, 3, 16))
_matmul.refuses("x2 of other rows", x2=i8(8, 8))
_matmul.refuses("batches that do not fit", x1=i8(2, 3, 16), x2=i8(3, 16, 8))
_matmul.refuses("scale int32", scale=i32(1))
_matmul.refuses("scale of another size", scale=f32(4))
_matmul.refuses("scale of two dimensions", scale=f32(1, 8))
_matmul.refuses("scale bfloat16, result float16", scale=bf16(8), output_dtype=5)
_matmul.refuses("packed scale, result int32", scale=i64(8), output_dtype=3)
_matmul.refuses("packed scale, result bfloat16", scale=i64(8))
_matmul.refuses("offset float16", offset=f16(8), output_dtype=1)
_matmul.refuses("offset, result bfloat16", offset=f32(8))
_matmul.refuses("offset of another size", offset=f32(4), output_dtype=1)
_matmul.refuses("scale for other rows", pertoken_scale=f32(4))
_matmul.refuses("scale for each row, of two dimensions", pertoken_scale=f32(3, 1))
_matmul.refuses("scale for each row, result int8", pertoken_scale=f32(3), output_dtype=1)
_matmul.refuses("bias of another size", bias=i32(4))
_matmul.refuses("bias int8", bias=i8(8))
_matmul.refuses("bias of two dimensions", bias=i32(1, 8))
_matmul.refuses("bias float16 without rows", bias=f16(8), output_dtype=5)
_matmul.refuses("bias float32, result int32", bias=f32(8), output_dtype=3)
_matmul.refuses("bias bfloat16, result float16", bias=bf16(8), output_dtype=5)
_matmul.refuses("bias of other batches", x1=i8(2, 3, 16), bias=i32(3, 1, 8))
_matmul.refuses("result int64", output_dtype=4)
_matmul.refuses("result float32", output_dtype=6)
_matmul.refuses("x1_dtype", x1_dtype=290)
_matmul.refuses("groups", group_sizes=[0, 0, 0])
_matmul.refuses("y_scale", y_scale=i64(8))
_matmul.accepts("float8", x1=e4m3(3, 16), x2=e4m3(8, 16).t(), scale=f32(8), pertoken_scale=f32(3))
_FLOAT8 = {"x1": e4m3(3, 16), "x2": e4m3(16, 8)}
_matmul.accepts("float8, one scale for rows", scale=f32(8), pertoken_scale=f32(1), **_FLOAT8)
_matmul.accepts("float8, packed scale", scale=i64(8), bias=f32(8), output_dtype=5, **_FLOAT8)
_matmul.accepts("float8, result float32", output_dtype=6, **_FLOAT8)
_matmul.accepts("float8, batches", x1=e4m3(2, 1, 3, 16), x2=e4m3(4, 16, 8))
_matmul.accepts("float8, bias for batches", x1=e4m3(2, 3, 16), x2=e4m3(16, 8), bias=f32(2, 1, 8))
_matmul.refuses("float8_e5m2", x1=e5m2(3, 16), x2=e5m2(16, 8))
_matmul.refuses("float8 with 292", x1_dtype=292, x2_dtype=292, **_FLOAT8)
_matmul.refuses("float8 times int8", x1=e4m3(3, 16))
_matmul.refuses("float8, result int8", output_dtype=None, **_FLOAT8)
_matmul.refuses("float8, scale bfloat16", scale=bf16(8), **_FLOAT8)
_matmul.refuses("float8, packed scale and rows", scale=i64(8), pertoken_scale=f32(3), **_FLOAT8)
_matmul.refuses("float8, bias bfloat16", bias=bf16(8), **_FLOAT8)
_matmul.refuses("float8, bias int32", bias=i32(8), **_FLOAT8)
_matmul.refuses("float8, offset", offset=f32(8), **_FLOAT8)
_matmul.refuses(
    "float8 in blocks",
    x1=e4m3(3, 256),
    x2=e4m3(256, 128),
    scale=f32(2, 1),
    pertoken_scale=f32(3, 2),
    group_sizes=[1, 128, 128],
)
_HIF = {"x1_dtype": 290, "x2_dtype": 290}
_matmul.accepts("hifloat8", x1=u8(3, 16), x2=u8(8, 16).t(), scale=f32(8), pertoken_scale=f32(3), **_HIF)
_matmul.accepts("hifloat8, packed scale", x1=u8(3, 16), x2=u8(16, 8), scale=i64(1), bias=f32(8), **_HIF)
_matmul.accepts("hifloat8, result float32", x1=u8(3, 16), x2=u8(16, 8), output_dtype=6, **_HIF)
_matmul.refuses("uint8 without a number", x1=u8(3, 16), x2=u8(16, 8))
_matmul.refuses("hifloat8 in int8", x1=i8(3, 16), x2=i8(16, 8), **_HIF)
_matmul.refuses("hifloat8 of two bytes", x1=i16(3, 16), x2=i16(16, 8), **_HIF)

_MX = {"scale_dtype": 293, "pertoken_scale_dtype": 293, "group_sizes": [1, 1, 32]}
_mx_matmul = Grid(
    "npu_quant_matmul",
    label="mx",
    x1=e4m3(3, 192),
    x2=e4m3(8, 192).t(),
    scale=u8(8, 3, 2).transpose(0, 1),
    pertoken_scale=u8(3, 3, 2),
    output_dtype=15,
    **_MX,
)
_mx_matmul.accepts("mx, x2 not transposed", x2=e4m3(192, 8), scale=u8(3, 8, 2))
_mx_matmul.accepts("mx, e8m0", scale=e8m0(8, 3, 2).transpose(0, 1), pertoken_scale=e8m0(3, 3, 2))
_mx_matmul.accepts("mx, result float32", output_dtype=6, bias=f32(8))
_mx_matmul.accepts(
    "mx, batches",
    x1=e4m3(5, 3, 192),
    x2=e4m3(5, 8, 192).mT,
    scale=u8(5, 8, 3, 2).transpose(1, 2),
    pertoken_scale=u8(5, 3, 3, 2),
)
_mx_matmul.refuses("mx, no groups", group_sizes=None)
_mx_matmul.refuses("mx, groups of 64", group_sizes=[1, 1, 64])
_mx_matmul.refuses("mx, one number", scale_dtype=None)
_mx_matmul.refuses("mx, another number", scale_dtype=292)
_mx_matmul.refuses("mx, scale float32", scale=f32(3, 8, 2))
_mx_matmul.refuses("mx, scale in another order", scale=u8(3, 8, 2))
_mx_matmul.refuses("mx, scale not in pairs", scale=u8(6, 8), pertoken_scale=u8(3, 6))
_mx_matmul.refuses("mx, one pair for rows", pertoken_scale=u8(3, 1, 2))
_mx_matmul.refuses("mx, bias bfloat16", bias=bf16(8))
_mx_matmul.refuses("mx, bias of two dimensions", bias=f32(1, 8))
_mx_matmul.refuses("mx, result int8", output_dtype=1)
_FLOAT4 = {"x2": u8(8, 96).t(), "x2_dtype": 296}
_mx_matmul.accepts("mx, float4", bias=bf16(1, 8), **_FLOAT4)
_mx_matmul.accepts("mx, float4, result float16", output_dtype=5, bias=f16(1, 8), **_FLOAT4)
_mx_matmul.accepts("mx, float4, free groups", **{**_FLOAT4, "group_sizes": [0, 0, 32]})
_mx_matmul.refuses("mx, float4 not transposed", **{**_FLOAT4, "x2": u8(96, 8)})
_mx_matmul.refuses("mx, float4, result float32", output_dtype=6, **_FLOAT4)
_mx_matmul.refuses("mx, float4, bias of one dimension", bias=bf16(8), **_FLOAT4)
_mx_matmul.refuses("mx, float4, bias float32", bias=f32(1, 8), **_FLOAT4)
_mx_matmul.refuses("mx, float4, groups of 64", **{**_FLOAT4, "group_sizes": [1, 1, 64]})
_mx_matmul.refuses("mx, float4 of other rows", **{**_FLOAT4, "x2": u8(8, 80).t()})
_mx_matmul.refuses("mx, float4_e1m2", **{**_FLOAT4, "x2_dtype": 297})
_mx_matmul.refuses("mx, float4 times float4", x1=u8(3, 96), x1_dtype=296, **_FLOAT4)
_mx_matmul.refuses("mx, float4 in float32", x2=f32(8, 24).t())

_two_levels = Grid(
    "npu_quant_matmul",
    label="two levels",
    x1=e4m3(3, 96),
    x2=u8(8, 48).t(),
    scale=bf16(8, 3),
    y_scale=i64(1, 8),
    x2_dtype=296,
    group_sizes=[0, 0, 32],
    output_dtype=15,
)
_two_levels.accepts("two levels, result float16", scale=f16(8, 3), output_dtype=5)
_two_levels.accepts("two levels, whole groups", group_sizes=[1, 1, 32])
_two_levels.refuses("two levels, scale of another dtype", scale=bf16(8, 3), output_dtype=5)
_two_levels.refuses("two levels, scale transposed", scale=bf16(3, 8))
_two_levels.refuses("two levels, groups of 64", group_sizes=[0, 0, 64], scale=bf16(8, 2))
_two_levels.refuses("two levels, y_scale float32", y_scale=f32(1, 8))
_two_levels.refuses("two levels, y_scale of one dimension", y_scale=i64(8))
_two_levels.refuses("two levels, no y_scale", y_scale=None)
_two_levels.refuses("two levels, bias", bias=bf16(1, 8))
_two_levels.refuses("two levels, pertoken_scale", pertoken_scale=f32(3))

_weight = Grid("npu_weight_quant_batchmatmul", x=bf16(3, 16), weight=i8(16, 8), antiquant_scale=bf16(8))
_weight.accepts("float16", x=f16(3, 16), antiquant_scale=f16(1), bias=f16(8))
_weight.accepts("bias float32", bias=f32(1, 8))
_weight.accepts("offset", antiquant_offset=bf16(8))
_weight.accepts("groups", antiquant_scale=bf16(2, 8), antiquant_group_size=8)
_weight.accepts("int4", weight=i32(16, 1))
_weight.accepts("int4 transposed", weight=i32(8, 2).t())
_weight.accepts("result int8", quant_scale=f32(8), quant_offset=f32(8))
_weight.accepts("result int8, packed scale", quant_scale=i64(1, 8))
_weight.accepts("no rows", x=bf16(0, 16))
_weight.accepts("fast", inner_precise=1)
_weight.refuses("x float32", x=f32(3, 16), antiquant_scale=f32(8))
_weight.refuses("x of rank 3", x=bf16(1, 3, 16))
_weight.refuses("weight uint8", weight=u8(16, 8))
_weight.refuses("weight of other rows", weight=i8(8, 8))
_weight.refuses("antiquant_scale of another dtype", antiquant_scale=f16(8))
_weight.refuses("antiquant_scale of another size", antiquant_scale=bf16(4))
_weight.refuses("several rows without groups", antiquant_scale=bf16(2, 8))
_weight.refuses("offset of another shape", antiquant_offset=bf16(1))
_weight.refuses("bias of another dtype", bias=bf16(8))
_weight.refuses("bias of another size", bias=f32(4))
_weight.refuses("quant_scale float16", quant_scale=f16(8))
_weight.refuses("quant_scale of another size", quant_scale=f32(4))
_weight.refuses("quant_offset alone", quant_offset=f32(8))
_weight.refuses("quant_offset with a packed scale", quant_scale=i64(8), quant_offset=f32(8))
_weight.refuses("inner_precise 2", inner_precise=2)
_weight.refuses("weight_dtype", weight_dtype=285)
_weight.refuses("negative groups", antiquant_group_size=-1)
_weight.accepts("float8", weight=e4m3(8, 16).t(), bias=bf16(8))
_weight.accepts("hifloat8", weight=u8(16, 8), weight_dtype=290, antiquant_scale=bf16(1, 8))
_weight.refuses("float8, one scale", weight=e4m3(16, 8), antiquant_scale=bf16(1))
_weight.refuses("float8, groups", weight=e4m3(16, 8), antiquant_scale=bf16(2, 8), antiquant_group_size=8)
_weight.refuses("float8, offset", weight=e4m3(16, 8), antiquant_offset=bf16(8))
_weight.refuses("float8, bias float32", weight=e4m3(16, 8), bias=f32(8))
_weight.refuses("float8, result int8", weight=e4m3(16, 8), quant_scale=f32(8))
_weight.refuses("float8_e5m2", weight=e5m2(16, 8))
_weight.refuses("int4 in uint8", weight=u8(16, 4), weight_dtype=285)

_weight4 = Grid(
    "npu_weight_quant_batchmatmul",
    label="float4",
    x=bf16(3, 96),
    weight=u8(96, 4),
    antiquant_scale=bf16(3, 8),
    antiquant_group_size=32,
    weight_dtype=296,
)
_weight4.accepts("float4_e1m2", weight_dtype=297, bias=bf16(1, 8))
_weight4.accepts("float4, transposed", weight=u8(8, 48).t(), antiquant_scale=bf16(8, 3).t())
_weight4.accepts("float4, groups of 64", antiquant_scale=bf16(2, 8), antiquant_group_size=64)
_weight4.accepts("float4, powers of two", antiquant_scale=e8m0(3, 8))
_weight4.accepts("float4 in float32", weight=f32(96, 2), weight_dtype=None, antiquant_scale=bf16(3, 16))
_weight4.accepts("mxfp4 in float32", weight=f32(96, 2), weight_dtype=None, antiquant_scale=u8(3, 16))
_weight4.accepts(
    "mxfp4 in float32, transposed",
    weight=f32(8, 12).t(),
    weight_dtype=None,
    antiquant_scale=u8(8, 3).t(),
)
_weight4.refuses("float4, one scale for each column", antiquant_scale=bf16(8), antiquant_group_size=0)
_weight4.refuses("float4, groups of 16", antiquant_scale=bf16(6, 8), antiquant_group_size=16)
_weight4.refuses("float4, one group", antiquant_scale=bf16(1, 8), antiquant_group_size=96)
_weight4.refuses("float4, scale in another order", weight=u8(8, 48).t())
_weight4.refuses("float4, offset", antiquant_offset=bf16(3, 8))
_weight4.refuses("float4_e1m2, powers of two", weight_dtype=297, antiquant_scale=u8(3, 8))

_conv = Grid(
    "npu_quant_conv2d",
    input=i8(2, 4, 9, 7),
    weight=i8(6, 4, 3, 2),
    scale=i64(6),
    strides=[1, 1],
    pads=[0, 0],
    dilations=[1, 1],
    output_dtype=5,
)
_CONV8 = {"input": e4m3(2, 4, 9, 7), "weight": e4m3(6, 4, 3, 2)}
_CONV_HIF = {"input": u8(2, 4, 9, 7), "weight": u8(6, 4, 3, 2), "input_dtype": 290, "weight_dtype": 290}
_conv.accepts("bias int32", bias=i32(6))
_conv.accepts("strides, pads and dilations", strides=[2, 1], pads=[1, 3], dilations=[1, 2])
_conv.accepts("groups", weight=i8(6, 2, 3, 2), groups=2)
_conv.accepts("no images", input=i8(0, 4, 9, 7))
_conv.accepts("channels last", input=i8(2, 9, 7, 4).permute(0, 3, 1, 2))
for _dtype in (5, 6, 15):
    _conv.accepts(f"float8, result {_dtype}", bias=f32(6), **{**_CONV8, "output_dtype": _dtype})
    _conv.accepts(f"hifloat8, result {_dtype}", bias=f32(6), **{**_CONV_HIF, "output_dtype": _dtype})
_conv.accepts("result hifloat8", round_mode="round", **{**_CONV_HIF, "output_dtype": 290})
_conv.refuses("dtype float16", input=f16(2, 4, 9, 7), weight=f16(6, 4, 3, 2))
_conv.refuses("weight of another dtype", weight=e4m3(6, 4, 3, 2))
_conv.refuses("uint8 without a number", input=u8(2, 4, 9, 7), weight=u8(6, 4, 3, 2))
_conv.refuses("one number", **{**_CONV_HIF, "weight_dtype": None})
_conv.refuses("hifloat8 in int8", input_dtype=290, weight_dtype=290)
_conv.refuses("float8 with 292", input_dtype=292, weight_dtype=292, **_CONV8)
_conv.refuses("input of rank 3", input=i8(4, 9, 7))
_conv.refuses("other channels", weight=i8(6, 3, 3, 2))
_conv.refuses("outputs that groups do not divide", weight=i8(5, 2, 3, 2), scale=i64(5), groups=2)
_conv.refuses("input too small", input=i8(2, 4, 2, 7))
_conv.refuses("scale float32", scale=f32(6))
_conv.refuses("scale of another size", scale=i64(1))
_conv.refuses("scale of two dimensions", scale=i64(1, 6))
_conv.refuses("bias float32 of int8", bias=f32(6))
_conv.refuses("bias int32 of float8", bias=i32(6), **_CONV8)
_conv.refuses("bias of another size", bias=i32(1))
_conv.refuses("offset", offset=f32(6))
_conv.refuses("offset_x", offset_x=1)
_conv.refuses("offset_x too large", offset_x=128)
_conv.refuses("round_mode round", round_mode="round")
_conv.refuses("round_mode rint of hifloat8", **{**_CONV_HIF, "output_dtype": 290})
_conv.refuses("no result", output_dtype=None)
_conv.refuses("result bfloat16 of int8", output_dtype=15)
_conv.refuses("result float8", **{**_CONV8, "output_dtype": 24})
_conv.refuses("strides of 0", strides=[0, 1])
_conv.refuses("strides of 64", strides=[64, 1])
_conv.refuses("three strides", strides=[1, 1, 1])
_conv.refuses("negative pads", pads=[0, -1])
_conv.refuses("pads of 256", pads=[256, 0])
_conv.refuses("dilations of 0", dilations=[1, 0])
_conv.refuses("dilations of 256", input=i8(2, 4, 999, 7), dilations=[256, 1])
_conv.refuses("no groups", groups=0)
_conv.refuses("kernel of 512", input=i8(2, 4, 999, 7), weight=i8(6, 4, 512, 2))

_batch = Grid("npu_transpose_batchmatmul", input=bf16(4, 3, 16), weight=bf16(4, 16, 8))
_batch.accepts("float16", input=f16(4, 3, 16), weight=f16(4, 16, 8))
_batch.accepts("float32", input=f32(4, 3, 16), weight=f32(4, 16, 8))
_batch.accepts("tokens first", input=bf16(3, 4, 16), perm_x1=[1, 0, 2], perm_x2=[0, 1, 2], perm_y=[1, 0, 2])
_batch.accepts("weight transposed", weight=bf16(4, 8, 16), perm_x2=[0, 2, 1])
_batch.accepts("two results", batch_split_factor=2)
_batch.accepts("split of None", batch_split_factor=None)
_batch.accepts("scale", input=f16(4, 3, 16), weight=f16(4, 16, 8), scale=i64(32))
_batch.accepts("no rows", input=bf16(4, 0, 16))
_batch.refuses("dtype int8", input=i8(4, 3, 16), weight=i8(4, 16, 8))
_batch.refuses("weight of another dtype", weight=f16(4, 16, 8))
_batch.refuses("weight bool", weight=boolean(4, 16, 8))
_batch.refuses("input of rank 2", input=bf16(3, 16))
_batch.refuses("weight of other batches", weight=bf16(3, 16, 8))
_batch.refuses("weight of other rows", weight=bf16(4, 8, 8))
_batch.refuses("bias", bias=bf16(8))
_batch.refuses("perm_x1", perm_x1=[2, 0, 1])
_batch.refuses("perm_x2", perm_x2=[1, 0, 2])
_batch.refuses("perm_y", perm_y=[0, 1, 2])
_batch.refuses("split of 3", batch_split_factor=3)
_batch.refuses("split of 0", batch_split_factor=0)
_batch.refuses("scale of another size", input=f16(4, 3, 16), weight=f16(4, 16, 8), scale=i64(8))
_batch.refuses("scale float32", input=f16(4, 3, 16), weight=f16(4, 16, 8), scale=f32(32))
_batch.refuses("scale of bfloat16", scale=i64(32))
_batch.refuses(
    "scale and split", input=f16(4, 3, 16), weight=f16(4, 16, 8), scale=i64(32), batch_split_factor=2
)

CASES: list[Case] = [
    *_dynamic.cases,
    *_static.cases,
    *_mx.cases,
    *_param.cases,
    *_bias.cases,
    *_matmul.cases,
    *_mx_matmul.cases,
    *_two_levels.cases,
    *_weight.cases,
    *_weight4.cases,
    *_conv.cases,
    *_batch.cases,
]
