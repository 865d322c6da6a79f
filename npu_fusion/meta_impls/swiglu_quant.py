"""npu_swiglu_quant: SwiGLU and per-token (dynamic) or static quantization to int8 or int4.

    x [..., 2H] ─▶ s = silu(act) * lin
                     ├─ dynamic: s = s * smooth ; scale = 127 / amax|s| ; y = rint(s * scale)
                     └─ static:  y = rint(s * smooth + offset)

All arithmetic is fp32; the result is rounded half to even and saturated (int4: 7 in place of 127).
``scale`` is written in dynamic mode only; in static mode the device leaves it as it is, here it is zeroed.

Traps:

* the SECOND half is activated by default (``activate_left=False``), unlike npu_swiglu;
* ``scale`` is the QUANTIZATION scale 127/amax, the inverse of what npu_dequant_swiglu_quant and
  npu_dynamic_quant return; a zero row has scale +inf and y 0;
* static mode MULTIPLIES by ``smooth_scales`` (npu_dequant_swiglu_quant divides by quant_scale);
* ``group_index`` is a running sum by default (``group_list_type=0``), counts with 1; it is int32;
* rows beyond the last group are quantized too, without smooth scale and offset;
* int4 (``dst_type=torch.quint4x2``) comes as int8 with two values in each byte, the lower index in the lower
  nibble, as torch_npu's eager operator allocates it; its Meta kernel says quint4x2 of unpacked size instead.

Formula: documentation of op-plugin and of aclnnSwiGluQuantV2, public kernel sources of torch_npu 2.13.0.
"""

from __future__ import annotations

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
from npu_fusion.meta_impls._registry import operator

OP = "npu_swiglu_quant"

STATIC, DYNAMIC = 0, 1
CUMSUM, COUNT = 0, 1


@operator(
    "npu_swiglu_quant(Tensor x, *, Tensor? smooth_scales=None, Tensor? offsets=None, "
    "Tensor? group_index=None, bool activate_left=False, int quant_mode=0, int group_list_type=0, "
    "ScalarType? dst_type=None) -> (Tensor, Tensor)"
)
def npu_swiglu_quant(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    offsets: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    group_list_type: int = 0,
    dst_type: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns ``y`` int8 [..., H] (int4: int8 [..., H/2]) and ``scale`` float32 [...].

    * ``x``: float16, bfloat16 or float32, [..., 2H], two or more dimensions, H at least 1 (int4: even);
    * ``smooth_scales``: float32, [G, H] or [G]; G is 1 without ``group_index``;
    * ``offsets``: float32; static mode: given exactly where ``smooth_scales`` is, in the same shape; ignored
      in dynamic mode;
    * ``group_index``: int32 [G], the ends (or counts) of groups of rows, all leading dimensions flattened;
    * ``dst_type``: None or torch.int8, or torch.quint4x2 for int4.

    Raises ``ValueError`` for anything else.
    """
    check_dtype(OP, "x", x, *FLOATS)
    check_rank(OP, "x", x, 2)
    check_choice(OP, "quant_mode", quant_mode, (STATIC, DYNAMIC))
    check_choice(OP, "group_list_type", group_list_type, (CUMSUM, COUNT))
    check_choice(OP, "dst_type", dst_type, (None, torch.int8, torch.quint4x2))
    int4 = dst_type == torch.quint4x2
    last = x.shape[-1]
    multiple = 4 if int4 else 2
    fits = (last % multiple == 0) & (last > 0)
    check_size(fits, OP, f"the last dimension of x is {last}; accepted: a positive multiple of {multiple}")
    hidden = last // 2

    check_dtype(OP, "group_index", group_index, torch.int32)
    groups: int | torch.SymInt = 1
    if group_index is not None:
        check_rank(OP, "group_index", group_index, 1, 1)
        groups = group_index.shape[0]
    for argument, tensor in (("smooth_scales", smooth_scales), ("offsets", offsets)):
        if tensor is None:
            continue
        check_dtype(OP, argument, tensor, torch.float32)
        check_rank(OP, argument, tensor, 1, 2)
        fits = tensor.shape[0] == groups
        if tensor.dim() == 2:
            fits = fits & (tensor.shape[1] == hidden)
        accepted = f"[{groups}, {hidden}] or [{groups}]"
        check_size(fits, OP, f"{argument} has shape {list(tensor.shape)}; accepted: {accepted}")
    if quant_mode == STATIC:
        # As the eager operator: one of the two without the other is an error there.
        if smooth_scales is None:
            check(offsets is None, OP, "offsets", "given", "None without smooth_scales")
        else:
            check(offsets is not None, OP, "offsets", None, "a tensor shaped as smooth_scales in static mode")
            check_shape(OP, "offsets", offsets, smooth_scales.shape)

    leading = list(x.shape[:-1])
    y = x.new_empty([*leading, hidden // 2 if int4 else hidden], dtype=torch.int8)
    return y, x.new_empty(leading, dtype=torch.float32)
