"""Ascend's form: ``quant_model_description.json`` beside ``quant_model_weights-*.safetensors``.

::

    {"model.layers.0.self_attn.q_proj.weight": "W8A8_DYNAMIC",       the type of every tensor
     "model.norm.weight": "FLOAT", ...,
     "version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "group_size": 0, "metadata": {}, "optional": {}}

It is what msmodelslim writes (AscendV1) and vllm-ascend and MindIE read. ``_ascend_layers`` has the tensors
of each type. ``model_quant_type`` is that with the fewest bits in the model. What is tied is there under
every name, as the readers of the form want it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from npu_fusion.quantization.checkpoints import _ascend_layers as layers
from npu_fusion.quantization.checkpoints._contents import Contents
from npu_fusion.quantization.checkpoints._files import Tensors
from npu_fusion.quantization.checkpoints._json import entry
from npu_fusion.quantization.checkpoints._reader import Reader
from npu_fusion.quantization.checkpoints._target import Target

DESCRIPTION = "quant_model_description.json"
STEM = "quant_model_weights"
VERSION = "1.0.0"
_ORDER = (layers.FLOAT, layers.W8A16, layers.DYNAMIC, layers.STATIC, layers.W4A16)
"""Of ``model_quant_type``: the last of those in the model."""
_ABOUT = ("version", "model_quant_type", "group_size", "metadata", "optional", "reduce_quant_type")
_CACHES = ("kv_cache_type", "kv_quant_type", "fa_quant_type")
"""Entries of the description that are no tensors."""


class AscendWriter:
    """What is written of a model; :attr:`description` is complete after :meth:`tensors`."""

    def __init__(self, contents: Contents) -> None:
        """Raises ``ValueError`` for a layer that the form has no type for."""
        self._layers = contents.layers
        self._types = {name: layers.type_of(name, layer) for name, layer in contents.layers.items()}
        sizes = {layer.scheme.weights.group_size or 0 for layer in contents.layers.values()} - {0}
        if len(sizes) > 1:
            raise ValueError(
                f"save_checkpoint: the model has groups of {', '.join(map(str, sorted(sizes)))}; accepted "
                f"with form='ascend': one size"
            )
        self._floats = {
            key: tensor
            for key, tensor in contents.tensors.items()
            if key.rpartition(".")[0] not in self._layers
        }
        for first, *others in contents.shared:
            if first in self._floats:
                self._floats.update(dict.fromkeys(others, self._floats[first]))
        self._types_of_tensors: dict[str, str] = {}
        self._about = {
            "version": VERSION,
            "model_quant_type": max((layers.FLOAT, *self._types.values()), key=_ORDER.index),
            "metadata": {},
            "group_size": max(sizes, default=0),
            "optional": {},
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors; those of a layer are made when they are asked for."""
        bfloat16 = any(tensor.dtype == torch.bfloat16 for tensor in self._floats.values())
        for key, tensor in self._floats.items():
            self._types_of_tensors[key] = layers.FLOAT
            yield key, tensor
        for name, kind in self._types.items():
            for suffix, of, tensor in layers.write(kind, self._layers[name], bfloat16):
                self._types_of_tensors[f"{name}.{suffix}"] = of
                yield f"{name}.{suffix}", tensor

    @property
    def description(self) -> dict[str, Any]:
        return {**self._types_of_tensors, **self._about}


class AscendReader(Reader):
    """AscendV1: W8A8, W8A8_DYNAMIC, W8A16 and W4A16."""

    name = "ascend"
    methods = ()

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        super().__init__(config, where)
        size = entry(self.config, "group_size", int, where, 0)
        if size < 0:
            raise ValueError(f"{where}: group_size is {size}; accepted: 0 (no groups), or at least 1")
        self.group_size = size
        for name in ("metadata", "optional"):
            if entry(self.config, name, dict, where, {}):
                raise ValueError(f"{where}: {name} has {', '.join(self.config[name])}; accepted: nothing")
        for name in _CACHES:
            if self.config.get(name) is not None:
                raise ValueError(f"{where}: {name} is {self.config[name]!r}; accepted: none")
        self.types = {key: kind for key, kind in self.config.items() if key not in (*_ABOUT, *_CACHES)}
        for key, kind in self.types.items():
            if kind not in (layers.FLOAT, *layers.TYPES):
                accepted = ", ".join((layers.FLOAT, *layers.TYPES))
                raise ValueError(f"{where}: {key} is {kind!r}; accepted: {accepted}")

    def read(self, tensors: Tensors, target: Target) -> None:
        for key in tensors:
            if key not in self.types:
                raise tensors.problem(key, f"is not in {self.where}")
        for key, kind in self.types.items():
            tensors.shape(key)
            if kind != layers.FLOAT and key.endswith(".weight"):
                stored = key.removesuffix(".weight")
                name, found = layers.read(stored, kind, self.group_size, tensors)
                target.place(name, found)
