"""Running a block on remembered calls and watching what its layers read.

Layers that read the same tensor, and are asked for the same scheme, are one :class:`Siblings`: they share
their statistics, their smoothing and the scale of their input, so that a compiled graph quantizes the tensor
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from npu_fusion.quantization._replay import Call
from npu_fusion.quantization.scheme import Scheme
from npu_fusion.quantization.statistics import Statistics

Listener = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Siblings:
    """Layers of one scheme that read one tensor, in the order of their calls."""

    names: tuple[str, ...]
    scheme: Scheme


@contextmanager
def inputs_of(layers: Mapping[str, nn.Module], listener: Listener) -> Iterator[None]:
    """Tell ``listener`` name and input of each layer when it is called."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def tell(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            listener(name, args[0] if args else kwargs["input"])

        return tell

    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def siblings(
    block: nn.Module,
    call: Call,
    hidden: Tensor | None,
    layers: Mapping[str, nn.Module],
    schemes: Mapping[str, Scheme],
) -> list[Siblings]:
    """Run ``block`` once and say which layers belong together, in the order of their first calls.

    Layers that are not called, and layers called more than once, are alone.
    """
    read: dict[str, list[Tensor]] = {}
    with inputs_of(layers, lambda name, x: read.setdefault(name, []).append(x)):
        call.replay(block, hidden)
    together: dict[Any, list[str]] = {}
    for name in (*read, *(name for name in layers if name not in read)):
        layer, seen = layers[name], read.get(name, [])
        key: Any = name
        if len(seen) == 1 and isinstance(layer, nn.Linear):
            key = (*_identity(seen[0]), schemes[name], layer.weight.dtype, layer.weight.device)
        together.setdefault(key, []).append(name)
    return [Siblings(tuple(names), schemes[names[0]]) for names in together.values()]


def _identity(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, x._version


def observe(
    block: nn.Module,
    calls: Sequence[Call],
    hidden: Sequence[Tensor | None],
    layers: Mapping[str, nn.Module],
    groups: Sequence[Siblings],
    statistics: Mapping[Siblings, Statistics],
) -> list[Siblings]:
    """Run ``block`` on all calls and update the statistics of each group by its first layer.

    Returns the groups whose layers did not read the same tensor in one of the calls after all: what was
    gathered for them is worth nothing.
    """
    group_of = {name: group for group in groups for name in group.names}
    wrong: dict[Siblings, None] = {}
    for call, tensor in zip(calls, hidden, strict=True):
        current: dict[Siblings, Tensor] = {}

        def listen(name: str, x: Tensor, current: dict[Siblings, Tensor] = current) -> None:
            group = group_of[name]
            if len(group.names) == 1:
                statistics[group].update(x)
            elif group not in current:
                current[group] = x
                statistics[group].update(x)
            elif _identity(current[group]) != _identity(x):
                wrong[group] = None

        with inputs_of(layers, listen):
            call.replay(block, tensor)
    return list(wrong)
