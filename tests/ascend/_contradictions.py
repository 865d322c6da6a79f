"""Where the fakes of this package and the Meta kernels of torch_npu 2.13.0 do not agree, and why.

Everything in the grid that is named nowhere here is agreed upon: accepted by both with equal results, or
refused by both. An entry that is no longer true fails the tests.

A Meta kernel computes shapes for a compiler; what it does not check is refused later, by the eager operator
or by the device. The fakes refuse it at once, so that a wrong rewrite fails while it is made.
"""

from __future__ import annotations

from dataclasses import dataclass

_MLA_V2 = ("npu_mla_prolog", "npu_mla_prolog_v2")
_MLA_V3 = ("npu_mla_prolog_v3", "npu_mla_prolog_v3_functional")
_KV = ("npu_kv_rmsnorm_rope_cache", "npu_kv_rmsnorm_rope_cache_v2", "npu_kv_rmsnorm_rope_cache_v2_functional")


@dataclass(frozen=True)
class Laxer:
    """The Meta kernels of ``operators`` accept whatever the fakes refuse but the calls in ``refused``."""

    operators: tuple[str, ...]
    reason: str
    refused: tuple[str, ...] = ()


LAXER = (
    Laxer(
        (
            "npu_rms_norm",
            "npu_add_rms_norm",
            "npu_add_rms_norm_cast",
            "npu_dequant_swiglu_quant",
            "npu_swiglu_quant",
            "npu_grouped_matmul_swiglu_quant",
            "npu_weight_quant_batchmatmul",
            "npu_rotary_mul",
            "npu_interleave_rope",
            "npu_scatter_pa_kv_cache",
            "npu_scatter_pa_kv_cache_functional",
            "npu_scatter_nd_update",
            "npu_scatter_nd_update_",
            "scatter_update",
            "scatter_update_",
        ),
        "nothing is checked: neither dtypes nor shapes nor modes",
    ),
    Laxer(("npu_add_rms_norm_quant",), "only the axis is checked", ("axis",)),
    Laxer(
        ("npu_add_rms_norm_dynamic_quant",),
        "only the mask and that y_dtype is a dtype are checked",
        ("mask of none", "y_dtype unknown"),
    ),
    Laxer(
        ("npu_swiglu",),
        "an odd size is rounded down; an index error of Python refuses a dim out of range",
        ("rank 0", "dim out of range"),
    ),
    Laxer(
        ("npu_dynamic_quant", "npu_dynamic_quant_asymmetric", "npu_quantize"),
        "only that int4 values fill an int32 is checked; an unknown dtype means int8",
        ("quint4x2 of 12 columns",),
    ),
    Laxer(
        ("npu_dynamic_mx_quant",),
        "what decides the shapes is checked, and that scale_alg is one; an unknown dtype means 4 bits",
        ("rank 0", "axis out of range", "odd columns", "blocks of 16", "blocks of 2048", "scale_alg 3"),
    ),
    Laxer(
        ("npu_trans_quant_param",),
        "no dtype is checked, and of offset beside one dimension only the first size",
        (
            "scale of rank 0",
            "scale of rank 3",
            "scale of two rows",
            "offset of another size",
            "offset of one dimension",
            "round_mode 2",
        ),
    ),
    Laxer(("npu_dequant_bias",), "only the dtype of the result is checked", ("result float32",)),
    Laxer(
        ("npu_quant_matmul",),
        "shapes are checked, but the rows of pertoken_scale; of dtypes, those of bias and offset",
        (
            "x1 of rank 1",
            "x1 of rank 7",
            "x2 of other rows",
            "batches that do not fit",
            "scale of another size",
            "scale of two dimensions",
            "scale bfloat16, result float16",
            "packed scale, result int32",
            "offset float16",
            "offset of another size",
            "scale for each row, of two dimensions",
            "bias of another size",
            "bias int8",
            "bias of two dimensions",
            "bias float16 without rows",
            "bias float32, result int32",
            "bias bfloat16, result float16",
            "bias of other batches",
            "result int64",
            "float8 with 292",
            "hifloat8 of two bytes",
            "mx, no groups",
            "mx, groups of 64",
            "mx, one number",
            "mx, another number",
            "mx, scale float32",
            "mx, scale not in pairs",
            "mx, one pair for rows",
            "mx, bias of two dimensions",
            "mx, float4, bias of one dimension",
            "mx, float4, groups of 64",
            "mx, float4 of other rows",
            "mx, float4_e1m2",
            "two levels, scale of another dtype",
            "two levels, groups of 64",
            "two levels, y_scale float32",
        ),
    ),
    Laxer(
        ("npu_quant_conv2d",),
        "of the attributes only their number and sign is checked, not what the device takes",
        (
            "dtype float16",
            "weight of another dtype",
            "uint8 without a number",
            "one number",
            "float8 with 292",
            "input of rank 3",
            "other channels",
            "outputs that groups do not divide",
            "input too small",
            "scale float32",
            "scale of another size",
            "scale of two dimensions",
            "bias float32 of int8",
            "bias int32 of float8",
            "bias of another size",
            "offset_x too large",
            "no result",
            "result bfloat16 of int8",
            "result float8",
            "strides of 0",
            "three strides",
            "negative pads",
            "dilations of 0",
            "no groups",
        ),
    ),
    Laxer(
        ("npu_transpose_batchmatmul",),
        "only dtypes, permutations and that there is no bias are checked; no shape is",
        ("dtype int8", "weight bool", "bias", "perm_x1", "perm_x2", "perm_y"),
    ),
    Laxer(
        _KV,
        "only three ranks, and v against kv, are checked",
        ("kv of rank 3", "gamma of two dimensions", "cos of rank 3", "v of another dtype"),
    ),
    Laxer(
        _MLA_V2,
        "only three ranks are checked",
        ("token_x of rank 1", "weight_uk of rank 2", "rope_sin of rank 4"),
    ),
    Laxer(
        _MLA_V3,
        "only three ranks, and the scales of mxfp8, are checked",
        (
            "token_x of rank 1",
            "weight_uk of rank 2",
            "rope_sin of rank 4",
            "rope_sin of rank 3 for rows",
            "mxfp8, scale float32",
            "mxfp8, no scale",
        ),
    ),
)


@dataclass(frozen=True)
class NotComputed:
    """Calls that a device computes and no CPU kernel of this package does: only the fakes refuse them."""

    operators: tuple[str, ...]
    what: str
    labels: tuple[str, ...]


NOT_COMPUTED = (
    NotComputed(
        ("npu_dequant_swiglu_quant",),
        "results without a dtype in PyTorch",
        ("dst_type hifloat8", "dst_type float4"),
    ),
    NotComputed(
        ("npu_dynamic_mx_quant",),
        "other roundings, and scales by a given maximum",
        ("round_mode floor", "scale_alg 2", "dst_type_max", "max_low_bound"),
    ),
    NotComputed(
        ("npu_quant_matmul",),
        "int4 and float8_e5m2, pairs of float4 and float4 in float32, one scale for 128 by 128",
        (
            "x1 int32",
            "groups",
            "float8_e5m2",
            "float8 in blocks",
            "mx, float4 times float4",
            "mx, float4 in float32",
        ),
    ),
    NotComputed(("npu_weight_quant_batchmatmul",), "int4 in uint8", ("int4 in uint8",)),
    NotComputed(("npu_quant_conv2d",), "padding by another number than zero", ("offset_x",)),
    NotComputed(("npu_grouped_matmul_swiglu_quant",), "int4 weights", ("weight int32", "bias")),
    NotComputed(
        ("npu_scatter_pa_kv_cache", "npu_scatter_pa_kv_cache_functional"),
        "compressed caches",
        ("compressed",),
    ),
    NotComputed(_KV, "keys and values apart", ("v",)),
    NotComputed(_KV[1:], "caches without a dtype in PyTorch", ("k_cache_dtype", "ckv_cache_dtype")),
    NotComputed(_MLA_V3, "all operands 8-bit floats", ("weight_quant_mode 4", "token_x_dtype")),
)


@dataclass(frozen=True)
class Differs:
    """Calls that the fakes accept and the Meta kernels refuse, or answer otherwise."""

    operators: tuple[str, ...]
    labels: tuple[str, ...]
    refused: bool
    reason: str


DIFFERS = (
    Differs(
        ("npu_transpose_batchmatmul",),
        ("split of None",),
        True,
        "the schema allows None; the Meta kernel compares it with a number",
    ),
    Differs(
        ("npu_trans_quant_param",),
        ("round_mode None",),
        True,
        "the schema allows None, and the eager operator reads it as 0; the Meta kernel takes 0 and 1 alone",
    ),
    Differs(
        ("npu_dynamic_mx_quant",),
        ("scale_alg None",),
        True,
        "the schema allows None, and the eager operator reads it as 0; the Meta kernel takes 0 to 2 alone",
    ),
    Differs(
        ("npu_quant_matmul",),
        ("no batches",),
        False,
        "of two sizes that are broadcast the Meta kernel takes the larger: of 0 and 1, 1",
    ),
    Differs(
        ("npu_swiglu_quant",),
        ("quint4x2",),
        False,
        "the eager operator gives int8 with two values in a byte; the Meta kernel says quint4x2, unpacked",
    ),
    Differs(
        ("npu_mla_prolog_v2", *_MLA_V3),
        ("float16", "float32"),
        False,
        "devices compute in bfloat16 alone, and the Meta kernel says so whatever the inputs are; the CPU "
        "kernels take float16 and float32 for models that run on the CPU",
    ),
)


@dataclass(frozen=True)
class Specializes:
    """Calls whose symbolic sizes the Meta kernels turn into numbers, so that another size compiles again."""

    operators: tuple[str, ...]
    labels: tuple[str, ...]
    reason: str


SPECIALIZES = (
    Specializes(
        _MLA_V3,
        ("mxfp8, norm returned", "mxfp8, float8 cache, norm returned"),
        "a thirty-second of a size is taken by int()",
    ),
    Specializes(
        ("npu_dynamic_mx_quant",),
        (
            "base",
            "dst_type 23",
            "dst_type 24",
            "dst_type 291",
            "dst_type 292",
            "dst_type 297",
            "float16",
            "float32",
            "rank 1",
            "strided",
            "axis 0",
            "axis 1 of 3",
            "axis -2",
            "blocks of 64",
            "blocks of 1024",
            "no rows",
            "nothing saturates",
        ),
        "the number of blocks is taken by int()",
    ),
)

KEEPS_ORDER = (
    "npu_rms_norm",
    "npu_add_rms_norm",
    "npu_add_rms_norm_cast",
    "npu_dynamic_quant",
    "npu_dynamic_quant_asymmetric",
    "npu_dynamic_mx_quant",
    "npu_quantize",
    "npu_dequant_bias",
    "npu_interleave_rope",
    "npu_kv_rmsnorm_rope_cache",
    "npu_kv_rmsnorm_rope_cache_v2_functional",
    "npu_scatter_pa_kv_cache_functional",
    "npu_scatter_nd_update",
    "scatter_update",
)
"""Operators whose Meta kernels promise results in the order of memory of a permuted input (``empty_like``);
results are contiguous here, and what the device gives is not documented."""

_PAIRS_OF_BLOCKS = (
    "mx",
    "mx, x2 not transposed",
    "mx, e8m0",
    "mx, result float32",
    "mx, batches",
    "mx, float4",
    "mx, float4, result float16",
    "mx, float4, free groups",
)

FIXED_SIZES = {
    **{("npu_quant_matmul", label): {2} for label in _PAIRS_OF_BLOCKS},
    ("npu_grouped_matmul_swiglu_quant", "weight in NZ order"): {16, 32},
    ("npu_scatter_pa_kv_cache", "PA_NZ"): {16},
    ("npu_scatter_pa_kv_cache_functional", "PA_NZ"): {16},
    ("npu_scatter_nd_update", "two coordinates"): {2},
    ("npu_scatter_nd_update_", "two coordinates"): {2},
    ("npu_scatter_nd_update", "all coordinates"): {3},
    ("npu_scatter_nd_update_", "all coordinates"): {3},
    ("scatter_update", "batch and offset"): {2},
    ("scatter_update_", "batch and offset"): {2},
}
"""Sizes that the fakes turn into numbers: the order of the device's memory, a pair of blocks, and what
decides a rank."""
