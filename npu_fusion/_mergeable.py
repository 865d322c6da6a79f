"""Two linear layers of the same input as one layer with twice the outputs, under the keys of the two.

::

    y0 = x W0ᵀ + b0                   y0, y1 = (x [W0; W1]ᵀ + [b0; b1]).chunk(2, -1)
    y1 = x W1ᵀ + b1         ->
    state dict: 0.weight, 1.weight    state dict: 0.weight, 1.weight   (views of the two halves of the rows)

What quantizes the input (smooth scales, say) belongs to both layers, if it is the same for both: the merged
layer has it once, and it is saved for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True)
class _Class:
    """What is registered of a class."""

    double: Callable[[Any], nn.Module]
    shared: frozenset[str]
    alike: Callable[[Any], object]
    dim: int


_CLASSES: dict[type[nn.Module], _Class] = {}


def _no_settings(layer: nn.Module) -> None:
    """Of classes whose layers differ in nothing but sizes and values."""


def mergeable(
    cls: type[Layer],
    shared: Sequence[str] = (),
    alike: Callable[[Layer], object] = _no_settings,
    dim: int = 0,
) -> Callable[[Callable[[Layer], nn.Module]], Callable[[Layer], nn.Module]]:
    """Let :func:`npu_fusion.prepare` merge layers of exactly this class (subclasses may compute otherwise).

    Decorates a function that takes a layer and returns another of the same class and settings with twice the
    output features, whose values do not matter (best on the meta device). The class promises that its forward
    takes the input alone, that its output features come last, that each of them depends only on its own part
    of every parameter and buffer that is not ``shared``, and that all of these are in the state dict with the
    output features in dimension ``dim``.

    Args:
        shared: names of parameters and buffers that belong to the input. Two layers in which these are not
            equal are not merged; the merged layer has them once.
        alike: what else, computed of a layer, has to be equal in two layers (the type of their weights, say).
        dim: 0 (first) or -1 (last).

    Raises:
        TypeError: ``cls`` is not a class of modules, or ``shared`` is a single string.
        ValueError: ``dim`` is something else.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"mergeable: cls is {cls!r}; accepted: a subclass of torch.nn.Module")
    if isinstance(shared, str):
        raise TypeError(f"mergeable: shared is the string {shared!r}; accepted: a sequence of names")

    if dim not in (0, -1):
        raise ValueError(f"mergeable: dim is {dim}; accepted: 0, -1")

    def register(double: Callable[[Layer], nn.Module]) -> Callable[[Layer], nn.Module]:
        _CLASSES[cls] = _Class(double, frozenset(shared), alike, dim)
        return double

    return register


@mergeable(nn.Linear)
def _double_linear(layer: nn.Linear) -> nn.Module:
    return nn.Linear(layer.in_features, 2 * layer.out_features, bias=layer.bias is not None, device="meta")


def is_mergeable(layer: nn.Module) -> bool:
    return type(layer) in _CLASSES


def mergeable_names() -> str:
    return ", ".join(cls.__name__ for cls in _CLASSES)


def _dim(layer: nn.Module) -> int:
    return _CLASSES[type(layer)].dim


def shared_names(layer: nn.Module) -> frozenset[str]:
    return _CLASSES[type(layer)].shared


def unlike(names: Sequence[str], first: nn.Module, second: nn.Module) -> str | None:
    """Why two layers of this class, whose tensors agree in shapes and dtypes, cannot be one, or None."""
    registered = _CLASSES[type(first)]
    settings = registered.alike(first), registered.alike(second)
    if settings[0] != settings[1]:
        return f"{names[0]} has {settings[0]}, {names[1]} has {settings[1]}"
    tensors = first.state_dict(), second.state_dict()
    for name in sorted(registered.shared & tensors[0].keys()):
        if not _equal(*(t[name] for t in tensors)):
            return f"{names[0]}.{name} and {names[1]}.{name} have different values"
    return None


def _equal(a: Tensor, b: Tensor) -> bool:
    """On the meta device there are no values yet, and those that are loaded later are compared then."""
    return a is b or a.is_meta or torch.equal(a, b)


def double(layer: nn.Module) -> nn.Module:
    """A layer with twice the outputs of ``layer``, without its values.

    Raises:
        RuntimeError: what was registered for the class does not keep the promise of :func:`mergeable`.
    """
    registered = _CLASSES[type(layer)]
    result = registered.double(layer)
    wanted = {name: [*t.shape] for name, t in layer.state_dict().items()}
    for name, sizes in wanted.items():
        if name not in registered.shared and sizes:
            sizes[registered.dim] *= 2
    given = {name: [*t.shape] for name, t in result.state_dict().items()}
    if given != wanted or type(result) is not type(layer) or [] in wanted.values():
        raise RuntimeError(
            f"mergeable({type(layer).__name__}): the registered function returned a {type(result).__name__} "
            f"with {given}; accepted: the same class, every tensor that is not shared twice as large in "
            f"dimension {registered.dim} as the given layer's"
        )
    return result


@torch.no_grad()
def join(joined: nn.Module, first: nn.Module, second: nn.Module) -> nn.Module:
    """Give ``joined``, the :func:`double` of either, the outputs of ``first`` and then of ``second``."""
    rows, more = first.state_dict(keep_vars=True), second.state_dict()
    shared, dim = shared_names(first), _dim(first)
    joined.requires_grad_(False)  # what is assigned takes this over, and int8 cannot have a gradient
    # What is shared stays the object that it is: other layers may read it, too.
    both = {
        name: t if name in shared else torch.cat((t, more[name]), dim).detach() for name, t in rows.items()
    }
    joined.load_state_dict(both, assign=True)
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


def merged_names(owner: nn.Module) -> list[Names]:
    """Of the layers that :func:`replace` has put into ``owner``, while they are of a mergeable class."""
    hooks = owner._state_dict_hooks.values()
    found = [hook.args[0] for hook in hooks if isinstance(hook, partial) and hook.func is _split_keys]
    return [names for names in found if is_mergeable(owner.get_submodule(names.merged))]


def _split_keys(
    names: Names, owner: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """After ``owner`` has put its tensors into ``state_dict``: the keys, and their order, of before."""
    layer = owner.get_submodule(names.merged)
    if not is_mergeable(layer):
        return  # replaced since by a layer whose tensors need not have the outputs first
    shared, dim = shared_names(layer), _dim(layer)
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
                own_rows = rows if name in shared else rows.chunk(2, dim)[names.halves.index(half)]
                state_dict[f"{prefix}{half}.{name}"] = own_rows
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
        once, dim = name in shared_names(layer), _dim(layer)
        parts = (current, current) if once else current.chunk(2, dim)
        rows = dict(zip(names.halves, parts, strict=True))
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
        if once:
            if len(given) == 2 and not _equal(*given.values()):
                error_msgs.append(_contradiction(prefix, names.halves, name))
            elif given:
                state_dict[merged] = next(iter(given.values()))
        elif not local_metadata.get("assign_to_params_buffers", False):
            for half, tensor in given.items():
                rows[half].copy_(tensor)
        elif given:
            loaded = [given.get(half, rows[half]) for half in names.halves]
            if (loaded[0].dtype, loaded[0].device) == (loaded[1].dtype, loaded[1].device):
                state_dict[merged] = torch.cat(loaded, dim)
            else:
                error_msgs.append(_unlike(prefix, names.halves, name, loaded))


def _contradiction(prefix: str, halves: Sequence[str], name: str) -> str:
    first, second = halves
    return (
        f"{prefix}{first}.{name} and {prefix}{second}.{name} have different values: "
        f"npu_fusion.prepare made them one tensor; accepted: equal ones."
    )


def _unlike(prefix: str, halves: Sequence[str], name: str, parts: Sequence[Tensor]) -> str:
    (first, second), (one, other) = halves, parts
    return (
        f"cannot assign {prefix}{first}.{name} ({one.dtype}, {one.device}) "
        f"and {prefix}{second}.{name} ({other.dtype}, {other.device}): "
        f"npu_fusion.prepare made them one tensor; accepted: the same dtype and device."
    )
