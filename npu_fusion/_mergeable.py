"""Two linear layers of the same input as one layer with twice the outputs, under the keys of the two.

::

    y0 = x W0ᵀ + b0                   y0, y1 = (x [W0; W1]ᵀ + [b0; b1]).chunk(2, -1)
    y1 = x W1ᵀ + b1         ->
    state dict: 0.weight, 1.weight    state dict: 0.weight, 1.weight   (views of the two halves of the rows)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from npu_fusion.quantization.modules import W8A8DynamicLinear

Layer = TypeVar("Layer", bound=nn.Module)
_DOUBLES: dict[type[nn.Module], Callable[[Any], nn.Module]] = {}


def mergeable(cls: type[Layer]) -> Callable[[Callable[[Layer], nn.Module]], Callable[[Layer], nn.Module]]:
    """Let :func:`npu_fusion.prepare` merge layers of exactly this class (subclasses may compute otherwise).

    Decorates a function that takes a layer and returns another of the same class and settings with twice the
    output features, whose values do not matter (best on the meta device). The class promises that its forward
    takes the input alone, that its output features come last, that each of them depends only on its own row
    of every parameter and buffer, and that all of these are in the state dict with the output features first.

    Raises:
        TypeError: ``cls`` is not a class of modules.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"mergeable: cls is {cls!r}; accepted: a subclass of torch.nn.Module")

    def register(double: Callable[[Layer], nn.Module]) -> Callable[[Layer], nn.Module]:
        _DOUBLES[cls] = double
        return double

    return register


@mergeable(nn.Linear)
def _double_linear(layer: nn.Linear) -> nn.Module:
    return nn.Linear(layer.in_features, 2 * layer.out_features, bias=layer.bias is not None, device="meta")


@mergeable(W8A8DynamicLinear)
def _double_w8a8_linear(layer: W8A8DynamicLinear) -> nn.Module:
    bias = layer.bias is not None
    return W8A8DynamicLinear(layer.in_features, 2 * layer.out_features, bias=bias, device="meta")


def is_mergeable(layer: nn.Module) -> bool:
    return type(layer) in _DOUBLES


def mergeable_names() -> str:
    return ", ".join(cls.__name__ for cls in _DOUBLES)


def double(layer: nn.Module) -> nn.Module:
    """A layer with twice the outputs of ``layer``, without its values.

    Raises:
        RuntimeError: what was registered for the class does not keep the promise of :func:`mergeable`.
    """
    result = _DOUBLES[type(layer)](layer)
    wanted = {
        name: [2 * size for size in t.shape[:1]] + [*t.shape[1:]] for name, t in layer.state_dict().items()
    }
    given = {name: [*t.shape] for name, t in result.state_dict().items()}
    if given != wanted or type(result) is not type(layer) or [] in wanted.values():
        raise RuntimeError(
            f"mergeable({type(layer).__name__}): the registered function returned a {type(result).__name__} "
            f"with {given}; accepted: the same class, every tensor with twice the rows of the given layer's"
        )
    return result


@torch.no_grad()
def join(joined: nn.Module, first: nn.Module, second: nn.Module) -> nn.Module:
    """Give ``joined``, the :func:`double` of either, the rows of ``first`` and then of ``second``."""
    rows, more = first.state_dict(), second.state_dict()
    joined.requires_grad_(False)  # what is assigned takes this over, and int8 cannot have a gradient
    joined.load_state_dict({name: torch.cat((rows[name], more[name])) for name in rows}, assign=True)
    for name, parameter in first.named_parameters():
        joined.get_parameter(name).requires_grad_(parameter.requires_grad)
    return joined.train(first.training)


@dataclass(frozen=True)
class Names:
    """Attributes of the module that had two layers and has one."""

    merged: str
    halves: tuple[str, str]
    """In the order of the merged rows."""
    declared: tuple[str, str]
    """In the order in which the module had them."""


def replace(owner: nn.Module, names: Names, joined: nn.Module) -> None:
    """Put ``joined`` into the place of the two; ``owner`` keeps saving and loading them under their keys."""
    children = dict(owner._modules)
    owner._modules.clear()
    for name, child in children.items():
        if name == names.declared[0]:
            owner._modules[names.merged] = joined
        elif name != names.declared[1]:
            owner._modules[name] = child
    # Partial objects, because these can be copied and pickled with the module, and closures cannot.
    owner.register_state_dict_post_hook(partial(_split_keys, names))
    hooks = owner._state_dict_hooks
    for other in list(hooks)[:-1]:  # these know the old keys: ours goes first
        hooks[other] = hooks.pop(other)
    owner.register_load_state_dict_pre_hook(partial(_join_keys, names))


def _split_keys(
    names: Names, owner: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """After ``owner`` has put its tensors into ``state_dict``: the keys, and their order, of before."""
    if not is_mergeable(owner.get_submodule(names.merged)):
        return  # replaced since by a layer whose tensors need not have the outputs first
    start = f"{prefix}{names.merged}."
    own = [*takewhile(lambda key: key.startswith(prefix), reversed(state_dict))][::-1]
    entries = {key: state_dict.pop(key) for key in own}
    merged = {key.removeprefix(start): t for key, t in entries.items() if key.startswith(start)}
    for key, tensor in entries.items():
        if not key.startswith(start):
            state_dict[key] = tensor
            continue
        for half in names.declared if merged else ():
            for name, rows in merged.items():
                state_dict[f"{prefix}{half}.{name}"] = rows.chunk(2)[names.halves.index(half)]
        merged = {}
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        entry = metadata.pop(start[:-1])
        metadata.update({prefix + half: dict(entry) for half in names.declared})


@torch.no_grad()
def _join_keys(
    names: Names,
    owner: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Before ``owner`` loads ``state_dict``: one tensor out of two, complaints with the keys of the two."""
    layer = owner.get_submodule(names.merged)
    if not is_mergeable(layer):
        return
    for name, current in layer.state_dict(keep_vars=True).items():
        merged = f"{prefix}{names.merged}.{name}"
        if merged in state_dict:
            continue  # keys as named_parameters() gives them
        given: dict[str, Tensor] = {}
        rows = dict(zip(names.halves, current.chunk(2), strict=True))
        for half in names.declared:
            key = f"{prefix}{half}.{name}"
            if key not in state_dict:
                if strict:
                    missing_keys.append(key)
            elif (tensor := state_dict.pop(key)).shape == rows[half].shape:
                given[half] = tensor
            else:
                error_msgs.append(
                    f"size mismatch for {key}: copying a param with shape {tensor.shape} from checkpoint, "
                    f"the shape in current model is {rows[half].shape}."
                )
        # The tensor that is there already is what loading it again leaves as it is.
        state_dict[merged] = current
        if not local_metadata.get("assign_to_params_buffers", False):
            for half, tensor in given.items():
                rows[half].copy_(tensor)
        elif given:
            parts = [given.get(half, rows[half]) for half in names.halves]
            if (parts[0].dtype, parts[0].device) == (parts[1].dtype, parts[1].device):
                state_dict[merged] = torch.cat(parts)
            else:
                error_msgs.append(_unlike(prefix, names.halves, name, parts))


def _unlike(prefix: str, halves: Sequence[str], name: str, parts: Sequence[Tensor]) -> str:
    (first, second), (one, other) = halves, parts
    return (
        f"cannot assign {prefix}{first}.{name} ({one.dtype}, {one.device}) "
        f"and {prefix}{second}.{name} ({other.dtype}, {other.device}): "
        f"npu_fusion.prepare made them one tensor; accepted: the same dtype and device."
    )
