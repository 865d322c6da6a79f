"""Argument checks that every operator with a paged cache shares."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import check_rank, check_shape, check_size

_NZ_BYTES = 32


def nz_width(dtype: torch.dtype) -> int:
    """How many neighbouring columns of a row lie together in the NZ order of a page."""
    return _NZ_BYTES // dtype.itemsize


def check_cache(op: str, argument: str, cache: Tensor, width: int | torch.SymInt, *, nz: bool) -> None:
    """Refuse a cache that is not [BlockNum, BlockSize, 1, width], in NZ order of whole groups of columns."""
    check_rank(op, argument, cache, 4, 4)
    check_shape(op, argument, cache, (cache.size(0), cache.size(1), 1, width))
    if nz:
        d0 = nz_width(cache.dtype)
        accepted = f"a multiple of {d0} for this dtype in NZ order"
        check_size(width % d0 == 0, op, f"{argument} has {width} columns; accepted: {accepted}")
