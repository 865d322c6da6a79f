"""Checkpoints of compressed-tensors, which llm-compressor writes.

::

    int-quantized     weight int8 [N, K]
    float-quantized   weight float8_e4m3fn [N, K]
    pack-quantized    weight_packed int32 [N, ceil(K * bits / 32)], lowest bits first, code + 2^(bits-1);
                      weight_shape int64 [2] = N, K
    all               weight_scale [1], [N, 1], [N, G] or, of blocks, [N / 128, K / 128];
                      weight_zero_point as weight_scale, but where weights are packed, int32
                      [ceil(N * bits / 32), G], packed along N;
                      weight_g_idx int32 [K], the group of each input (actorder "group")
    static inputs     input_scale [1], input_zero_point [1]

    W[n, k] = (code[n, k] - zero_point[n, g]) * scale[n, g]
    q = round(x / input_scale + input_zero_point)

``quantization_config`` says for groups of layers, by name, pattern or class, how weights and inputs are
quantized, and which layers are left out (``ignore``). A name counts more than a pattern, and a pattern more
than a class.

What no deployed layer has becomes a float weight with the same numbers, and is in the report: scales of
blocks, groups of scattered inputs, inputs with one dynamic scale for all of them, int8 inputs beside int4
weights. What changes more than layers is refused: quantized outputs, transforms, sparse formats. Scales of a
quantized cache are passed over, and are in the report.

Source: the formats of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_fusion.quantization.checkpoints._files import FLOATS, Tensors
from npu_fusion.quantization.checkpoints._found import Dense, Found, Quantized
from npu_fusion.quantization.checkpoints._integers import grouped_weight
from npu_fusion.quantization.checkpoints._json import entry
from npu_fusion.quantization.checkpoints._packing import WORD, unpack
from npu_fusion.quantization.checkpoints._patterns import Patterns, class_names
from npu_fusion.quantization.checkpoints._reader import Reader
from npu_fusion.quantization.checkpoints._target import Target
from npu_fusion.quantization.checkpoints.deepseek_fp8 import block_size, multiply_blocks
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import InputScheme, Scheme, WeightScheme

_PACKED, _INT, _FLOAT = "pack-quantized", "int-quantized", "float-quantized"
_FORMATS = (_INT, _PACKED, _FLOAT, "naive-quantized", "mixed-precision")
_NAMES = ("weight_packed", "weight_scale")
_CACHE = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point")


@dataclass(frozen=True)
class _Args:
    """Of weights or inputs; the fields of compressed-tensors' QuantizationArgs that matter."""

    bits: int
    type: str
    symmetric: bool
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    dynamic: bool


@dataclass(frozen=True)
class _Group:
    """Layers that are quantized in one way."""

    targets: Patterns
    weights: _Args
    inputs: _Args | None
    format: str


class CompressedTensorsReader(Reader):
    """compressed-tensors: int-quantized, pack-quantized, float-quantized."""

    name = "compressed-tensors"
    methods = ("compressed-tensors",)

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        super().__init__(config, where)
        layout = entry(self.config, "format", str, where)
        if layout not in _FORMATS:
            raise ValueError(f"{where}: format is {layout!r}; accepted: {', '.join(_FORMATS)}")
        status = entry(self.config, "quantization_status", str, where, "compressed")
        if status != "compressed":
            raise ValueError(f"{where}: quantization_status is {status!r}; accepted: 'compressed'")
        for name in ("transform_config", "sparsity_config"):
            extra = entry(self.config, name, dict, where, {})
            if extra and extra.get("format") != "dense" and any(extra.values()):
                raise ValueError(f"{where}: {name} is given; accepted: none")
        self.ignore = Patterns(entry(self.config, "ignore", list, where, []), f"{where}: ignore")
        groups = entry(self.config, "config_groups", dict, where)
        if not groups:
            raise ValueError(f"{where}: config_groups is empty")
        self.groups = [
            _group(group, layout, f"{where}: config_groups.{name}") for name, group in groups.items()
        ]

    def read(self, tensors: Tensors, target: Target) -> None:
        names = dict.fromkeys(
            key.rpartition(".")[0] for key in tensors if key.rpartition(".")[2] in _NAMES and "." in key
        )
        if not names:
            raise ValueError(f"{self.where}: says compressed-tensors, but no tensor is a weight_scale")
        for name in names:
            classes = class_names(target.modules.get(name))
            group = self._group_of(name, classes)
            if group is None:
                raise target.problem(name, f"has scales, and is in no group of {self.where}, or ignored")
            target.place(name, _layer(name, group, tensors))
        for key in tensors.left():
            # Scales of a quantized cache of keys and values, which the model computes without.
            if key.rpartition(".")[2] in _CACHE:
                target.ignore(key)

    def _group_of(self, name: str, classes: Any) -> _Group | None:
        if self.ignore.match(name, classes) is not None:
            return None
        matches = [(match, group) for group in self.groups if (match := group.targets.match(name, classes))]
        return min(matches, key=lambda match: match[0])[1] if matches else None


def _group(given: Any, layout: str, where: str) -> _Group:
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {given!r}; accepted: a group with targets and weights")
    if entry(given, "output_activations", dict, where, {}):
        raise ValueError(f"{where}: output_activations is given; accepted: none")
    own = entry(given, "format", str, where, layout)
    if own not in _FORMATS[:4]:
        raise ValueError(f"{where}: format is {own!r}; accepted: {', '.join(_FORMATS[:4])}")
    inputs = entry(given, "input_activations", dict, where, None)
    return _Group(
        Patterns(entry(given, "targets", list, where), f"{where}: targets"),
        _args(entry(given, "weights", dict, where), f"{where}: weights"),
        None if inputs is None else _args(inputs, f"{where}: input_activations"),
        own,
    )


def _args(given: dict[str, Any], where: str) -> _Args:
    bits, kind = entry(given, "num_bits", int, where, 8), entry(given, "type", str, where, "int")
    if (kind, bits) not in (("int", 2), ("int", 4), ("int", 8), ("float", 8)):
        raise ValueError(
            f"{where}: type is {kind!r} with num_bits {bits}; accepted: int with 2, 4 or 8, float with 8"
        )
    size = entry(given, "group_size", int, where, None)
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = entry(given, "strategy", str, where, default)
    if strategy not in ("tensor", "channel", "group", "block", "token"):
        raise ValueError(f"{where}: strategy is {strategy!r}; accepted: tensor, channel, group, block, token")
    if strategy == "group" and (size is None or size < 1):
        raise ValueError(f"{where}: group_size is {size} with strategy 'group'; accepted: at least 1")
    block = block_size(given.get("block_structure"), where) if strategy == "block" else None
    # "local" is a mixture that only 4-bit floats have.
    dynamic = entry(given, "dynamic", bool, where, False)
    symmetric = entry(given, "symmetric", bool, where, True)
    if not symmetric and kind == "float":
        raise ValueError(f"{where}: symmetric is false for floats; accepted: true")
    return _Args(bits, kind, symmetric, strategy, size if strategy == "group" else None, block, dynamic)


def _layer(name: str, group: _Group, tensors: Tensors) -> Found:
    weights = group.weights
    packed = f"{name}.weight_packed" in tensors
    dtype = torch.int32 if packed else torch.float8_e4m3fn if weights.type == "float" else torch.int8
    accepted = {_PACKED: (torch.int32,), _INT: (torch.int8,), _FLOAT: (torch.float8_e4m3fn,)}
    if dtype not in accepted.get(group.format, (torch.int8, torch.float8_e4m3fn)):
        stored = "weight_packed" if packed else f"{weights.type} weights"
        raise tensors.problem(
            f"{name}.weight_scale", f"is beside {stored}; accepted: those of {group.format}"
        )
    weight = _weight(name, weights, packed, tensors)
    if isinstance(weight, Dense):
        _inputs(name, group, tensors)
        return weight
    scheme, parameters, reason = _inputs(name, group, tensors)
    if reason is not None:
        return Dense(weight.dequantize(), reason)
    return Quantized(Scheme(weight.scheme, scheme), weight, parameters)


def _weight(name: str, args: _Args, packed: bool, tensors: Tensors) -> QuantizedWeight | Dense:
    if args.type == "float":
        codes = tensors.take(f"{name}.weight", (torch.float8_e4m3fn,))
        if args.block is not None:
            value = multiply_blocks(name, codes, f"{name}.weight_scale", args.block, tensors)
            return Dense(value, f"its scales are of blocks of {args.block[0]} x {args.block[1]}")
        if bool(codes.float().isnan().any()):
            raise tensors.problem(f"{name}.weight", "has NaN")
        outputs, inputs = _sizes(f"{name}.weight", codes, tensors)
        scale = _scale(name, args, outputs, inputs, tensors)
        return QuantizedWeight(_weight_scheme("float8_e4m3fn", args, scale), codes, _flat(scale))
    if packed:
        values = _unpacked(name, args.bits, tensors)
    else:
        values = tensors.take(f"{name}.weight", (torch.int8,)).to(torch.int16) + 2 ** (args.bits - 1)
        if bool((values < 0).any()) or bool((values >= 2**args.bits).any()):
            raise tensors.problem(f"{name}.weight", f"has numbers of more than {args.bits} bits")
        values = values.to(torch.uint8)
    outputs, inputs = _sizes(f"{name}.weight_packed" if packed else f"{name}.weight", values, tensors)
    scale = _scale(name, args, outputs, inputs, tensors)
    zeros = _zeros(name, args, packed, outputs, scale, tensors)
    g_idx = _scattered(name, args, inputs, scale.size(-1), tensors)
    if g_idx is not None:
        shifted = values.float() - (2.0 ** (args.bits - 1) if zeros is None else zeros.float()[:, g_idx])
        return Dense(shifted * scale[:, g_idx], "the inputs of a group are not neighbours (actorder)")
    if args.strategy == "tensor":
        scale = scale.reshape(1, 1)
        whole = grouped_weight(values, zeros, scale, args.bits, inputs)
        return QuantizedWeight(
            WeightScheme(whole.scheme.type, whole.scheme.symmetric, "tensor"),
            whole.codes,
            whole.scale,
            whole.offset,
        )
    return grouped_weight(values, zeros, scale, args.bits, args.group_size or inputs)


def _sizes(key: str, values: Tensor, tensors: Tensors) -> tuple[int, int]:
    if values.dim() != 2 or values.numel() == 0:
        raise tensors.problem(key, f"has shape {list(values.shape)}; accepted: [N, K]")
    return values.size(0), values.size(1)


def _scale(name: str, args: _Args, outputs: int, inputs: int, tensors: Tensors) -> Tensor:
    """[N, G], or [1, 1] of the whole weight."""
    key = f"{name}.weight_scale"
    if args.strategy == "tensor":
        return tensors.scale(key, (1,), (), (1, 1)).reshape(1, 1)
    if args.strategy == "channel":
        return tensors.scale(key, (outputs, 1), (outputs,)).reshape(outputs, 1)
    if args.strategy == "group":
        assert args.group_size is not None, "_args has seen to it"
        return tensors.scale(key, (outputs, -(-inputs // args.group_size)))
    raise tensors.problem(key, f"is of strategy {args.strategy!r}; accepted: tensor, channel, group")


def _unpacked(name: str, bits: int, tensors: Tensors) -> Tensor:
    """uint8 [N, K]."""
    sizes = tensors.take(f"{name}.weight_shape", (torch.int64, torch.int32), (2,)).tolist()
    key = f"{name}.weight_packed"
    words = tensors.take(key, (torch.int32,))
    if min(sizes) < 1 or tuple(words.shape) != (sizes[0], -(-sizes[1] * bits // WORD)):
        raise tensors.problem(
            key, f"has shape {list(words.shape)}; accepted: that of a weight {sizes} of {bits} bits"
        )
    return unpack(words, bits)[:, : sizes[1]]


def _zeros(
    name: str, args: _Args, packed: bool, outputs: int, scale: Tensor, tensors: Tensors
) -> Tensor | None:
    """Zero points as unsigned integers in the shape of the scale; None: the middle of the range."""
    key = f"{name}.weight_zero_point"
    if key not in tensors:
        if not args.symmetric:
            raise tensors.problem(
                f"{name}.weight_scale", "is of an asymmetric weight, and weight_zero_point is missing"
            )
        return None
    half = 2 ** (args.bits - 1)
    if packed and not args.symmetric and args.strategy != "tensor":
        words = tensors.take(key, (torch.int32,), (-(-outputs * args.bits // WORD), scale.size(1)))
        return unpack(words.t(), args.bits).t()[:outputs]
    if tensors.shape(key) not in _forms(scale):
        raise tensors.problem(key, f"has shape {list(tensors.shape(key))}; accepted: {list(scale.shape)}")
    return _integers(key, tensors, args).reshape(scale.shape) + half


def _forms(scale: Tensor) -> list[tuple[int, ...]]:
    """Shapes that files have for zero points beside this scale."""
    one = [(), (1,)] if scale.numel() == 1 else []
    return [tuple(scale.shape), tuple(scale.shape[: 1 if scale.size(1) == 1 else 2]), *one]


def _integers(key: str, tensors: Tensors, args: _Args) -> Tensor:
    """Zero points, int32. Those of symmetric weights and inputs are 0."""
    given = tensors.take(key, (torch.int8, torch.int32, torch.int64, torch.float8_e4m3fn, *FLOATS)).double()
    half = 2 ** (args.bits - 1)
    if not bool(((given == given.round()) & (given >= -half) & (given < half)).all()):
        raise tensors.problem(key, f"has others than integers of {args.bits} bits")
    if args.symmetric and bool(given.any()):
        raise tensors.problem(key, "is not 0; accepted: 0, because the config says symmetric")
    return given.to(torch.int32)


def _scattered(name: str, args: _Args, inputs: int, groups: int, tensors: Tensors) -> Tensor | None:
    """The group of each input, if that is not its number divided by the size of a group."""
    key = f"{name}.weight_g_idx"
    if key not in tensors:
        return None
    g_idx = tensors.take(key, (torch.int32, torch.int64), (inputs,)).to(torch.int64)
    if bool((g_idx == -1).all()):
        return None  # as it is when nothing was ordered
    if bool((g_idx < 0).any()) or bool((g_idx >= groups).any()):
        raise tensors.problem(
            key, f"has groups from {int(g_idx.min())} to {int(g_idx.max())}; accepted: 0 to {groups - 1}"
        )
    return None if torch.equal(g_idx, torch.arange(inputs) // (args.group_size or inputs)) else g_idx


def _weight_scheme(type: str, args: _Args, scale: Tensor) -> WeightScheme:
    if args.strategy == "group" and scale.size(1) > 1:
        return WeightScheme(type, True, "group", args.group_size)
    return WeightScheme(type, True, "tensor" if args.strategy == "tensor" else "channel")


def _flat(scale: Tensor) -> Tensor:
    return scale.squeeze(1) if scale.size(1) == 1 else scale


def _inputs(
    name: str, group: _Group, tensors: Tensors
) -> tuple[InputScheme | None, InputParameters | None, str | None]:
    """The scheme and the parameters of the input, or why no deployed layer has such inputs."""
    args = group.inputs
    if args is None:
        return None, None, None
    type = "int8" if args.type == "int" else "float8_e4m3fn"
    if not args.dynamic:
        key = f"{name}.input_scale"
        scale = tensors.scale(key, (1,), (), positive=True).reshape(1)
        offset = _input_offset(name, args, tensors)
        if args.strategy != "tensor":
            raise tensors.problem(
                key, f"is of strategy {args.strategy!r}; accepted: tensor, if inputs are not dynamic"
            )
        if args.bits != 8:
            return None, None, f"its inputs have {args.bits} bits"
        return InputScheme(type, args.symmetric, "tensor"), InputParameters(scale, offset), None
    if args.strategy != "token" or args.bits != 8 or not args.symmetric:
        kind = f"{args.type} of {args.bits} bits, {'' if args.symmetric else 'a'}symmetric"
        return None, None, f"its inputs are quantized at run time for each {args.strategy} ({kind})"
    return InputScheme(type, True, "token"), None, None


def _input_offset(name: str, args: _Args, tensors: Tensors) -> Tensor | None:
    key = f"{name}.input_zero_point"
    if key not in tensors:
        if not args.symmetric:
            raise tensors.problem(
                f"{name}.input_scale", "is of an asymmetric input, and input_zero_point is missing"
            )
        return None
    if tensors.shape(key) not in ((1,), ()):
        raise tensors.problem(key, f"has shape {list(tensors.shape(key))}; accepted: [1]")
    offset = _integers(key, tensors, args).reshape(1)
    return None if args.symmetric else offset
