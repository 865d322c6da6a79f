"""What each release of torch_npu has, for a target that is chosen by hand: numbers and names only.

Everything that is not listed here is in every release, 7.0 included. Nothing was removed from one release to
the next; arguments were added, some between others (``beta`` of npu_add_rms_norm_quant stands where
``scales2`` stood): passes give optional arguments by keyword.

A release is not told by the name of a wheel (2.7.1.post2 is 7.3, 2.9.0 too, and not every wheel is in a
published table). Where torch_npu is installed, its schemas say what it has, see :mod:`npu_fusion.targets`.

Source: ``op_plugin/config/op_plugin_functions.yaml`` in the branches 7.0.0 to 26.1.0 of op-plugin, each as it
was in August 2026; the products that the documentation of npu_mla_prolog_v3 lists there; the
kernels of npu_mla_prolog, _v2 (``IsAclnnOnly``) and npu_dequant_swiglu_quant; ``SocVersion``, which has
Ascend950 since 26.0. The wheel of torch_npu 2.13.0 has the operators of 26.1.
"""

from __future__ import annotations

RELEASES = ("7.0", "7.1", "7.2", "7.3", "26.0", "26.1")

SOCS = {"ascend910b": "7.0", "ascend910_93": "7.0", "ascend950": "26.0"}
"""SoC family -> the first release for it."""


def reaches(release: str, since: str) -> bool:
    """Is ``release`` the release ``since`` or a later one?"""
    return RELEASES.index(release) >= RELEASES.index(since)


TARGETS = tuple(
    name
    for soc, first in SOCS.items()
    for name in (soc, *(f"{soc}-{release}" for release in RELEASES if reaches(release, first)))
)
"""The names that ``FusionConfig.target`` takes; a SoC alone means the latest release."""

OPERATORS = {
    "npu_add_rms_norm_dynamic_quant": "7.2",
    "npu_add_rms_norm_quant": "7.1",
    "npu_dynamic_mx_quant": "26.0",
    "npu_grouped_matmul_swiglu_quant": "7.1",
    "npu_kv_rmsnorm_rope_cache_v2": "7.2",
    "npu_kv_rmsnorm_rope_cache_v2_functional": "7.2",
    "npu_mla_prolog_v2": "7.1",
    "npu_mla_prolog_v3": "7.3",
    "npu_mla_prolog_v3_functional": "7.3",
    "npu_scatter_pa_kv_cache": "7.2",
    "npu_scatter_pa_kv_cache_functional": "7.2",
    "npu_swiglu_quant": "7.2",
    "npu_transpose_batchmatmul": "7.1",
}
"""Operator -> the first release that has it."""

_GPT_OSS = dict.fromkeys(("swiglu_mode", "clamp_limit", "glu_alpha", "glu_bias"), "7.2")
_DYNAMIC = {"quant_mode": "26.0", "dst_type_max": "26.0"}
_CACHE = {"v": "7.3", "k_cache_dtype": "26.0", "ckv_cache_dtype": "26.0"}
_PROLOG = dict.fromkeys(
    ("token_x_dtype", "weight_dq_dtype", "weight_uq_qr_dtype", "weight_dkv_kr_dtype", "kv_cache_dtype"),
    "26.1",
)
_MATMUL = dict.fromkeys(("x1_dtype", "x2_dtype", "pertoken_scale_dtype", "scale_dtype", "y_scale"), "26.0")

ARGUMENTS: dict[str, dict[str, str]] = {
    "npu_add_rms_norm_dynamic_quant": {"y_dtype": "26.0"},
    "npu_add_rms_norm_quant": {"beta": "7.2", "dst_type": "26.0"},
    "npu_dequant_swiglu_quant": {
        **_GPT_OSS,
        "dst_type": "26.0",
        "round_mode": "26.0",
        "activate_dim": "26.0",
    },
    "npu_dynamic_quant": _DYNAMIC,
    "npu_dynamic_quant_asymmetric": _DYNAMIC,
    "npu_kv_rmsnorm_rope_cache": {"v": "7.3"},
    "npu_kv_rmsnorm_rope_cache_v2": _CACHE,
    "npu_kv_rmsnorm_rope_cache_v2_functional": _CACHE,
    "npu_mla_prolog_v3": _PROLOG,
    "npu_mla_prolog_v3_functional": _PROLOG,
    "npu_quant_conv2d": {"input_dtype": "26.0", "weight_dtype": "26.0"},
    "npu_quant_matmul": {**_MATMUL, "group_sizes": "7.1"},
    "npu_rotary_mul": {"rotate": "26.0"},
    "npu_scatter_pa_kv_cache": {"cache_mode": "26.0"},
    "npu_scatter_pa_kv_cache_functional": {"cache_mode": "26.0"},
    "npu_trans_quant_param": {"round_mode": "7.1"},
    "npu_weight_quant_batchmatmul": {"weight_dtype": "26.0"},
}
"""Operator -> arguments younger than it, with the first release that has them. (``max_low_bound`` of
npu_dynamic_mx_quant is younger than the last of them, and no pass gives it.)"""

INTEGER_DTYPES = "26.0"
"""Since then npu_quant_matmul, npu_quant_conv2d and npu_quantize take the number of a ``ScalarType``, not a
``torch.dtype``."""

ELSEWHERE: dict[str, dict[str, str | None]] = {
    "npu_dynamic_mx_quant": {"ascend910b": None, "ascend910_93": None},
    "npu_mla_prolog": {"ascend950": None},
    "npu_mla_prolog_v2": {"ascend950": None},
    "npu_mla_prolog_v3": {"ascend910b": "26.1"},
    "npu_mla_prolog_v3_functional": {"ascend910b": "26.1"},
    "npu_quant_conv2d": {"ascend910b": None, "ascend910_93": None},
}
"""Operator -> SoC families on which it is there only from a later release on, or never (None)."""

_RESULT = ("dst_type", "round_mode", "activate_dim")

IGNORED: dict[str, dict[str, tuple[str, ...]]] = {
    "npu_dequant_swiglu_quant": {
        "ascend910b": _RESULT,
        "ascend910_93": _RESULT,
        "ascend950": tuple(_GPT_OSS),
    },
}
"""Operator -> SoC family -> arguments that its kernel there silently ignores."""
