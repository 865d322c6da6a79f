"""What keeps a layer from being replaced by another: things attached to it, and memory that it shares."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from itertools import chain

import torch
from torch import Tensor, nn


def attached(name: str, layer: nn.Module) -> str | None:
    """What ``layer`` has besides its class, so that another layer in its place would lose it."""
    if "forward" in vars(layer):
        return f"the forward of {name} was replaced on the object"
    hooks = [key for key, value in vars(layer).items() if "hook" in key and value]
    if hooks:
        return f"{name} has hooks ({', '.join(hooks)})"
    for key, tensor in chain(layer.named_parameters(), layer.named_buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"{name}.{key} is a {type(tensor).__name__}; accepted: plain tensors"
        if tensor.grad is not None:
            return f"{name}.{key} has a gradient, which would be lost"
    return None


class Sharing:
    """Who holds which layer and which memory in the whole model."""

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        self._holders = Counter(child for module in modules.values() for child in module._modules.values())
        self._tensors: defaultdict[int, list[tuple[str, nn.Module, Tensor]]] = defaultdict(list)
        for name, module in modules.items():
            for key, tensor in chain(module._parameters.items(), module._buffers.items()):
                if tensor is not None:
                    self._tensors[_memory(tensor)].append((f"{name}.{key}".removeprefix("."), module, tensor))

    def holders(self, layer: nn.Module) -> int:
        return self._holders[layer]

    def other(self, layer: nn.Module, tensor: Tensor) -> str | None:
        """Name of a tensor of another module in the memory of a layer's tensor."""
        for name, owner, other in self._tensors[_memory(tensor)]:
            if owner is not layer and (other is tensor or _overlap(other, tensor)):
                return name
        return None


def _memory(tensor: Tensor) -> int:
    """Address of the storage, or identity of the tensor where there is none (meta device, subclasses)."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return (plain and tensor.untyped_storage().data_ptr()) or id(tensor)


def _overlap(a: Tensor, b: Tensor) -> bool:
    (a_start, a_end), (b_start, b_end) = _extent(a), _extent(b)
    return a_start < b_end and b_start < a_end


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def shared_memory(
    names: Sequence[str], layers: Sequence[nn.Module], sharing: Sharing, but: Collection[str] = ()
) -> str | None:
    """Which tensor of ``layers`` is in the memory of another module, but for those of the names ``but``."""
    for name, layer in zip(names, layers, strict=True):
        for key, tensor in layer.state_dict(keep_vars=True).items():
            other = None if key in but else sharing.other(layer, tensor)
            if other is not None:
                return f"{name}.{key} shares its memory with {other}"
    return None
