"""npu_quant_conv2d: convolution of quantized images, dequantized (Ascend 950).

::

    y = (conv2d(input, weight) + bias) * scale            one rounding

Sums are int32 (exact) for int8, fp32 for 8-bit floats. ``scale`` is the bit pattern of
``npu_trans_quant_param`` and nothing else: fp32 with 10 mantissa bits left.

Traps: the bias comes before the scale, so it is the float bias divided by that (rounded, for int8). hifloat8
numbers are uint8 (:mod:`npu_fusion.formats`), of the result, too. ``pads`` are two numbers, (top and bottom,
left and right). ``output_dtype`` has no default that is accepted.

Source: Meta and eager implementation of torch_npu 2.13.0; definition of the operator QuantConv2D, whose
ranges are checked here, and its kernel. The documentation of aclnnQuantConvolution has the bias after the
scale, which contradicts these two: the kernel adds it to the sums. Not implemented: ``offset_x`` (the value
of the padding; documented as reserved).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import (
    check,
    check_choice,
    check_dtype,
    check_rank,
    check_shape,
    check_size,
    names,
)
from npu_fusion.meta_impls._dtypes import HIFLOAT8, HIFLOAT8_DTYPE, dtype_argument
from npu_fusion.meta_impls._registry import operator

OP = "npu_quant_conv2d"

_FLOATS = "5 (float16), 6 (float32), 15 (bfloat16)"
_RESULTS: dict[torch.dtype, tuple[tuple[torch.dtype, ...], str]] = {
    torch.int8: ((torch.float16,), "5 (float16)"),
    torch.float8_e4m3fn: ((torch.float16, torch.float32, torch.bfloat16), _FLOATS),
    torch.uint8: (
        (torch.float16, torch.float32, torch.bfloat16, HIFLOAT8_DTYPE),
        f"{_FLOATS}, {HIFLOAT8} (hifloat8)",
    ),
}
_MOST_KERNEL, _MOST_STRIDE, _MOST_PAD, _MOST_DILATION = 511, 63, 255, 255


@operator(
    "npu_quant_conv2d(Tensor input, Tensor weight, Tensor scale, int[2] strides=1, int[2] pads=0, "
    "int[2] dilations=1, int groups=1, int offset_x=0, str round_mode='rint', int? output_dtype=None, "
    "Tensor? bias=None, Tensor? offset=None, int? input_dtype=None, int? weight_dtype=None) -> Tensor"
)
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
    output_dtype: int | torch.dtype | None = None,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
    input_dtype: int | None = None,
    weight_dtype: int | None = None,
) -> Tensor:
    """Convolve ``input`` [N, C, H, W] with ``weight`` [O, C/groups, kh, kw]; returns [N, O, Ho, Wo].

    Args:
        input, weight: int8, float8_e4m3fn, or uint8 with input_dtype and weight_dtype 290 (hifloat8). kh and
            kw are 1 to 511.
        scale: int64 (packed) [O].
        strides: (sh, sw), 1 to 63.
        pads: (ph, pw), 0 to 255, zeros on both sides; Ho is ``(H + 2 * ph - dh * (kh - 1) - 1) // sh + 1``.
        dilations: (dh, dw), 1 to 255.
        groups: divides C and O.
        offset_x: 0.
        round_mode: "rint"; "round" (half away from zero) for a hifloat8 result.
        output_dtype: ScalarType value: 5 (fp16); for floating-point operands also 6 (fp32), 15 (bf16); for
            hifloat8 also 290 (hifloat8, uint8).
        bias: [O]; int32 for int8, fp32 otherwise.
        offset: None.
        input_dtype, weight_dtype: None, or 290 for uint8.

    Raises ``ValueError`` for anything else.
    """
    check_dtype(OP, "input", input, *_RESULTS)
    check_dtype(OP, "weight", weight, input.dtype)
    number = HIFLOAT8 if input.dtype == torch.uint8 else None
    accepted = f"{number} for {names([input.dtype])}"
    check(input_dtype == number, OP, "input_dtype", input_dtype, accepted)
    check(weight_dtype == number, OP, "weight_dtype", weight_dtype, accepted)
    check_rank(OP, "input", input, 4, 4)
    check_rank(OP, "weight", weight, 4, 4)
    check_dtype(OP, "scale", scale, torch.int64)
    output = result_dtype(input.dtype, output_dtype)
    check_dtype(OP, "bias", bias, torch.int32 if input.dtype == torch.int8 else torch.float32)
    check(offset is None, OP, "offset", "given", "None")
    check(offset_x == 0, OP, "offset_x", offset_x, "0")
    check_choice(OP, "round_mode", round_mode, ("round",) if output == torch.uint8 else ("rint",))
    _check_pair("strides", strides, 1, _MOST_STRIDE)
    _check_pair("pads", pads, 0, _MOST_PAD)
    _check_pair("dilations", dilations, 1, _MOST_DILATION)
    check(groups >= 1, OP, "groups", groups, "1 or more")

    images, channels, *sizes = input.shape
    outputs, of_group, *kernel = weight.shape
    check_size(
        channels == of_group * groups,
        OP,
        f"input has {channels} channels, weight {of_group} and groups is {groups}; accepted: their product",
    )
    message = f"weight has {outputs} rows and groups is {groups}; accepted: a multiple of groups"
    check_size(outputs % groups == 0, OP, message)
    check_shape(OP, "scale", scale, (outputs,))
    check_shape(OP, "bias", bias, (outputs,))
    for size in kernel:
        message = f"weight has a kernel of {kernel}; accepted: 1 to {_MOST_KERNEL}"
        check_size(size >= 1, OP, message)
        check_size(size <= _MOST_KERNEL, OP, message)
    positions = [
        (size + 2 * pad - dilation * (window - 1) - 1) // stride + 1
        for size, window, stride, pad, dilation in zip(sizes, kernel, strides, pads, dilations, strict=True)
    ]
    for position in positions:
        check_size(position > 0, OP, f"the result is {positions} large; accepted: a positive size")
    return input.new_empty((images, outputs, *positions), dtype=output)


def result_dtype(of_operands: torch.dtype, output_dtype: int | torch.dtype | None) -> torch.dtype:
    """The dtype of the result, uint8 for hifloat8; ``ValueError`` for one that the operator does not give."""
    offered, accepted = _RESULTS[of_operands]
    check(output_dtype is not None, OP, "output_dtype", None, accepted)
    dtype = dtype_argument(OP, "output_dtype", output_dtype, torch.float16, offered, accepted)
    return torch.uint8 if dtype == HIFLOAT8_DTYPE else dtype


def _check_pair(argument: str, values: Sequence[int], low: int, high: int) -> None:
    right = len(values) == 2 and all(low <= value <= high for value in values)
    check(right, OP, argument, list(values), f"two numbers of {low} to {high}")
