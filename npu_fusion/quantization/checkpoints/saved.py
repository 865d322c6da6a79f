"""Our own form: a state dict in safetensors, and a description of the deployed layers in JSON.

::

    npu_fusion_quantization.json
      format, format_version, npu_fusion_version
      weights     the file with the tensors, or the index of several
      layers      layer -> what Deployed.describe() says, of which empty() makes it without values
      shared      names of one and the same tensor, which is in the file under the first of them
      buffers     tensors in the file that are in no state dict (the frequencies of a rotary embedding)

Keys are those of ``model.state_dict()``, hence of the model before :func:`npu_fusion.prepare`: a gate and an
up projection that are one layer are saved as two, and each is described.

Trap: what was one tensor object has to be one again. Layers that read the same input share its smoothing or
its scale, and a compiled graph quantizes once only where both read one and the same buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from npu_fusion._version import __version__
from npu_fusion.quantization.checkpoints._files import FLOATS, Tensors
from npu_fusion.quantization.checkpoints._json import entry
from npu_fusion.quantization.checkpoints._reader import Reader
from npu_fusion.quantization.checkpoints._target import Target, device_of
from npu_fusion.quantization.modules import Deployed, empty
from npu_fusion.quantization.modules._description import DTYPES
from npu_fusion.quantization.modules.quantized_conv2d import symmetric_padding
from npu_fusion.quantization.scheme import INTEGER_TYPES

DESCRIPTION = "npu_fusion_quantization.json"
VERSION = 1
_DIVISORS = ("input_scale", "smooth_scales")
_GEOMETRY = ("stride", "padding", "dilation", "groups")


def description(
    weights: str, layers: Mapping[str, Any], shared: list[list[str]], buffers: list[str]
) -> dict[str, Any]:
    """What is written beside the tensors."""
    return {
        "format": SavedReader.name,
        "format_version": VERSION,
        "npu_fusion_version": __version__,
        "weights": weights,
        "layers": dict(layers),
        "shared": shared,
        "buffers": buffers,
    }


class SavedReader(Reader):
    """What :func:`save_checkpoint` wrote."""

    name = "npu_fusion"
    methods = ()
    siblings = False

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        super().__init__(config, where)
        if self.config.get("format") != self.name:
            raise ValueError(f"{where}: format is {self.config.get('format')!r}; accepted: {self.name!r}")
        version = entry(self.config, "format_version", int, where)
        if version != VERSION:
            writer = self.config.get("npu_fusion_version")
            raise ValueError(
                f"{where}: format_version is {version}, of npu_fusion {writer}; accepted: {VERSION} "
                f"(this is npu_fusion {__version__})"
            )
        self.weights = entry(self.config, "weights", str, where)
        if any(c in self.weights for c in "/\\:\0"):
            raise ValueError(f"{where}: weights is {self.weights!r}; accepted: the name of a file beside it")
        self.layers = entry(self.config, "layers", dict, where)
        self.buffers = _names(entry(self.config, "buffers", list, where), f"{where}: buffers")
        self.shared = [
            _names(group, f"{where}: shared") for group in entry(self.config, "shared", list, where)
        ]
        self._first = {name: group[0] for group in self.shared for name in group}
        if any(len(group) < 2 for group in self.shared) or len(self._first) != sum(map(len, self.shared)):
            raise ValueError(f"{where}: shared has a group of one name, or one name in two groups")
        self._deployed: set[str] = set()
        """Names of buffers that have got their value."""
        self._once: dict[tuple[str, torch.device], Tensor] = {}

    def read(self, tensors: Tensors, target: Target) -> None:
        for group in self.shared:
            tensors.shape(group[0])
            for name in group[1:]:
                if name in tensors:
                    raise tensors.problem(name, f"is there twice: {self.where} says that it is {group[0]}")
        for name, described in self.layers.items():
            target.replace(name, self._layer(name, described, tensors, target))
        self._tie(tensors, target)
        for name in self.buffers:
            self._buffer(name, tensors, target)

    def _layer(self, name: str, described: Any, tensors: Tensors, target: Target) -> Deployed:
        where = f"{self.where}: layers.{name}"
        layer = target.layer(name)
        try:
            # On the meta device a size that is a lie costs nothing.
            with torch.device("meta"):
                made = empty(described)
            self._fits(made, layer)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{where}: {error}") from error
        for key, place in list(made._buffers.items()):
            if place is not None:
                made._buffers[key] = self._filled(f"{name}.{key}", key, place, layer, tensors)
                self._deployed.update(f"{alias}.{key}" for alias in target.names[layer])
        if made.scheme.weights.type not in INTEGER_TYPES:
            weight = made.quantized_weight()
            if not bool(weight.numbers().isfinite().all() & weight.scale.isfinite().all()):
                raise target.problem(name, "has a weight with NaN or infinities")
        return made.train(layer.training)

    def _fits(self, made: Deployed, layer: nn.Module) -> None:
        """Raise ``ValueError`` unless ``made`` can stand for ``layer``."""
        if isinstance(layer, Deployed):
            if layer.describe() != made.describe():
                raise ValueError(f"the layer of the model is {layer.describe()}; accepted: {made.describe()}")
            return
        if type(layer) is not made.stands_for:
            raise ValueError(
                f"the layer of the model is a {type(layer).__name__}; accepted: {made.stands_for.__name__}"
            )
        weight, wanted = layer.get_parameter("weight"), made.quantized_weight().shape
        if weight.flatten(1).shape != wanted:
            raise ValueError(
                f"the layer of the model has a weight {list(weight.shape)}; accepted: {list(wanted)}"
            )
        if isinstance(layer, nn.Conv2d):
            own = (layer.stride, symmetric_padding(layer), layer.dilation, layer.groups, layer.padding_mode)
            its = tuple(getattr(made, name) for name in _GEOMETRY)
            if own != (*its, "zeros"):
                raise ValueError(
                    f"the layer of the model has {own}; accepted: {its} ({', '.join(_GEOMETRY)})"
                )
        dtypes = getattr(made, "dtypes", DTYPES)
        if weight.dtype not in dtypes:
            raise ValueError(
                f"the layer of the model is {weight.dtype}; accepted: {', '.join(map(str, dtypes))}"
            )
        has, inputs = made._buffers.get("bias") is not None, made.scheme.inputs
        # With an offset of the input there is a bias in any case.
        if has != (layer.bias is not None) and not (has and inputs is not None and not inputs.symmetric):
            raise ValueError(f"{'has a' if has else 'has no'} bias; accepted: as in the model")

    def _filled(self, full: str, key: str, place: Tensor, layer: nn.Module, tensors: Tensors) -> Tensor:
        """The value of a buffer; a shared one is the same object every time."""
        device = device_of(next(iter((*layer.parameters(), *layer.buffers()))))
        first = self._first.get(full, full)
        value = self._once.get((first, device))
        if value is None:
            value = tensors.take(first, (place.dtype,), place.shape).to(device)
        if full in self._first:
            self._once[first, device] = value
        if value.dtype != place.dtype or value.shape != place.shape:
            raise tensors.problem(first, f"is {value.dtype} {list(value.shape)}, and cannot be {full}")
        divisor = key in _DIVISORS
        wrong = place.dtype in FLOATS and not bool(value.isfinite().all())
        if wrong or (divisor and not bool((value > 0).all())):
            raise tensors.problem(first, f"has others than {'positive' if divisor else 'finite'} numbers")
        return value

    def _tie(self, tensors: Tensors, target: Target) -> None:
        """Parameters and buffers of the model itself that are one tensor."""
        for group in self.shared:
            if self._deployed.issuperset(group):
                continue
            slots = [target.slots.get(name) for name in group]
            alike = slots[0] is not None and all(_form(slot) == _form(slots[0]) for slot in slots)
            if not alike or not self._deployed.isdisjoint(group):
                raise tensors.problem(group[0], f"is {', '.join(group[1:])}, too; in the model these differ")
            value = target.take(group[0])
            target.changes.values.update(dict.fromkeys(group, value))
            target.changes.ties.append(group)

    def _buffer(self, name: str, tensors: Tensors, target: Target) -> None:
        path, _, key = name.rpartition(".")
        module = target.modules.get(path)
        buffer = None if module is None else module._buffers.get(key)
        if buffer is not None and buffer.is_meta:
            target.buffers[name] = tensors.take(name, (buffer.dtype,), buffer.shape)
        else:
            tensors.shape(name)
            target.ignore(name)


def _names(given: Any, where: str) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{where} has {given!r}; accepted: lists of names")
    return given


def _form(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (isinstance(tensor, nn.Parameter), tensor.dtype, tensor.shape)
