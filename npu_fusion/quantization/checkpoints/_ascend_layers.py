"""The tensors that Ascend's form has for one layer, by the type of the layer.

::

    W8A8           weight int8 [N, K], weight_scale and weight_offset fp32 [N, 1] (offset 0), input_scale and
                   input_offset fp32 [1], deq_scale [N], quant_bias int32 [N]
    W8A8_DYNAMIC   weight int8 [N, K], weight_scale and weight_offset fp32 [N, 1] (offset 0)
    W8A16          weight int8 [N, K], weight_scale and weight_offset fp32 [N, 1] or [N, K / group_size]
    W4A16          as W8A16, two numbers in a byte, the even one in the low bits: along K with a scale for
                   each channel, [N, K / 2]; along N with groups, [N / 2, K]
    all            bias fp32 [N] of type FLOAT, if there is one
    smoothing      div.mul_scale [K] of type FLOAT, by which the input is multiplied, where nothing before the
                   layer could take it; the other names then have "linear." before them

    q = round(x / input_scale + input_offset)          W = (weight - weight_offset) * weight_scale
    deq_scale  = input_scale * weight_scale            fp32 in a bfloat16 model, else its bits in an int64
    quant_bias = round(bias / deq_scale) - input_offset * Σₖ weight[n, k]

Traps:

* ``npu_weight_quant_batchmatmul`` adds its offset. The file has the one that is subtracted.
* One generation of msmodelslim's writers leaves out weight_scale of W8A8; it is deq_scale / input_scale then.
* quant_bias is what counts; the bias beside it is for tools that want a float.

Source: msmodelslim 26.1.0, AscendV1, both generations of its writers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from npu_fusion import formats
from npu_fusion.quantization.checkpoints._files import FLOATS, Tensors
from npu_fusion.quantization.checkpoints._found import Quantized
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules import Deployed
from npu_fusion.quantization.modules._deployed import described
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import InputScheme, Scheme, WeightScheme

FLOAT = "FLOAT"
STATIC, DYNAMIC, W8A16, W4A16 = "W8A8", "W8A8_DYNAMIC", "W8A16", "W4A16"
TYPES = (STATIC, DYNAMIC, W8A16, W4A16)
_SMOOTHING = "div.mul_scale"
_INNER = "linear"


def type_of(name: str, layer: Deployed) -> str:
    """The type of a layer. Raises ``ValueError`` if the form has none for it."""
    weights, inputs = layer.scheme.weights, layer.scheme.inputs
    accepted = "int8 weights with or without int8 inputs, and int4 weights, of linear layers"
    what = described(layer.scheme)
    if layer.stands_for is torch.nn.Linear:
        if inputs is None and weights.type == "int8":
            return W8A16
        if inputs is None and weights.type == "int4":
            axis = 0 if weights.strategy == "group" else 1
            if layer.quantized_weight().shape[axis] % 2 == 0:
                return W4A16
            accepted = (
                "an even number of outputs (groups) or inputs (channels), since two numbers share a byte"
            )
        if inputs is not None and (weights.type, weights.symmetric, inputs.type) == ("int8", True, "int8"):
            bias = layer._buffers.get("bias")
            if inputs.dynamic:
                return DYNAMIC
            if bias is None or bias.dtype == torch.int32:
                return STATIC
            what, accepted = "a bias beyond int32 beside its scales", "an int32 bias"
    raise ValueError(f"save_checkpoint: {name} has {what}; accepted with form='ascend': {accepted}")


def write(kind: str, layer: Deployed, bfloat16: bool) -> Iterator[tuple[str, str, Tensor]]:
    """Name behind that of the layer, type and value of every tensor."""
    weight, bias, smooth_scales = layer.quantized_weight(), layer._buffers.get("bias"), None
    if kind == STATIC:
        input_scale, smooth_scales = _apart(layer)
    else:
        smooth_scales = layer._buffers.get("smooth_scales")
    prefix = ""
    if smooth_scales is not None:
        prefix = f"{_INNER}."
        yield _SMOOTHING, FLOAT, smooth_scales
    yield f"{prefix}weight", kind, _pack(weight) if kind == W4A16 else weight.codes
    yield f"{prefix}weight_scale", kind, _columns(weight, weight.scale)
    offset = torch.zeros_like(weight.scale) if weight.offset is None else weight.offset.to(torch.float32)
    yield f"{prefix}weight_offset", kind, _columns(weight, offset)
    if kind == STATIC:
        given, deq_scale = layer._buffers["input_offset"], layer.get_buffer("deq_scale")
        input_offset = torch.zeros_like(input_scale) if given is None else given[:1].to(torch.float32)
        yield f"{prefix}input_scale", kind, input_scale
        yield f"{prefix}input_offset", kind, input_offset
        yield (
            f"{prefix}deq_scale",
            kind,
            deq_scale if bfloat16 else deq_scale.view(torch.int32).to(torch.int64),
        )
        quant_bias = torch.zeros_like(deq_scale, dtype=torch.int32) if bias is None else bias
        yield f"{prefix}quant_bias", kind, quant_bias
        own = _own_bias(quant_bias, weight.codes, input_offset, deq_scale)
        bias = own if bool(own.any()) else None
    if bias is not None:
        yield f"{prefix}bias", FLOAT, bias.to(torch.float32)


def _apart(layer: Deployed) -> tuple[Tensor, Tensor | None]:
    """The scale of the input, and the smoothing that its numbers for each channel have in them."""
    scale = layer.get_buffer("input_scale").to(torch.float32)
    # deq_scale is without the smoothing; the largest is the farthest from underflow.
    deq_scale, weight_scale = layer.get_buffer("deq_scale"), layer.get_buffer("weight_scale")
    largest = weight_scale.argmax()
    plain = (deq_scale[largest] / weight_scale[largest]).reshape(1)
    if torch.allclose(scale, plain, rtol=1e-6, atol=0) and bool((scale == scale[0]).all()):
        return scale[:1], None
    return plain, plain / scale


def _own_bias(quant_bias: Tensor, codes: Tensor, input_offset: Tensor, deq_scale: Tensor) -> Tensor:
    """float64 [N]: what of ``quant_bias`` does not come of the offset of the input."""
    moved = input_offset.double() * codes.sum(1, dtype=torch.int64).double()
    return (quant_bias.double() + moved) * deq_scale.double()


def _columns(weight: QuantizedWeight, parameter: Tensor) -> Tensor:
    """[N, 1] or [N, G]."""
    return parameter if parameter.dim() == 2 else parameter.expand(weight.shape[0]).unsqueeze(1)


def _pack(weight: QuantizedWeight) -> Tensor:
    nibbles = weight.codes.view(torch.uint8)
    if weight.scheme.strategy == "group":
        return formats.pack_nibbles(nibbles.t()).t().contiguous().view(torch.int8)
    return formats.pack_nibbles(nibbles).view(torch.int8)


def _unpack(packed: Tensor, grouped: bool) -> Tensor:
    """int8 [N, K]."""
    nibbles = formats.unpack_nibbles((packed.t() if grouped else packed).contiguous().view(torch.uint8))
    codes = (nibbles ^ 8).view(torch.int8) - 8
    return codes.t().contiguous() if grouped else codes


def read(stored: str, kind: str, group_size: int, tensors: Tensors) -> tuple[str, Quantized]:
    """The name of a layer whose tensors begin with ``stored``, and what it is. Raises as a reader does."""
    name, smooth_scales = stored, None
    outer = stored.removesuffix(f".{_INNER}")
    if outer != stored and f"{outer}.{_SMOOTHING}" in tensors:
        name = outer
    weight = _weight(stored, kind, group_size, tensors)
    if name != stored:
        smooth_scales = tensors.scale(f"{name}.{_SMOOTHING}", (weight.shape[1],), positive=True)
    bias = None
    if f"{stored}.bias" in tensors:
        bias = tensors.take(f"{stored}.bias", FLOATS, (weight.shape[0],))
    inputs, scheme = None, InputScheme("int8", True, "token") if kind == DYNAMIC else None
    if kind == STATIC:
        inputs, bias = _static(stored, weight, tensors)
        scheme = InputScheme("int8", inputs.offset is None, "tensor")
    return name, Quantized(Scheme(weight.scheme, scheme), weight, inputs, smooth_scales, bias)


def _weight(stored: str, kind: str, group_size: int, tensors: Tensors) -> QuantizedWeight:
    codes = tensors.take(f"{stored}.weight", (torch.int8,))
    if codes.dim() != 2 or codes.numel() == 0:
        raise tensors.problem(f"{stored}.weight", f"has shape {list(codes.shape)}; accepted: a matrix")
    key = f"{stored}.weight_scale"
    if key not in tensors and kind == STATIC:
        outputs = codes.size(0)
        scale = _deq_scale(stored, outputs, tensors) / _input_scale(stored, tensors)
        return QuantizedWeight(WeightScheme("int8"), codes, scale)
    columns = tensors.shape(key)[-1] if len(tensors.shape(key)) == 2 else 1
    grouped = columns > 1
    if kind == W4A16:
        codes = _unpack(codes, grouped)
    if grouped and (
        group_size == 0 or kind in (STATIC, DYNAMIC) or columns != -(-codes.size(1) // group_size)
    ):
        raise tensors.problem(
            key,
            f"has {columns} groups of {codes.size(1)} inputs, in a {kind} layer with group_size {group_size}",
        )
    shapes = ((codes.size(0), columns),) if grouped else ((codes.size(0), 1), (codes.size(0),))
    scale = tensors.scale(key, *shapes).reshape(codes.size(0), columns)
    offset = tensors.take(f"{stored}.weight_offset", FLOATS)
    half = 8 if kind == W4A16 else 128
    if offset.numel() != scale.numel() or bool(((offset != offset.round()) | (offset.abs() > half)).any()):
        raise tensors.problem(f"{stored}.weight_offset", f"is no integer up to {half} for each scale")
    if kind in (STATIC, DYNAMIC) and bool(offset.any()):
        raise tensors.problem(f"{stored}.weight_offset", f"is not 0; accepted: 0 in a {kind} layer")
    symmetric = not bool(offset.any())
    scheme = WeightScheme(
        "int4" if kind == W4A16 else "int8",
        symmetric,
        "group" if grouped else "channel",
        group_size if grouped else None,
    )
    whole = None if symmetric else offset.reshape(scale.shape).to(torch.int32)
    if not grouped:
        scale, whole = scale.squeeze(1), None if whole is None else whole.squeeze(1)
    return QuantizedWeight(scheme, codes, scale, whole)


def _static(stored: str, weight: QuantizedWeight, tensors: Tensors) -> tuple[InputParameters, Tensor]:
    """The quantization of the input, and the bias of the layer (float64, which has every quotient)."""
    scale, deq_scale = _input_scale(stored, tensors), _deq_scale(stored, weight.shape[0], tensors)
    if not torch.allclose(deq_scale, scale * weight.scale, rtol=1e-2, atol=0):
        raise tensors.problem(f"{stored}.deq_scale", "is not input_scale * weight_scale")
    offset = tensors.take(f"{stored}.input_offset", FLOATS).reshape(-1)
    if offset.numel() != 1 or not -128 <= float(offset) <= 127 or float(offset) != round(float(offset)):
        raise tensors.problem(f"{stored}.input_offset", "is no integer of 8 bits")
    quant_bias = tensors.take(f"{stored}.quant_bias", (torch.int32,), (weight.shape[0],))
    bias = _own_bias(quant_bias, weight.codes, offset, deq_scale)
    return InputParameters(scale, offset.to(torch.int32) if bool(offset.any()) else None), bias


def _input_scale(stored: str, tensors: Tensors) -> Tensor:
    return tensors.scale(f"{stored}.input_scale", (1,), (), positive=True).reshape(1)


def _deq_scale(stored: str, outputs: int, tensors: Tensors) -> Tensor:
    key = f"{stored}.deq_scale"
    if tensors.dtype(key) != torch.int64:
        return tensors.scale(key, (outputs,))
    bits = tensors.take(key, (torch.int64,), (outputs,))
    scale = (bits & 0xFFFFFFFF).to(torch.int32).view(torch.float32)
    if bool((bits >> 32 != 0).any()) or not bool(((scale >= 0) & scale.isfinite()).all()):
        raise tensors.problem(key, "is no fp32 scale in the low bits of an int64")
    return scale
