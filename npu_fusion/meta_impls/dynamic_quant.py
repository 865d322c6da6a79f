"""npu_dynamic_quant and npu_dynamic_quant_asymmetric: quantization with scales taken from the data.

With ``x = fp32(input) * fp32(smooth_scales)`` and the reduction over the last dimension ("pertoken"), over
the last but one ("perchannel") or over everything ("pertensor")::

    symmetric    scale = amax|x| / DMAX                      y = sat(rint(x / scale))
    asymmetric   scale = max((max - min) / (DMAX - DMIN), 1e-12)
                 offset = DMAX - max / scale                 y = sat(rint(x / scale + offset))

DMAX is 127 for int8 and 7 for int4, DMIN is -128 and -8. Symmetric: an all-zero row has scale 0 and y 0.

Traps: ``group_index`` holds the CUMULATIVE ends of the groups of rows that use one row of ``smooth_scales``
each (npu_dequant_swiglu_quant takes counts); its last entry must be the number of rows. Rows beyond it are
undefined on the device; here they are quantized without smoothing. ``scale`` multiplies to dequantize (it is
amax/127, where npu_swiglu_quant returns 127/amax). ``offset`` is not rounded.

Formula: op-plugin documentation of torch_npu 2.13.0 and public kernel sources (the 1e-12 of the asymmetric
form is only in the kernels). ``dst_type_max`` of the schema acts on hifloat8 alone, which has no
representation in PyTorch: it must stay 0. The modes "perchannel" and "pertensor" exist on Ascend 950 only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import check, check_choice, check_dtype, check_rank, check_size
from npu_fusion.meta_impls._dtypes import dtype_argument
from npu_fusion.meta_impls._registry import operator

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_QUANT_MODES = ("pertoken", "perchannel", "pertensor")


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
        group_index: int32 [G], cumulative ends of the groups of rows; "pertoken" only.
        dst_type: ScalarType value: None or 1 (int8), 16 (quint4x2: int4).
        quant_mode: "pertoken", "perchannel" or "pertensor".
        dst_type_max: must be 0.

    Returns:
        y: int8 of the shape of ``input``; for quint4x2 int32 with the last dimension divided by 8.
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
    """``torch.int8`` or ``torch.quint4x2``; ``ValueError`` for anything else."""
    offered = (torch.int8, torch.quint4x2)
    return dtype_argument(op, "dst_type", dst_type, torch.int8, offered, "None, 1 (int8), 16 (quint4x2)")


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
    check(dst_type_max == 0, op, "dst_type_max", dst_type_max, "0 (other values act on hifloat8 only)")
    dtype = destination(op, dst_type)
    _check_smoothing(op, input, smooth_scales, group_index, quant_mode)

    *leading, rows, columns = input.shape
    if dtype == torch.quint4x2:
        # torch_npu's own Meta gives a y of the wrong rank for this pair.
        check(quant_mode != "perchannel", op, "quant_mode", "'perchannel'", "another one with quint4x2")
        check_size(columns % 8 == 0, op, f"input has {columns} columns; accepted: a multiple of 8 (quint4x2)")
        y = input.new_empty((*leading, rows, columns // 8), dtype=torch.int32)
    else:
        y = input.new_empty(input.shape, dtype=torch.int8)
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
