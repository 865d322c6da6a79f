"""npu_dynamic_quant and npu_dynamic_quant_asymmetric: quantization with scales taken from the data.

With ``x = fp32(input) * fp32(smooth_scales)`` and the reduction over the last dimension ("pertoken"), over
the last but one ("perchannel") or over everything ("pertensor")::

    symmetric    scale = amax|x| / DMAX                      y = sat(rint(x / scale))
    asymmetric   scale = max((max - min) / (DMAX - DMIN), 1e-12)
                 offset = DMAX - max / scale                 y = sat(rint(x / scale + offset))

DMAX is 127 for int8 and 7 for int4, DMIN is -128 and -8. Results in float8_e4m3fn, float8_e5m2 and hifloat8
(Ascend 950) are rounded to the nearest number of the format instead of by rint (hifloat8: half away from
zero); DMAX is 448, 57344, and for hifloat8 ``dst_type_max``, or 32768 if that is 0; DMIN is -DMAX. hifloat8
has four significant bits below 16 and two from 256 on: ``dst_type_max=15`` is far more exact than the
default. Symmetric: an all-zero row has scale 0 and y 0.

Traps: ``group_index`` holds the CUMULATIVE ends of the groups of rows that use one row of ``smooth_scales``
each (npu_dequant_swiglu_quant takes counts); its last entry must be the number of rows. Rows beyond it are
undefined on the device; here they are quantized without smoothing. ``scale`` multiplies to dequantize (it is
amax/127, where npu_swiglu_quant returns 127/amax). ``offset`` is not rounded.

Formula: op-plugin documentation of torch_npu 2.13.0 and public kernel sources (the 1e-12 of the asymmetric
form is only in the kernels). The modes "perchannel" and "pertensor" exist on Ascend 950 only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import check, check_choice, check_dtype, check_rank, check_size
from npu_fusion.meta_impls._dtypes import HIFLOAT8_DTYPE, dtype_argument
from npu_fusion.meta_impls._registry import operator

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_QUANT_MODES = ("pertoken", "perchannel", "pertensor")
_DESTINATIONS = (torch.int8, torch.quint4x2, torch.float8_e4m3fn, torch.float8_e5m2, HIFLOAT8_DTYPE)
_ACCEPTED = (
    "None, 1 (int8), 16 (quint4x2), 24 or 292 (float8_e4m3fn), 23 or 291 (float8_e5m2), 290 (hifloat8)"
)
_HIFLOAT8_MAX = 32768.0


@operator(
    "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, "
    'int? dst_type=None, str quant_mode="pertoken", float dst_type_max=0.0) -> (Tensor, Tensor)'
)
def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | torch.dtype | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Quantize ``input`` symmetrically; returns ``(y, scale)``.

    Args:
        input: fp16 or bf16, rank 2 or more (the CPU kernel also takes fp32, the exact form of fp32 chains).
        smooth_scales: fp16, bf16 or fp32; [H] for the last dimension H ("perchannel": [M] for the last but
            one); with ``group_index`` [G, H].
        group_index: int32 [G], cumulative ends of the groups of rows; "pertoken" only. dst_type: ScalarType
        value: None or 1 (int8), 16 (quint4x2: int4), 24 or 292 (float8_e4m3fn), 23 or 291
            (float8_e5m2), 290 (hifloat8).
        quant_mode: "pertoken", "perchannel" or "pertensor".
        dst_type_max: what the largest value is quantized to, from 0 (32768) to 32768; hifloat8 only.

    Returns:
        y: of the shape of ``input``, in int8 or float8, for hifloat8 in uint8 (bit patterns); for quint4x2
            int32
            with the last dimension divided by 8.
        scale: fp32; the shape of ``input`` without its last dimension ("pertoken"), without the last but one
            ("perchannel"), or [1] ("pertensor").

    Raises ``ValueError`` for anything else.
    """
    return _outputs(
        "npu_dynamic_quant", input, smooth_scales, group_index, dst_type, quant_mode, dst_type_max
    )


@operator(
    "npu_dynamic_quant_asymmetric(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, "
    'int? dst_type=None, str quant_mode="pertoken", float dst_type_max=0.0) -> (Tensor, Tensor, Tensor)'
)
def npu_dynamic_quant_asymmetric(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | torch.dtype | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize ``input`` asymmetrically; returns ``(y, scale, offset)``.

    The arguments, ``y`` and ``scale`` are those of :func:`npu_dynamic_quant`; ``offset`` is fp32 of the
    shape of ``scale``, and ``(y - offset) * scale`` dequantizes.
    """
    y, scale = _outputs(
        "npu_dynamic_quant_asymmetric", input, smooth_scales, group_index, dst_type, quant_mode, dst_type_max
    )
    return y, scale, torch.empty_like(scale)


def destination(op: str, dst_type: int | torch.dtype | None) -> torch.dtype:
    """``torch.int8``, ``torch.quint4x2``, a float8 dtype or ``HIFLOAT8_DTYPE``; ``ValueError`` for anything
    else."""
    return dtype_argument(op, "dst_type", dst_type, torch.int8, _DESTINATIONS, _ACCEPTED)


def _outputs(
    op: str,
    input: Tensor,
    smooth_scales: Tensor | None,
    group_index: Tensor | None,
    dst_type: int | torch.dtype | None,
    quant_mode: str,
    dst_type_max: float,
) -> tuple[Tensor, Tensor]:
    check_dtype(op, "input", input, *_FLOATS)
    check_rank(op, "input", input, 2)
    check_choice(op, "quant_mode", quant_mode, _QUANT_MODES)
    dtype = destination(op, dst_type)
    if dtype == HIFLOAT8_DTYPE:
        check(0 <= dst_type_max <= _HIFLOAT8_MAX, op, "dst_type_max", dst_type_max, f"0 to {_HIFLOAT8_MAX:g}")
    else:
        check(dst_type_max == 0, op, "dst_type_max", dst_type_max, "0 (other values act on hifloat8 only)")
    _check_smoothing(op, input, smooth_scales, group_index, quant_mode)

    *leading, rows, columns = input.shape
    if dtype == torch.quint4x2:
        # torch_npu's own Meta gives a y of the wrong rank for this pair.
        check(quant_mode != "perchannel", op, "quant_mode", "'perchannel'", "another one with quint4x2")
        check_size(columns % 8 == 0, op, f"input has {columns} columns; accepted: a multiple of 8 (quint4x2)")
        y = input.new_empty((*leading, rows, columns // 8), dtype=torch.int32)
    else:
        y = input.new_empty(input.shape, dtype=torch.uint8 if dtype == HIFLOAT8_DTYPE else dtype)
    scale_shape = {"pertoken": (*leading, rows), "perchannel": (*leading, columns), "pertensor": (1,)}
    return y, input.new_empty(scale_shape[quant_mode], dtype=torch.float32)


def _check_smoothing(
    op: str, input: Tensor, smooth_scales: Tensor | None, group_index: Tensor | None, quant_mode: str
) -> None:
    check_dtype(op, "smooth_scales", smooth_scales, *_FLOATS)
    check_dtype(op, "group_index", group_index, torch.int32)
    if group_index is not None:
        check(smooth_scales is not None, op, "smooth_scales", None, "[G, H] with group_index")
        check(quant_mode == "pertoken", op, "quant_mode", repr(quant_mode), "'pertoken' with group_index")
        check_rank(op, "group_index", group_index, 1, 1)
    if smooth_scales is None:
        return
    dim = -2 if quant_mode == "perchannel" else -1
    rank = 1 if group_index is None else 2
    check_rank(op, "smooth_scales", smooth_scales, rank, rank)
    columns, given = input.size(dim), list(smooth_scales.shape)
    if group_index is None:
        message = f"smooth_scales has shape {given}; accepted: [{columns}], dimension {dim} of input"
    else:
        groups = group_index.size(0)
        message = f"smooth_scales has shape {given}; accepted: [{groups}, {columns}], groups and columns"
        check_size(smooth_scales.size(0) == groups, op, message)
    check_size(smooth_scales.size(-1) == columns, op, message)
