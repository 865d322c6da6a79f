"""npu_dequant_swiglu_quant: dequantize an int32 matmul result, apply SwiGLU, quantize again; one kernel.

    x [..., 2H] int32 ──▶ (+ int32 bias) ─▶ fp32 ─▶ * weight_scale[channel] ─▶ * activation_scale[token]
                                                                                     │
    x [..., 2H] fp16 / bf16 ──▶ fp32 ──────────────────────┐             (+ floating-point bias)
                                                           ▼                         │
                                                 s = swiglu(d) [..., H]  ◀───────────┘
                                                           │
      dynamic (quant_mode 1): s = s * quant_scale ; scale = amax|s| / max ; y = round(s / scale)
      static  (quant_mode 0): y = round(s / quant_scale + quant_offset) ; scale is not written

Everything after the int32 addition is fp32. ``max`` is 127 (int8), 448 (float8_e4m3fn) or 57344
(float8_e5m2); y saturates. With L, R the halves of d and gate(a, alpha) = a / (1 + exp(-alpha * a)):

* ``swiglu_mode`` 0: act, lin = L, R if ``activate_left`` else R, L; s = gate(act, 1) * lin;
* ``swiglu_mode`` 1: act, lin = d[0::2], d[1::2] (``activate_left`` has no meaning), clipped:
  s = gate(min(act, clamp_limit), glu_alpha) * (clamp(lin, -clamp_limit, clamp_limit) + glu_bias);
* ``swiglu_mode`` 2: the formula of mode 1 with act and lin of mode 0.

``group_index`` counts the consecutive rows of each group (all dimensions but the last, flattened). Each group
has its own row of ``weight_scale``, ``bias``, ``quant_scale`` and ``quant_offset``.

Traps:

* ``activate_left=False``, the default, activates the SECOND half; npu_swiglu activates the first;
* static mode DIVIDES by ``quant_scale``, dynamic mode multiplies; the ``scale`` output is for dequantization
  (amax/127), npu_swiglu_quant returns its inverse;
* int32 bias is added before the scales, floating-point bias after them;
* a zero row has scale 0 and y 0; no epsilon anywhere;
* rows beyond the sum of ``group_index`` and, in static mode, ``scale`` are uninitialized memory on the
  device; this package zeroes them, and nothing may depend on that;
* ``group_index`` holds counts, not running sums: [2, 0, 3] is rows 0-1, none, 2-4;
* a static ``quant_scale`` of shape [G] is one scalar per group, even where G == H;
* ``dst_type`` is a ScalarType value (int8 is 1, None means int8); 2 is int16 and refused, as are torch_npu's
  4-bit and HiFloat8 types; A2/A3 devices quantize to int8 whatever ``dst_type`` and ``round_mode`` say.

Formula: documentation of op-plugin and aclnnDequantSwigluQuantV2, public kernel sources of torch_npu 2.13.0.
Where they disagree, the wider of two meaningful forms is accepted; for fp16 and bf16 x the stricter rule of
aclnn holds (no scales, no bias), because the device would ignore them silently.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import (
    FLOATS,
    check,
    check_choice,
    check_dtype,
    check_rank,
    check_shape,
    check_size,
)
from npu_fusion.meta_impls._dtypes import dtype_argument
from npu_fusion.meta_impls._registry import operator

OP = "npu_dequant_swiglu_quant"

STATIC, DYNAMIC = 0, 1
HALVES, INTERLEAVED_CLIPPED, HALVES_CLIPPED = 0, 1, 2
RINT, HALF_AWAY, FLOOR, CEIL, TRUNC = 0, 1, 2, 3, 4

Size: TypeAlias = int | torch.SymInt


@operator(
    "npu_dequant_swiglu_quant(Tensor x, *, Tensor? weight_scale=None, Tensor? activation_scale=None, "
    "Tensor? bias=None, Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? group_index=None, "
    "bool activate_left=False, int quant_mode=0, int? dst_type=None, int? round_mode=None, "
    "int? activate_dim=None, int swiglu_mode=0, float clamp_limit=7.0, float glu_alpha=1.702, "
    "float glu_bias=1.0) -> (Tensor, Tensor)"
)
def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns ``y`` (``dst_type``, the shape of x with ``activate_dim`` halved) and ``scale`` (float32, the
    shape of y without its last dimension).

    With T the product of all dimensions of x but the last, C its last dimension, H the last dimension of y
    (C/2 unless ``activate_dim`` says otherwise) and G the length of ``group_index`` (1 without):

    * ``x``: int32, float16 or bfloat16, two or more dimensions; the activated dimension even;
    * ``weight_scale``: float32 [G, C], or [C] where G is 1; required for int32 x, refused otherwise;
    * ``activation_scale``: float32, T elements in any shape ([T], [T, 1], x.shape[:-1]); only with int32 x;
    * ``bias``: int32, float32, float16 or bfloat16, [G, C], or [C] where G is 1; only with int32 x;
    * ``quant_scale``: float32, float16 or bfloat16, [G, H], or [H] where G is 1; static mode also takes one
      scalar per group, [G] or [G, 1];
    * ``quant_offset``: static mode only, dtype and shape of ``quant_scale``;
    * ``group_index``: int64 [G], G above 0, each count at least 0; their sum must not exceed T;
    * ``quant_mode``: 0 static, 1 dynamic;
    * ``dst_type``: None or 1 int8, 24 or 292 float8_e4m3fn, 23 or 291 float8_e5m2;
    * ``round_mode``: None or 0 half to even, 1 half away from zero, 2 floor, 3 ceil, 4 truncate (float8: only
      the first);
    * ``activate_dim``: None or the last dimension; another one only in static mode without ``group_index``;
    * ``swiglu_mode``: 0, 1 or 2; ``clamp_limit`` finite and positive, ``glu_alpha`` and ``glu_bias`` finite.

    Raises ``ValueError`` for anything else.
    """
    check_dtype(OP, "x", x, torch.int32, torch.float16, torch.bfloat16)
    check_rank(OP, "x", x, 2)
    _check_options(quant_mode, round_mode, swiglu_mode, clamp_limit, glu_alpha, glu_bias)
    dtype = _destination(dst_type, round_mode)
    dim = _activated_dim(x, activate_dim, quant_mode, group_index)

    shape = list(x.shape)
    channels = shape[-1]
    check_size(
        (shape[dim] % 2 == 0) & (channels > 0),
        OP,
        f"x has shape {shape}; accepted: an even dimension {dim} and a last dimension that is not empty",
    )
    shape[dim] = shape[dim] // 2

    check_dtype(OP, "group_index", group_index, torch.int64)
    groups: Size = 1
    if group_index is not None:
        check_rank(OP, "group_index", group_index, 1, 1)
        groups = group_index.shape[0]
        check_size(groups > 0, OP, "group_index is empty; accepted: one group or more")
    _check_dequant(x, weight_scale, activation_scale, bias, groups, channels)
    _check_quant(quant_scale, quant_offset, quant_mode, groups, shape[-1])

    return x.new_empty(shape, dtype=dtype), x.new_empty(shape[:-1], dtype=torch.float32)


def _check_options(
    quant_mode: int,
    round_mode: int | None,
    swiglu_mode: int,
    clamp_limit: float,
    glu_alpha: float,
    glu_bias: float,
) -> None:
    check_choice(OP, "quant_mode", quant_mode, (STATIC, DYNAMIC))
    check_choice(OP, "round_mode", round_mode, (None, RINT, HALF_AWAY, FLOOR, CEIL, TRUNC))
    check_choice(OP, "swiglu_mode", swiglu_mode, (HALVES, INTERLEAVED_CLIPPED, HALVES_CLIPPED))
    valid_limit = math.isfinite(clamp_limit) and clamp_limit > 0
    check(valid_limit, OP, "clamp_limit", clamp_limit, "a finite number above 0")
    check(math.isfinite(glu_alpha), OP, "glu_alpha", glu_alpha, "a finite number")
    check(math.isfinite(glu_bias), OP, "glu_bias", glu_bias, "a finite number")


def _destination(dst_type: int | None, round_mode: int | None) -> torch.dtype:
    accepted = "None or 1 (int8), 24 or 292 (float8_e4m3fn), 23 or 291 (float8_e5m2)"
    offered = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
    dtype = dtype_argument(OP, "dst_type", dst_type, torch.int8, offered, accepted)
    if dtype.is_floating_point:
        check(round_mode in (None, RINT), OP, "round_mode", round_mode, f"None or {RINT} for float8 results")
    return dtype


def _activated_dim(x: Tensor, activate_dim: int | None, quant_mode: int, group_index: Tensor | None) -> int:
    """``activate_dim`` counted from the front."""
    rank = x.dim()
    dim = -1 if activate_dim is None else activate_dim
    check(-rank <= dim < rank, OP, "activate_dim", activate_dim, f"None or {-rank} to {rank - 1}")
    dim %= rank
    if dim != rank - 1:
        condition = "a dimension other than the last only in static mode (quant_mode 0) without group_index"
        check(quant_mode == STATIC and group_index is None, OP, "activate_dim", activate_dim, condition)
    return dim


def _check_dequant(
    x: Tensor,
    weight_scale: Tensor | None,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    groups: Size,
    channels: Size,
) -> None:
    if x.dtype != torch.int32:
        for argument, tensor in (
            ("weight_scale", weight_scale),
            ("activation_scale", activation_scale),
            ("bias", bias),
        ):
            check(tensor is None, OP, argument, "given", f"None where x is {x.dtype}, not int32")
        return
    if weight_scale is None:
        raise ValueError(f"{OP}: weight_scale is None; accepted: a float32 tensor where x is int32")
    check_dtype(OP, "weight_scale", weight_scale, torch.float32)
    _check_per_channel("weight_scale", weight_scale, groups, channels)
    if activation_scale is not None:
        check_dtype(OP, "activation_scale", activation_scale, torch.float32)
        tokens = math.prod(x.shape[:-1])
        check_size(
            activation_scale.numel() == tokens,
            OP,
            f"activation_scale has shape {list(activation_scale.shape)}; accepted: one element for each of "
            f"the {tokens} rows of x",
        )
    if bias is not None:
        check_dtype(OP, "bias", bias, torch.int32, *FLOATS)
        _check_per_channel("bias", bias, groups, channels)


def _check_per_channel(argument: str, tensor: Tensor, groups: Size, channels: Size) -> None:
    check_rank(OP, argument, tensor, 1, 2)
    rows = tensor.shape[0] if tensor.dim() == 2 else 1
    given = f"{argument} has shape {list(tensor.shape)}"
    accepted = f"[{groups}, {channels}], or [{channels}] for one group"
    check_size((rows == groups) & (tensor.shape[-1] == channels), OP, f"{given}; accepted: {accepted}")


def _check_quant(
    quant_scale: Tensor | None, quant_offset: Tensor | None, quant_mode: int, groups: Size, hidden: Size
) -> None:
    if quant_offset is not None:
        check(quant_mode == STATIC, OP, "quant_offset", "given", "None in dynamic mode (quant_mode 1)")
        check(quant_scale is not None, OP, "quant_offset", "given", "None without quant_scale")
    if quant_scale is None:
        return
    check_dtype(OP, "quant_scale", quant_scale, *FLOATS)
    check_rank(OP, "quant_scale", quant_scale, 1, 2)
    rows, columns = (quant_scale.shape[0] if quant_scale.dim() == 2 else 1), quant_scale.shape[-1]
    fits = (rows == groups) & (columns == hidden)
    accepted = f"[{groups}, {hidden}], or [{hidden}] for one group"
    if quant_mode == STATIC:
        if quant_scale.dim() == 2:
            fits = fits | ((rows == groups) & (columns == 1))
        else:
            fits = fits | (columns == groups)
        accepted += f", or a scalar per group: [{groups}] or [{groups}, 1]"
    check_size(fits, OP, f"quant_scale has shape {list(quant_scale.shape)}; accepted: {accepted}")
    if quant_offset is not None:
        check_dtype(OP, "quant_offset", quant_offset, quant_scale.dtype)
        check_shape(OP, "quant_offset", quant_offset, quant_scale.shape)
