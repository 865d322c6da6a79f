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
        ("npu_dynamic_quant", "npu_dynamic_quant_asymmetric"),
        "8-bit floats",
        ("dst_type float8_e5m2", "dst_type float8_e4m3fn", "dst_type hifloat8", "dst_type_max"),
    ),
    NotComputed(
        ("npu_quantize",),
        "8-bit floats",
        ("result float8_e4m3fn", "result float8_e5m2", "result hifloat8"),
    ),
    NotComputed(("npu_quant_matmul",), "int4 operands, scales of groups", ("x1 int32", "groups", "y_scale")),
    NotComputed(("npu_weight_quant_batchmatmul",), "int4 in uint8", ("weight uint8", "weight_dtype")),
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
)

KEEPS_ORDER = (
    "npu_rms_norm",
    "npu_add_rms_norm",
    "npu_add_rms_norm_cast",
    "npu_dynamic_quant",
    "npu_dynamic_quant_asymmetric",
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

FIXED_SIZES = {
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
"""Sizes that the fakes turn into numbers: the order of the device's memory, and what decides a rank."""
