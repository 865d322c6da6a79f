"""The one step that changes the model, after everything has been read, checked and made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from npu_fusion.quantization.checkpoints._target import Changes, holder


@torch.no_grad()
def swap(model: nn.Module, changes: Changes) -> None:
    """Put new layers into their places, copy values into tensors, and give meta tensors their values."""
    modules = list(model.modules())
    for parent in modules:
        for name, child in parent._modules.items():
            if child in changes.modules:
                parent._modules[name] = changes.modules[child]
    places: defaultdict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, tensor in _held(module):
            places[id(tensor)].append((module, name))
    behind_hooks: dict[str, Tensor] = {}
    for key, value in changes.values.items():
        place = holder(model, key)
        if place is None:
            behind_hooks[key] = value
            continue
        old = _get(*place)
        if not old.is_meta:
            old.copy_(value)
            continue
        new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        for module, name in places[id(old)]:
            _set(module, name, new)
    if behind_hooks:
        # Of layers that npu_fusion.prepare has laid out otherwise, which know the keys of before.
        model.load_state_dict(behind_hooks, strict=False)
    for tie in changes.ties:
        first, *others = (place for key in tie if (place := holder(model, key)) is not None)
        for module, name in others:
            _set(module, name, _get(*first))


def _held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in chain(module._parameters.items(), module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _get(module: nn.Module, name: str) -> Tensor:
    tensor = module._parameters.get(name, module._buffers.get(name))
    assert tensor is not None, "the caller has seen it"
    return tensor


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        assert isinstance(tensor, nn.Parameter), "ties and values are of one kind"
        module._parameters[name] = tensor
    else:
        module._buffers[name] = tensor
