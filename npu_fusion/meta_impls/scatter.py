"""Writing slices to indexed places: npu_scatter_nd_update and scatter_update.

::

    npu_scatter_nd_update   out[indices[i]] = updates[i]                         indices[i]: 1 to rank(input)
                                                                                  coordinates
    scatter_update          out[i, .., indices[i] + k, ..] = updates[i, .., k, ..]             indices [n]
                            out[b, .., start + k, ..]      = updates[i, .., k, ..]             indices [n, 2]
                            with (b, start) = indices[i], and the offset along ``axis``

Everything else is as in the input. The results are new tensors; ``npu_scatter_nd_update_`` and
``scatter_update_`` write into the input, which may be strided, and return it.

Traps: a negative index is an error (the device corrupts memory), not counted from the end, and, other than in
the operators with a cache mode, not skipped. Of updates for the same place devices keep any one; here it is
the last. ``axis`` of scatter_update is never 0, and its index does not broadcast: one for each batch.

Source: op-plugin and aclnn documentation of torch_npu 2.13.0.
"""

from __future__ import annotations

from operator import index as as_index

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import check, check_dtype, check_rank, check_shape, check_size
from npu_fusion.meta_impls._registry import operator

_INDICES = (torch.int32, torch.int64)
_ND_UPDATE = (torch.float16, torch.bfloat16, torch.float32, torch.bool, torch.int8, torch.int64)
_UPDATE = (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int32)


@operator("npu_scatter_nd_update(Tensor input, Tensor indices, Tensor updates) -> Tensor")
def npu_scatter_nd_update(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """A copy of ``input`` with ``updates`` at ``indices``.

    Args:
        input: rank 1 to 8; fp16, bf16, fp32, bool, int8 or int64.
        indices: int32 or int64, rank 2 or more; the last dimension holds a coordinates, a from 1 to the rank
            of ``input``.
        updates: shape ``indices.shape[:-1] + input.shape[a:]``, the dtype of ``input``.

    Raises ``ValueError`` for anything else, and on the CPU for an index outside of ``input``.
    """
    _check_nd_update("npu_scatter_nd_update", input, indices, updates)
    return input.new_empty(input.shape)


@operator(
    "npu_scatter_nd_update_(Tensor(a!) input, Tensor indices, Tensor updates) -> Tensor(a!)",
    copying="npu_scatter_nd_update",
)
def npu_scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """As :func:`npu_scatter_nd_update`, in place."""
    _check_nd_update("npu_scatter_nd_update_", input, indices, updates)
    return input


def _check_nd_update(op: str, input: Tensor, indices: Tensor, updates: Tensor) -> None:
    check_dtype(op, "input", input, *_ND_UPDATE)
    check_rank(op, "input", input, 1, 8)
    check_dtype(op, "indices", indices, *_INDICES)
    check_rank(op, "indices", indices, 2)
    # How many dimensions are indexed decides the rank of updates, so it cannot stay symbolic.
    indexed = as_index(indices.size(-1))
    accepted = f"1 to {input.dim()}, the rank of input"
    check(1 <= indexed <= input.dim(), op, "the last dimension of indices", indexed, accepted)
    check_dtype(op, "updates", updates, input.dtype)
    check_shape(op, "updates", updates, (*indices.shape[:-1], *input.shape[indexed:]))


@operator("scatter_update(Tensor input, Tensor indices, Tensor updates, int axis) -> Tensor")
def scatter_update(input: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    """A copy of ``input`` with ``updates`` along ``axis``.

    Args:
        input: rank 2 to 8; fp16, bf16, fp32, int8 or int32.
        indices: int32 or int64; [n] with n up to the first size of ``input``, or [n, 2].
        updates: the dtype and rank of ``input``; n first, any size that fits along ``axis``, otherwise the
            sizes of ``input``.
        axis: a dimension of ``input`` but the first.

    Raises ``ValueError`` for anything else, and on the CPU for an index outside of ``input``.
    """
    _check_update("scatter_update", input, indices, updates, axis)
    return input.new_empty(input.shape)


@operator(
    "scatter_update_(Tensor(a!) input, Tensor indices, Tensor updates, int axis) -> Tensor(a!)",
    copying="scatter_update",
)
def scatter_update_(input: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    """As :func:`scatter_update`, in place."""
    _check_update("scatter_update_", input, indices, updates, axis)
    return input


def _check_update(op: str, input: Tensor, indices: Tensor, updates: Tensor, axis: int) -> None:
    check_dtype(op, "input", input, *_UPDATE)
    check_rank(op, "input", input, 2, 8)
    rank = input.dim()
    accepted = f"1 to {rank - 1} and {1 - rank} to -1"
    check(-rank < axis < rank and axis != 0, op, "axis", axis, accepted)
    check_dtype(op, "updates", updates, input.dtype)
    check_rank(op, "updates", updates, rank, rank)
    check_dtype(op, "indices", indices, *_INDICES)
    check_rank(op, "indices", indices, 1, 2)
    count, along = updates.size(0), updates.size(axis)
    check_shape(op, "indices", indices, (count,) if indices.dim() == 1 else (count, 2))
    shape = [count, *input.shape[1:]]
    shape[axis] = along
    check_shape(op, "updates", updates, shape)
    for dim in (0, axis):
        given, most = updates.size(dim), input.size(dim)
        check_size(given <= most, op, f"updates has size {given} in dimension {dim}; accepted: up to {most}")
