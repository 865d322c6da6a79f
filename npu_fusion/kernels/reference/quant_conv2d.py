"""npu_quant_conv2d on the CPU; formula and traps in the file of this name in meta_impls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_fusion import formats
from npu_fusion.kernels.reference._quant import unpack_quant_param
from npu_fusion.meta_impls._registry import cpu_kernel
from npu_fusion.meta_impls.quant_conv2d import result_dtype

_ELEMENT = {torch.float8_e4m3fn: "float8_e4m3fn", torch.uint8: "hifloat8"}


@cpu_kernel("npu_quant_conv2d")
def npu_quant_conv2d(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    strides: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0),
    dilations: Sequence[int] = (1, 1),
    groups: int = 1,
    offset_x: int = 0,
    round_mode: str = "rint",
    output_dtype: int | None = None,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
    input_dtype: int | None = None,
    weight_dtype: int | None = None,
) -> Tensor:
    x, w = (_numbers(tensor) for tensor in (input, weight))
    acc = F.conv2d(x, w, None, tuple(strides), tuple(pads), tuple(dilations), groups)
    if bias is not None:
        acc = acc + bias.view(-1, 1, 1)
    y = acc.to(torch.float32) * unpack_quant_param(scale)[0].view(-1, 1, 1)
    output = result_dtype(input.dtype, output_dtype)
    result = formats.encode(y, "hifloat8") if output == torch.uint8 else y.to(output)
    return result.contiguous()


def _numbers(codes: Tensor) -> Tensor:
    """What an operand stands for: fp32, but for int8 float64, which holds every sum of products exactly."""
    if codes.dtype == torch.int8:
        return codes.to(torch.float64)
    return formats.decode(codes, _ELEMENT[codes.dtype])
