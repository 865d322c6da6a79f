"""npu_dequant_bias: what follows an int32 matrix product.

::

    y = (x + bias) * weight_scale * activation_scale      int32 bias (int32 addition)
    y =  x * weight_scale * activation_scale + bias       floating-point bias

in fp32, in this order, with one rounding to the result dtype at the end.

Traps: ``activation_scale`` and ``bias`` are optional but have no default: None must be passed. The dtype of
the result is bound to that of ``weight_scale``: fp32 gives fp16, bf16 gives bf16; and ``output_dtype=None``
means fp16 whatever the scale, so a bf16 scale needs ``output_dtype=torch.bfloat16``.

Formula: aclnnDequantBias documentation; Meta implementation of torch_npu 2.13.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import check_dtype, check_rank, check_shape, names
from npu_fusion.meta_impls._dtypes import torch_dtype
from npu_fusion.meta_impls._registry import operator

OP = "npu_dequant_bias"

_RESULT_OF_SCALE = {torch.float32: torch.float16, torch.bfloat16: torch.bfloat16}


@operator(
    "npu_dequant_bias(Tensor x, Tensor weight_scale, Tensor? activation_scale, Tensor? bias, *, "
    "ScalarType? output_dtype=None) -> Tensor"
)
def npu_dequant_bias(
    x: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    *,
    output_dtype: int | torch.dtype | None = None,
) -> Tensor:
    """Dequantize ``x``; returns a [M, N] tensor of ``output_dtype``.

    Args:
        x: int32 [M, N].
        weight_scale: fp32 or bf16 [N].
        activation_scale: fp32 [M] or None.
        bias: int32, fp32, fp16 or bf16 [N], or None.
        output_dtype: None or torch.float16 for an fp32 ``weight_scale``, torch.bfloat16 for a bf16 one.

    Raises ``ValueError`` for anything else.
    """
    check_dtype(OP, "x", x, torch.int32)
    check_rank(OP, "x", x, 2, 2)
    rows, columns = x.shape
    check_dtype(OP, "weight_scale", weight_scale, *_RESULT_OF_SCALE)
    check_shape(OP, "weight_scale", weight_scale, (columns,))
    check_dtype(OP, "activation_scale", activation_scale, torch.float32)
    check_shape(OP, "activation_scale", activation_scale, (rows,))
    check_dtype(OP, "bias", bias, torch.int32, torch.float32, torch.float16, torch.bfloat16)
    check_shape(OP, "bias", bias, (columns,))

    target = torch_dtype(output_dtype, torch.float16)
    offered = _RESULT_OF_SCALE[weight_scale.dtype]
    if target != offered:
        raise ValueError(
            f"{OP}: output_dtype is {names([target])}; accepted: {names([offered])}, as weight_scale has "
            f"dtype {names([weight_scale.dtype])}"
        )
    return x.new_empty((rows, columns), dtype=target)
