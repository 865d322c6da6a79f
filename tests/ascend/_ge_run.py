"""Run a GE graph on the CPU: what torchair lowered to, by the documentation of the GE operators.

torchair itself runs the FX graph offline. That says nothing about the lowering: an argument that a converter
drops, a view that it derives wrongly or outputs in another order are only in the GE graph. Operators with a
fused torch_npu counterpart use its CPU kernel; rotation and quantization are written out, because torchair
lowers those calls to several GE operators. MlaPrologV3 and KvRmsNormRopeCache write into the caches given.

Source: the docstrings (REG_OP) in torchair's auto_generated_ge_raw_ops.py, torch_npu 2.13.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchair.ge._ge_graph import _ge_proto_dtype_to_ge_dtype, ge_type_to_torch_type

npu = torch.ops.npu

HIFLOAT8, E8M0, FLOAT4, FLOAT4_E1M2 = 290, 293, 296, 297
# Types without a dtype in (all releases of) PyTorch, as GE's protocol and as its operators number them.
_IN_PROTOCOL = {33: HIFLOAT8, 36: E8M0, 39: FLOAT4, 40: FLOAT4_E1M2}
_IN_OPERATORS = {34: HIFLOAT8, 37: E8M0, 40: FLOAT4, 41: FLOAT4_E1M2}


class Operator:
    """One operator of a GE graph."""

    def __init__(self, op: Any) -> None:
        self.op = op

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute as a Python value; ``default`` is GE's own, which torchair may leave out."""
        if name not in self.op.attr:
            return default
        value = self.op.attr[name]
        field = value.WhichOneof("value")
        if field == "list":
            return list(value.list.b or value.list.i or value.list.f or value.list.s)
        found = getattr(value, field)
        return found.decode() if field == "s" else found

    def attributes(self, *names: str) -> dict[str, Any]:
        """Those of ``names`` that are not left out."""
        return {name: self.attribute(name, None) for name in names if name in self.op.attr}

    @property
    def inputs(self) -> dict[str, str]:
        """Name of each input that is connected -> the value, as ``operator:index``."""
        data = [value for value in self.op.input if not value.endswith(":-1")]  # the rest are control edges
        pairs = zip(self.op.input_desc, data, strict=True)
        return {desc.name: value for desc, value in pairs if value}


class Given:
    """The arguments of one operator: ``x.name`` is an input (None if not connected)."""

    def __init__(self, operator: Operator, values: dict[str, Tensor]) -> None:
        self.operator = operator
        self.values = values

    def __getattr__(self, name: str) -> Any:
        return self.values.get(name)

    def element(self, name: str) -> int | None:
        """The GE type of an input, for those that carry one without a dtype in PyTorch in their bytes."""
        types = {d.name: d.dtype for d in self.operator.op.input_desc}
        return _IN_PROTOCOL.get(types[name])

    def numbers(self, name: str) -> list[int]:
        """A shape or a permutation, which GE gets as a tensor."""
        return [int(v) for v in self.values[name].reshape(-1)]

    def many(self) -> list[Tensor]:
        """The inputs x0, x1 .. of an operator with any number of them."""
        return [self.values[f"x{i}"] for i in range(self.attribute("N", None))]

    def named(self, *names: str) -> dict[str, Tensor]:
        """Those of ``names`` that are connected, as keyword arguments."""
        return {name: self.values[name] for name in names if name in self.values}

    def attribute(self, name: str, default: Any) -> Any:
        return self.operator.attribute(name, default)

    def dtype(self, name: str = "dst_type") -> torch.dtype:
        return ge_type_to_torch_type(self.attribute(name, None))


def _constant(x: Given) -> Tensor:
    value = x.operator.op.attr["value"].t
    dtype = ge_type_to_torch_type(_ge_proto_dtype_to_ge_dtype(value.desc.dtype))
    shape = list(value.desc.shape.dim)
    if not value.data:
        return torch.empty(shape or [0], dtype=dtype)
    return torch.frombuffer(bytearray(value.data), dtype=dtype).reshape(shape)


def _sliced(x: Given) -> Tensor:
    result = x.x
    axes = x.numbers("axes") if x.axes is not None else range(len(x.numbers("begin")))
    strides = x.numbers("strides") if x.strides is not None else [1] * len(x.numbers("begin"))
    for axis, begin, end, step in zip(axes, x.numbers("begin"), x.numbers("end"), strides, strict=True):
        result = torch.ops.aten.slice.Tensor(result, axis, begin, end, step)
    return result


def _unsqueezed(x: Given) -> Tensor:
    result, axes = x.x, x.attribute("axes", [])
    rank = result.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        result = result.unsqueeze(axis)
    return result


def _squeezed(x: Given) -> Tensor:
    axes = x.attribute("axis", [])
    return x.x.squeeze(axes) if axes else x.x.squeeze()


def _gathered(x: Given) -> Tensor:
    axis = int(x.axis) % x.x.dim()
    chosen = x.x.index_select(axis, x.indices.reshape(-1).long())
    shape = (*x.x.shape[:axis], *x.indices.shape, *x.x.shape[axis + 1 :])
    return chosen.reshape(shape)


def _indexed(x: Given) -> Tensor:
    mask = x.attribute("indices_mask", [])
    assert all(mask)
    return x.x[tuple(x.values[f"indices{i}"].long() for i in range(len(mask)))]


def _transposed(x: Given) -> Tensor:
    return x.x.permute(x.numbers("perm"))


def _matmul(x: Given, left: str, right: str) -> Tensor:
    a = x.x1.transpose(-1, -2) if x.attribute(left, False) else x.x1
    b = x.x2.transpose(-1, -2) if x.attribute(right, False) else x.x2
    return a @ b if x.bias is None else a @ b + x.bias


def _softmax(x: Given) -> Tensor:
    (axis,) = x.attribute("axes", [-1])
    return torch.softmax(x.x, axis, torch.float32 if x.attribute("half_to_float", False) else None)


def _int8(x: Tensor) -> Tensor:
    return x.round().clamp(-128, 127).to(torch.int8)


def _quantize(x: Given) -> Tensor:
    y = x.x.float() / x.scales.float()
    return _int8(y if x.zero_points is None else y + x.zero_points.float())


def _ascend_quant(x: Given) -> Tensor:
    assert not x.attribute("sqrt_mode", False)
    axis = x.attribute("axis", -1)
    y = x.x.float().movedim(axis, -1) * x.scale.float()
    return _int8(y if x.offset is None else y + x.offset.float()).movedim(-1, axis)


def _rotated(x: Given) -> Tensor:
    first, second = x.x.float().chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (x.x.float() * x.r1.float() + turned * x.r2.float()).to(x.x.dtype)


def _with_mode(x: Given) -> Tensor:
    mode = {0: "half", 1: "interleave"}[x.attribute("mode", 0)]
    return npu.npu_rotary_mul(x.values["x"], x.values["cos"], x.values["sin"], mode)


def _quant_matmul(x: Given) -> Tensor:
    assert not x.attribute("transpose_x1", False) and not x.attribute("transpose_x2", False)
    more = x.named("offset", "bias", "pertoken_scale")
    return npu.npu_quant_matmul(x.x1, x.x2, x.scale, **more, output_dtype=x.dtype("dtype"))


def _bitcast(x: Given) -> Tensor:
    """Bytes stay bytes. Without ``keep_dim`` two numbers of 4 bits become a dimension of their own."""
    element = _IN_OPERATORS.get(x.attribute("type", None))
    if element in (FLOAT4, FLOAT4_E1M2) and not x.attribute("keep_dim", False):
        return torch.stack([x.x & 0xF, x.x >> 4], dim=-1)
    return x.x.view(x.dtype("type")) if element is None else x.x


def _packed(x2: Tensor, inner: int) -> Tensor:
    """float4 as npu_quant_matmul takes it: two numbers in a byte, which a Bitcast may have taken apart."""
    return x2 if x2.size(0) != inner else (x2[0::2] | x2[1::2] << 4).t().contiguous().t()


def _quant_matmul_v4(x: Given) -> Tensor:
    assert not x.attribute("transpose_x1", False)
    x2, scale, x2_dtype = x.x2, x.x2_scale, x.element("x2")
    blocks = scale.dim() == 3  # torchair does not say the type of transposed e8m0
    if x.attribute("transpose_x2", False):
        x2, scale = x2.mT, scale.transpose(0, 1) if blocks else scale
    if x2.dtype == torch.uint8 and x2_dtype != HIFLOAT8:
        x2, x2_dtype = _packed(x2, x.x1.size(-1)), FLOAT4
    size = x.attribute("group_size", 0)
    return npu.npu_quant_matmul(
        x.x1,
        x2,
        scale,
        pertoken_scale=x.x1_scale,
        bias=x.bias,
        output_dtype=x.dtype("dtype"),
        x1_dtype=x.element("x1"),
        x2_dtype=x2_dtype,
        pertoken_scale_dtype=E8M0 if blocks else None,
        scale_dtype=E8M0 if blocks else None,
        group_sizes=[size >> 32, size >> 16 & 0xFFFF, size & 0xFFFF] if size else None,
        y_scale=None if x.y_scale is None else x.y_scale.view(torch.int64),
    )


def _weight_quant_matmul(x: Given) -> Tensor:
    given = (x.x, x.weight, x.antiquant_scale)
    options = x.operator.attributes("antiquant_group_size", "inner_precise")
    return npu.npu_weight_quant_batchmatmul(*given, bias=x.bias, weight_dtype=x.element("weight"), **options)


def _quant_conv2d(x: Given) -> Tensor:
    top, bottom, left, right = x.attribute("pads", None)
    assert (top, left) == (bottom, right)
    strides, dilations = x.attribute("strides", None)[2:], x.attribute("dilations", None)[2:]
    more = (x.attribute("groups", 1), x.attribute("offset_x", 0), x.attribute("round_mode", "rint"))
    types = x.element("x"), x.element("filter")
    output = {0: 6, 1: 5, 27: 15, 34: 290}[x.attribute("dtype", None)]
    operands = x.values["x"], x.values["filter"], x.scale
    return npu.npu_quant_conv2d(
        *operands, strides, (top, left), dilations, *more, output, x.bias, None, *types
    )


def _dequant_swiglu_quant(x: Given) -> Any:
    tensors = x.named(
        "weight_scale", "activation_scale", "bias", "quant_scale", "quant_offset", "group_index"
    )
    mode = {"static": 0, "dynamic": 1}[x.attribute("quant_mode", "static")]
    assert x.dtype() == torch.int8 and x.attribute("round_mode", "rint") == "rint"
    left = x.attribute("activate_left", False)
    return npu.npu_dequant_swiglu_quant(x.x, **tensors, activate_left=left, quant_mode=mode)


def _add_rms_norm_dynamic_quant(x: Given) -> Any:
    tensors = x.named("smooth_scale1", "smooth_scale2", "beta")
    options = x.operator.attributes("epsilon", "output_mask")
    return npu.npu_add_rms_norm_dynamic_quant(x.x1, x.x2, x.gamma, **tensors, **options)


def _dynamic_quant(x: Given) -> Any:
    return npu.npu_dynamic_quant(x.x, **x.named("smooth_scales", "group_index"))


def _in_place(caches: Sequence[Tensor], written: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(cache.copy_(value) for cache, value in zip(caches, written, strict=True))


def _kv_rmsnorm_rope_cache(x: Given) -> Any:
    given = (x.kv, x.gamma, x.cos, x.sin, x.index, x.k_cache, x.ckv_cache)
    options = x.operator.attributes("epsilon", "cache_mode", "is_output_kv")
    rotated, latent, *written = npu.npu_kv_rmsnorm_rope_cache_v2_functional(*given, **options)
    return *_in_place((x.k_cache, x.ckv_cache), written), rotated, latent


def _mla_prolog(x: Given) -> Any:
    tensors = ["token_x", "weight_dq", "weight_uq_qr", "weight_uk", "weight_dkv_kr", "rmsnorm_gamma_cq"]
    tensors += ["rmsnorm_gamma_ckv", "rope_sin", "rope_cos", "kv_cache", "kr_cache"]
    more = {name: value for name, value in x.values.items() if name not in tensors}
    options = x.operator.attributes(*(name for name in x.operator.op.attr if not name.startswith("_")))
    results = npu.npu_mla_prolog_v3_functional(*(x.values[t] for t in tensors), **more, **options)
    query, rotated, scale, normed, scale_normed, *written = results
    return query, rotated, *_in_place((x.kv_cache, x.kr_cache), written), scale, normed, scale_normed


def _epsilon(x: Given) -> tuple[float]:
    return (x.attribute("epsilon", 1e-6),)


_RUN: dict[str, Callable[[Given], Any]] = {
    "Const": _constant,
    "Reshape": lambda x: x.x.reshape(x.numbers("shape")),
    "Transpose": _transposed,
    "Unsqueeze": _unsqueezed,
    "Squeeze": _squeezed,
    "StridedSliceV2": _sliced,
    "ConcatV2": lambda x: torch.cat(x.many(), int(x.concat_dim)),
    "Pack": lambda x: torch.stack(x.many(), x.attribute("axis", 0)),
    "Shape": lambda x: torch.tensor(x.x.shape, dtype=torch.int64),
    "Gather": lambda x: x.x[x.indices.long()],
    "GatherV2": _gathered,
    "IndexByTensor": _indexed,
    "SplitV": lambda x: x.x.split(x.numbers("size_splits"), int(x.split_dim)),
    "BroadcastTo": lambda x: x.x.expand(x.numbers("shape")),
    "Fill": lambda x: x.value.expand(x.numbers("dims")),
    "Empty": lambda x: torch.full(x.numbers("shape"), torch.nan),
    "Range": lambda x: torch.arange(x.start.item(), x.limit.item(), x.delta.item()),
    "Identity": lambda x: x.x,
    "TensorMove": lambda x: x.x.clone(),
    "Assign": lambda x: x.ref.copy_(x.value),
    "Cast": lambda x: x.x.to(x.dtype()),
    "Add": lambda x: x.x1 + x.x2,
    "Sub": lambda x: x.x1 - x.x2,
    "Mul": lambda x: x.x1 * x.x2,
    "Muls": lambda x: x.x * x.attribute("value", None),
    "RealDiv": lambda x: x.x1 / x.x2,
    "Pow": lambda x: x.x1**x.x2,
    "FloorDiv": lambda x: x.x1 // x.x2,
    "FloorMod": lambda x: torch.remainder(x.x1, x.x2),
    "Cumsum": lambda x: x.x.cumsum(int(x.axis)).to(x.x.dtype),
    "LogicalAnd": lambda x: x.x1 & x.x2,
    "Equal": lambda x: x.x1 == x.x2,
    "NotEqual": lambda x: x.x1 != x.x2,
    "LessEqual": lambda x: x.x1 <= x.x2,
    "SelectV2": lambda x: torch.where(x.condition, x.then, x.values["else"]),
    "Neg": lambda x: -x.x,
    "Cos": lambda x: x.x.cos(),
    "Sin": lambda x: x.x.sin(),
    "Round": lambda x: x.x.round(),
    "Reciprocal": lambda x: x.x.reciprocal(),
    "ZerosLike": lambda x: torch.zeros_like(x.x),
    "SoftmaxV2": _softmax,
    "MatMul": lambda x: _matmul(x, "transpose_x1", "transpose_x2"),
    "BatchMatMul": lambda x: _matmul(x, "adj_x1", "adj_x2"),
    "SwiGlu": lambda x: npu.npu_swiglu(x.x, x.attribute("dim", -1)),
    "RmsNorm": lambda x: npu.npu_rms_norm(x.x, x.gamma, *_epsilon(x)),
    "AddRmsNorm": lambda x: npu.npu_add_rms_norm(x.x1, x.x2, x.gamma, *_epsilon(x)),
    "AddRmsNormCast": lambda x: npu.npu_add_rms_norm_cast(x.x1, x.x2, x.gamma, *_epsilon(x)),
    "AddRmsNormDynamicQuant": _add_rms_norm_dynamic_quant,
    "DynamicQuant": _dynamic_quant,
    "Quantize": _quantize,
    "AscendQuantV2": _ascend_quant,
    "QuantBatchMatmulV3": _quant_matmul,
    "QuantBatchMatmulV4": _quant_matmul_v4,
    "WeightQuantBatchMatmulV2": _weight_quant_matmul,
    "QuantConv2D": _quant_conv2d,
    "Bitcast": _bitcast,
    "DequantSwigluQuant": _dequant_swiglu_quant,
    "RotaryMul": _rotated,
    "RotaryPositionEmbedding": _with_mode,
    "InterleaveRope": lambda x: npu.npu_interleave_rope(x.x, x.cos, x.sin),
    "KvRmsNormRopeCache": _kv_rmsnorm_rope_cache,
    "MlaPrologV3": _mla_prolog,
}


def run(graph: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a GE graph (GraphDef); ``inputs`` are those of its Data operators and may be written."""
    values: dict[str, Tensor] = {}
    for op in graph.op:
        operator = Operator(op)
        if op.type == "NetOutput":
            return [values[value] for value in operator.inputs.values()]
        if op.type == "Data":
            results: Any = inputs[operator.attribute("index", None)]
        else:
            given = {name: values[value] for name, value in operator.inputs.items()}
            results = _RUN[op.type](Given(operator, given))
        results = results if isinstance(results, tuple) else (results,)
        values |= {f"{op.name}:{index}": result for index, result in enumerate(results)}
    raise AssertionError("the graph has no NetOutput")
