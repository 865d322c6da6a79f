"""The scattering operators on the CPU; formula and traps in the file of this name in meta_impls."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.reference._cache import last_of_each
from npu_fusion.meta_impls._registry import cpu_kernel


@cpu_kernel("npu_scatter_nd_update")
def npu_scatter_nd_update(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return npu_scatter_nd_update_(input.clone(memory_format=torch.contiguous_format), indices, updates)


@cpu_kernel("npu_scatter_nd_update_")
def npu_scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    leading = indices.dim() - 1
    coordinates = indices.reshape(indices.shape[:-1].numel(), indices.size(-1))
    values = updates.reshape(len(coordinates), *updates.shape[leading:])
    _write("npu_scatter_nd_update", input, coordinates, values)
    return input


@cpu_kernel("scatter_update")
def scatter_update(input: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    return scatter_update_(input.clone(memory_format=torch.contiguous_format), indices, updates, axis)


@cpu_kernel("scatter_update_")
def scatter_update_(input: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    count, length = updates.size(0), updates.size(axis)
    if indices.dim() == 1:
        indices = torch.stack((torch.arange(count, dtype=indices.dtype), indices), dim=1)
    batch, start = indices.unbind(1)
    place = start.unsqueeze(1) + torch.arange(length, dtype=indices.dtype)
    coordinates = torch.stack((batch.unsqueeze(1).expand_as(place), place), dim=-1)
    values = updates.movedim(axis, 1).flatten(0, 1)
    _write("scatter_update", input.movedim(axis, 1), coordinates.flatten(0, 1), values)
    return input


def _write(op: str, out: Tensor, coordinates: Tensor, values: Tensor) -> None:
    """``out[coordinates[i]] = values[i]`` in place, in order; ``coordinates`` [n, a] index a dimensions."""
    indexed = coordinates.size(-1)
    sizes = torch.tensor(out.shape[:indexed])
    outside = ((coordinates < 0) | (coordinates >= sizes)).any(dim=-1)
    if outside.any():
        given = coordinates[outside][0].tolist()
        raise ValueError(f"{op}: an index is {given}; accepted: from 0 on and below {sizes.tolist()}")
    place = coordinates.to(torch.int64)
    strides = torch.tensor([out.shape[dim + 1 : indexed].numel() for dim in range(indexed)])
    kept = last_of_each((place * strides).sum(dim=-1))
    out[tuple(place[kept].unbind(-1))] = values[kept]
