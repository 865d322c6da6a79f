"""Static int8: from floating values, and from the int32 sums of a product of int8 matrices.

::

    q     = clamp(round(x / scale + offset), -128, 127)                       quantize_static, npu_quantize
    y_int = clamp(round(acc * requant + offset), -128, 127)                   requantize, npu_quant_matmul
            where requant = input_scale * weight_scale / output_scale

Rounding is half to even, and the zero point is added before it, as the operators do: after it, ties would go
another way beside odd zero points. ``acc`` is the exact int32 sum with the int32 bias
``round(b / (input_scale * weight_scale))`` in it. All other arithmetic is fp32. An ``acc`` beyond 2^24 is
rounded to fp32 first, which moves the result by less than 1e-5 of a step.

Source: the integer arithmetic of Jacob et al. (arXiv:1712.05877, section 2.2), with a floating scale in place
of a shifted integer, and symmetric inputs: a zero point z of the inputs is ``-z * sum(w)`` in the bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.quantization.modules.smoothquant._checks import check_float


def quantize_static(x: Tensor, scale: float | Tensor, offset: int | Tensor | None = None) -> Tensor:
    """Quantize ``x`` [..., K] with a given scale and zero point; int8 of its shape.

    In a compiled graph this is ``npu_quantize(div_mode=True)``.

    Args:
        x: float16, bfloat16 or float32, one or more dimensions.
        scale: positive; one number, or fp32 [1] or [K].
        offset: integers in the form of ``scale``, or None.

    Raises:
        ValueError: ``x`` is a single number or has another dtype, or ``scale`` or ``offset`` another shape.
    """
    check_float("quantize_static", "x", x)
    if x.dim() == 0:
        raise ValueError("quantize_static: x has shape []; accepted: [..., K]")
    for name, given in (("scale", scale), ("offset", offset)):
        _check_vector("quantize_static", name, given, x.size(-1))
    # As rows from here on, so that a layer that takes its rows finds them: of a single token that is made
    # two-dimensional only after it was quantized, Inductor repeats the row by a stride of 0, with which
    # torch._int_mm computes garbage on the CPU (pytorch issue 195066).
    rows = x.reshape(-1, x.size(-1)).float() / scale
    return _to_int8(rows if offset is None else rows + offset).reshape(x.shape)


def requant_scale(
    input_scale: float | Tensor, weight_scale: float | Tensor, output_scale: float | Tensor
) -> Tensor:
    """``input_scale * weight_scale / output_scale`` in fp32: the one factor from int32 sums to int8.

    Each is positive: a number, or a tensor of one element or of one for each output channel. Returns [] if
    all are numbers.
    """
    return torch.as_tensor(input_scale * weight_scale / output_scale).to(torch.float32)


def requantize(
    acc_int32: Tensor,
    input_scale: float | Tensor,
    weight_scale: float | Tensor,
    output_scale: float | Tensor,
    output_offset: int | Tensor | None = None,
) -> Tensor:
    """Int32 sums to int8, by :func:`requant_scale` alone.

    Behind ``torch._int_mm`` in a compiled graph this and the product are one ``npu_quant_matmul``.

    Args:
        acc_int32: int32 [..., N]; the bias is in it.
        input_scale, weight_scale, output_scale: positive; numbers, or fp32 tensors of one element or [N].
        output_offset: the zero point of the result, -128 to 127; an integer, or an integer tensor [1] or [N].

    Returns:
        int8 [..., N].

    Raises:
        ValueError: ``acc_int32`` is a single number or not int32, or another argument has another shape.
    """
    who = "requantize"
    if acc_int32.dtype != torch.int32 or acc_int32.dim() == 0:
        raise ValueError(
            f"{who}: acc_int32 has dtype {acc_int32.dtype} and shape {list(acc_int32.shape)}; "
            "accepted: int32 [..., N]"
        )
    given = {
        "input_scale": input_scale,
        "weight_scale": weight_scale,
        "output_scale": output_scale,
        "output_offset": output_offset,
    }
    for name, value in given.items():
        _check_vector(who, name, value, acc_int32.size(-1))
    return rescaled(acc_int32, requant_scale(input_scale, weight_scale, output_scale), output_offset)


def rescaled(acc: Tensor, factor: Tensor, offset: int | Tensor | None) -> Tensor:
    """Int32 [..., N] times a factor, fp32 [1] or [N], to int8."""
    value = acc.to(torch.float32) * factor
    return _to_int8(value if offset is None else value + offset)


def _to_int8(value: Tensor) -> Tensor:
    return value.round().clamp(-128, 127).to(torch.int8)  # the cast alone would wrap


def _check_vector(who: str, name: str, value: float | Tensor | None, size: int) -> None:
    """A tensor has one element or ``size``, in its last dimension."""
    if isinstance(value, Tensor) and value.dim() > 0 and tuple(value.shape) not in ((1,), (size,)):
        raise ValueError(f"{who}: {name} has shape {list(value.shape)}; accepted: [1] or [{size}]")
