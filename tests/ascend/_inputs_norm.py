"""RMSNorm and what is fused with it."""

from __future__ import annotations

import torch

from tests.ascend._inputs import Case, Grid, bf16, f16, f32, f64, i8, i32

_rms = Grid("npu_rms_norm", input=bf16(3, 5, 8), gamma=bf16(8))
_rms.accepts("float16", input=f16(3, 8), gamma=f16(8))
_rms.accepts("float32", input=f32(3, 8), gamma=f32(8))
_rms.accepts("gamma float32", gamma=f32(8))
_rms.accepts("gamma of two dimensions", gamma=bf16(5, 8))
_rms.accepts("gamma of all dimensions", gamma=bf16(3, 5, 8))
_rms.accepts("rank 1", input=bf16(8))
_rms.accepts("rank 8", input=bf16(1, 2, 1, 2, 1, 2, 1, 8))
_rms.accepts("no rows", input=bf16(0, 8))
_rms.accepts("strided", input=bf16(8, 3).t())
_rms.accepts("epsilon", epsilon=1e-5)
_rms.refuses("dtype float64", input=f64(3, 8), gamma=f64(8))
_rms.refuses("gamma of another dtype", gamma=f16(8))
_rms.refuses("rank 9", input=bf16(1, 1, 1, 1, 1, 1, 1, 1, 8))
_rms.refuses("gamma of another size", gamma=bf16(7))
_rms.refuses("gamma of a higher rank", input=bf16(8), gamma=bf16(1, 8))
_rms.refuses("nothing to normalize", input=bf16(3, 0), gamma=bf16(0))

_add = Grid("npu_add_rms_norm", "npu_add_rms_norm_cast", x1=bf16(3, 5, 8), x2=bf16(3, 5, 8), gamma=bf16(8))
_add.accepts("float16", x1=f16(3, 8), x2=f16(3, 8), gamma=f16(8))
_add.accepts("float32", x1=f32(3, 8), x2=f32(3, 8), gamma=f32(8))
_add.accepts("gamma of two dimensions", gamma=bf16(5, 8))
_add.accepts("strided", x1=bf16(8, 3).t(), x2=bf16(8, 3).t())
_add.accepts("no rows", x1=bf16(0, 8), x2=bf16(0, 8))
_add.refuses("dtype int32", x1=i32(3, 8), x2=i32(3, 8), gamma=i32(8))
_add.refuses("x2 of another dtype", x2=f32(3, 5, 8))
_add.refuses("x2 of another shape", x2=bf16(5, 8))
_add.refuses("gamma of another dtype", gamma=f32(8))
_add.refuses("gamma of another size", gamma=bf16(7))

_quant = Grid(
    "npu_add_rms_norm_quant",
    x1=bf16(3, 8),
    x2=bf16(3, 8),
    gamma=bf16(8),
    scales1=bf16(8),
    zero_points1=bf16(8),
)
_quant.accepts("no zero point", zero_points1=None)
_quant.accepts("float16", x1=f16(3, 8), x2=f16(3, 8), gamma=f16(8), scales1=f32(8), zero_points1=i32(8))
_quant.accepts("float32", x1=f32(3, 8), x2=f32(3, 8), gamma=f32(8), scales1=f32(8), zero_points1=f32(8))
_quant.accepts("beta", beta=bf16(8))
_quant.accepts("two results", scales2=bf16(8), zero_points2=bf16(8))
_quant.accepts("multiplied", div_mode=False)
_quant.accepts("dst_type int8", dst_type=1)
_quant.accepts("rank 3", x1=bf16(2, 3, 8), x2=bf16(2, 3, 8))
_quant.refuses("axis", axis=0)
_quant.refuses("dst_type int16", dst_type=2)
_quant.refuses("dtype int8", x1=i8(3, 8), x2=i8(3, 8), gamma=i8(8))
_quant.refuses("x2 of another shape", x2=bf16(1, 8))
_quant.refuses("gamma of another size", gamma=bf16(4))
_quant.refuses("beta of another dtype", beta=f32(8))
_quant.refuses("beta of another shape", beta=bf16(1, 8))
_quant.refuses("scales1 int8", scales1=i8(8))
_quant.refuses("scales1 of another size", scales1=bf16(1))
_quant.refuses("scales2 of another dtype", scales2=f32(8))
_quant.refuses("zero_points1 int8", zero_points1=i8(8))
_quant.refuses("zero_points2 of another dtype", scales2=bf16(8), zero_points2=i32(8))
_quant.refuses("zero_points2 alone", zero_points2=bf16(8))

_dynamic = Grid("npu_add_rms_norm_dynamic_quant", x1=bf16(3, 8), x2=bf16(3, 8), gamma=bf16(8))
_dynamic.accepts("float16", x1=f16(3, 8), x2=f16(3, 8), gamma=f16(8))
_dynamic.accepts("rank 4", x1=bf16(2, 1, 3, 8), x2=bf16(2, 1, 3, 8))
_dynamic.accepts("one smooth scale", smooth_scale1=bf16(8))
_dynamic.accepts("two smooth scales", smooth_scale1=bf16(8), smooth_scale2=bf16(8), beta=bf16(8))
_dynamic.accepts("mask of both", output_mask=[True, True])
_dynamic.accepts("mask of the first", output_mask=[True, False])
_dynamic.accepts("mask of the second", output_mask=[False, True], smooth_scale2=bf16(8))
_dynamic.accepts("y_dtype int8", y_dtype=1)
_dynamic.accepts("y_dtype quint4x2", y_dtype=16)
_dynamic.accepts("no rows", x1=bf16(0, 8), x2=bf16(0, 8))
_dynamic.refuses("mask of none", output_mask=[False, False])
_dynamic.refuses("masked out, but smooth", output_mask=[False, True], smooth_scale1=bf16(8))
_dynamic.refuses("second smooth scale alone", smooth_scale2=bf16(8))
_dynamic.refuses("y_dtype int16", y_dtype=2)
_dynamic.refuses("y_dtype unknown", y_dtype=999)
_dynamic.refuses("quint4x2 of 12 columns", x1=bf16(3, 12), x2=bf16(3, 12), gamma=bf16(12), y_dtype=16)
_dynamic.refuses("dtype float32", x1=f32(3, 8), x2=f32(3, 8), gamma=f32(8))
_dynamic.refuses("rank 1", x1=bf16(8), x2=bf16(8))
_dynamic.refuses("gamma of two dimensions", gamma=bf16(3, 8))
_dynamic.refuses("x2 of another shape", x2=bf16(2, 8))
_dynamic.refuses("beta of another size", beta=bf16(4))
_dynamic.refuses("smooth scale float32", smooth_scale1=torch.empty(8, device="meta"))

CASES: list[Case] = [*_rms.cases, *_add.cases, *_quant.cases, *_dynamic.cases]
