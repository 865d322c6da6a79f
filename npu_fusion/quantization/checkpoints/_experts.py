"""Experts that a file has as layers, and a model as one tensor.

::

    experts.0.gate_proj.weight [I, H]                experts.gate_up_proj [E, 2 I, H]
    experts.0.up_proj.weight   [I, H]        ->
    experts.0.down_proj.weight [H, I]                experts.down_proj    [E, H, I]
    experts.1.gate_proj.weight ...

as transformers has DeepSeek-V3, Qwen-MoE and their relatives from version 5 on. The checkpoints of these
models are of the layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_LAYER = re.compile(r"(.*\bexperts)\.(0|[1-9][0-9]{0,5})\.(gate|up|down)_proj")


@dataclass(frozen=True)
class Place:
    """Rows of one expert."""

    key: str
    expert: int
    first: int
    rows: int
    columns: int


def place(layer: str, slots: Mapping[str, Tensor]) -> Place | None:
    """Where the weight of a layer of the file is in the model, if it is one of an expert."""
    match = _LAYER.fullmatch(layer)
    if match is None:
        return None
    prefix, expert, which = match[1], int(match[2]), match[3]
    key = f"{prefix}.{'down_proj' if which == 'down' else 'gate_up_proj'}"
    tensor = slots.get(key)
    if tensor is None or tensor.dim() != 3 or expert >= tensor.size(0):
        return None
    rows, columns = tensor.size(1), tensor.size(2)
    if which == "down":
        return Place(key, expert, 0, rows, columns)
    return Place(key, expert, rows // 2 if which == "up" else 0, rows // 2, columns)


@dataclass
class Stacks:
    """Tensors that are put together of the weights of experts."""

    slots: Mapping[str, Tensor]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Name in the model -> value."""
    _missing: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def put(self, place: Place, value: Tensor) -> None:
        """Copy the weight [rows, columns] of one expert, in the dtype and on the device of the whole."""
        if place.key not in self.tensors:
            shape = self.slots[place.key].shape
            self.tensors[place.key] = torch.empty(shape, dtype=value.dtype, device=value.device)
            starts = range(0, shape[1], place.rows)
            self._missing[place.key] = [(e, start) for e in range(shape[0]) for start in starts]
        self.tensors[place.key][place.expert, place.first : place.first + place.rows] = value
        self._missing[place.key].remove((place.expert, place.first))

    def missing(self) -> str | None:
        """A layer of an expert whose weight has not come, while others of the same tensor have."""
        for key, missing in self._missing.items():
            for expert, first in missing:
                experts, _, kind = key.rpartition(".")
                which = kind if kind == "down_proj" else "up_proj" if first else "gate_proj"
                return f"{experts}.{expert}.{which}"
        return None
