"""What there is to save of a model: tensors by their keys, deployed layers, and what is one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from npu_fusion._mergeable import merged_names
from npu_fusion.quantization.modules import Deployed, empty


@dataclass(frozen=True)
class Contents:
    """Of one model. All tensors are those of the model itself, or views of them."""

    tensors: Mapping[str, Tensor]
    """By the keys of the state dict; of tensors under several keys only the first."""
    layers: Mapping[str, Deployed]
    """Layers by the names that the keys begin with. Of a merged layer these are two, made for the purpose."""
    shared: list[list[str]]
    """Keys of one and the same tensor, if there is more than one."""
    buffers: Mapping[str, Tensor]
    """Buffers that the state dict is without."""


def contents(model: nn.Module) -> Contents:
    """Look at a model.

    Raises:
        ValueError: it has tensors without values (meta device), of a subclass, or a state that is no tensor.
    """
    state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    buffers = _other_buffers(model)
    for key, tensor in (*state.items(), *buffers.items()):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
            where = f" on {tensor.device}" if isinstance(tensor, Tensor) else ""
            raise ValueError(
                f"save_checkpoint: {key} is a {type(tensor).__name__}{where}; accepted: tensors with values"
            )
    same: dict[object, list[str]] = {}
    for key, tensor in state.items():
        same.setdefault(_identity(tensor), []).append(key)
    tensors = {keys[0]: state[keys[0]] for keys in same.values()}
    return Contents(tensors, _layers(model, state), [keys for keys in same.values() if keys[1:]], buffers)


def _identity(tensor: Tensor) -> object:
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _layers(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Deployed]:
    halves = {}
    for name, owner in model.named_modules():
        for names in merged_names(owner):
            prefix = f"{name}." if name else ""
            halves[f"{prefix}{names.merged}"] = [f"{prefix}{half}" for half in names.declared]
    layers: dict[str, Deployed] = {}
    for name, module in model.named_modules():
        if isinstance(module, Deployed):
            if name in halves:
                layers.update({half: _half(module, half, state) for half in halves[name]})
            else:
                layers[name] = module
    return layers


def _half(layer: Deployed, name: str, state: Mapping[str, Tensor]) -> Deployed:
    """One of the two layers that ``layer`` was made of, with the tensors that are saved for it."""
    described = layer.describe()
    with torch.device("meta"):
        half = empty({**described, "out_features": described["out_features"] // 2})
    for key, place in half._buffers.items():
        if place is not None:
            half._buffers[key] = state[f"{name}.{key}"]
    return half


def _other_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}".removeprefix("."): buffer
        for name, module in model.named_modules()
        for key in sorted(module._non_persistent_buffers_set)
        if (buffer := module._buffers.get(key)) is not None
    }
