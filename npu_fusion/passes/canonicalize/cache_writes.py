"""Rows written into a cache.

::

    cache.view(-1, C)[slots] = rows                       index_put
    cache.view(-1, C).index_copy_(0, slots, rows)         index_copy          ->  write(cache, rows, slots,
    npu_scatter_nd_update(cache, slots[:, None], rows)                                  "rows", 0)
    cache.index_copy_(2, positions, rows)                 index_copy
    cache[:, :, positions] = rows                         index_put           ->  write(.., "rows", 2)
    cache[:B, start:end] = rows                           slice_scatter       ->  write(cache, rows, start,
                                                                                        "range", 1)
    npu_kv_rmsnorm_rope_cache(_v2, _v2_functional)                            ->  write(cache, rows, slots,
                                                                                        "PA" .., None)
    npu_scatter_pa_kv_cache(_functional)                                      ->  the same, twice

``write(cache, rows, where, how, dim, wraps)``, one index for each row; ``wraps``: a negative index counts
from the end, as ``index_put`` has it. The torch_npu operators skip such a row. A cache may have more batches
than the rows: the first are written. npu_kv_rmsnorm_rope_cache also stands for the norm and the rotation that
it computes.

In a functional graph an operator that writes in place is ``auto_functionalized_v2``; read here where it
writes whole tensors, not views of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true as _statically

from npu_fusion.passes.canonicalize.views import part, reshaped
from npu_fusion.passes.terms import PURE, Term, TermGraph, rule

aten = torch.ops.aten
npu = torch.ops.npu
higher_order = torch.ops.higher_order

PURE.update({aten.arange.default, aten.arange.start, aten.arange.start_step, torch.ops.prims.iota.default})

# Named before the first rule: with TORCH_LOGS=npu_fusion PyTorch imports this module once before there are
# operators, and again later; rules made at the first attempt would be there twice.
_SCATTER_ND = npu.npu_scatter_nd_update.default

SLOTS = ("PA", "PA_BNSD", "PA_NZ")
"""Modes of npu_kv_rmsnorm_rope_cache in which the index has a slot for every row."""


def written(
    view: TermGraph, cache: Term, rows: Term, where: Any, how: str, dim: int | None, wraps: bool = False
) -> Term:
    return view.make("write", (cache, rows, where, how, dim, wraps), cache.dtype)


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    cache, indices, rows, accumulate = args
    given = [d for d, index in enumerate(indices) if index is not None]
    if accumulate or len(given) != 1 or indices[given[0]].dtype == torch.bool:
        return NotImplemented
    index, value = indices[given[0]], node.args[2]
    assert isinstance(value, fx.Node)
    (position,) = (n for n in node.args[1] if n is not None)  # type: ignore[union-attr]
    assert isinstance(position, fx.Node)
    rows_val, cache_val, index_val = (n.meta["val"] for n in (value, node, position))
    if len(index.shape) != 1 or not _one_for_each(rows_val, cache_val, given[0], index_val):
        return NotImplemented
    missing = (1,) * (len(cache.shape) - len(rows.shape))  # a single row comes without its first dimension
    rows = reshaped(view, rows, (*missing, *rows.shape))
    return written(view, cache, rows, index, "rows", given[0], wraps=True)


def _one_for_each(rows: torch.Tensor, cache: torch.Tensor, dim: int, index: torch.Tensor) -> bool:
    """Is nothing broadcast? What is not 1 must be as large as its place, or the operator fails."""
    places = (*cache.shape[:dim], *index.shape, *cache.shape[dim + 1 :])
    if rows.dim() > cache.dim():
        return False
    shape = (*(1 for _ in range(cache.dim() - rows.dim())), *rows.shape)
    return all(
        _statically(size != 1) or _statically(size == place)
        for size, place in zip(shape, places, strict=True)
    )


@rule(aten.index_copy.default)
def _index_copy(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    cache, dim, index, rows = args
    if len(index.shape) != 1:
        return NotImplemented
    return written(view, cache, rows, index, "rows", dim % len(cache.shape))


@rule(_SCATTER_ND)
def _scatter_nd_update(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    cache, indices, rows = args
    if len(indices.shape) != 2 or indices.shape[-1] != 1:
        return NotImplemented
    return written(view, cache, rows, reshaped(view, indices, indices.shape[:1]), "rows", 0)


def into_part(view: TermGraph, cache: Term, rows: Term, dim: int) -> Term | None:
    """``cache[:n][.., start:end] = x``: where ``rows`` is the first part of ``cache`` along ``dim``, written
    to, what the whole cache then is."""
    found = as_write(view, rows)
    if found is None or found.args[3] != "range":
        return None
    before = found.args[0]
    if before is cache or before is not part(view, cache, dim, 0, before.shape[dim]):
        return None
    return written(view, cache, *found.args[1:])


def rows_of(write: Term) -> Term:
    """What a ``write``, or a ``filled`` beginning of a cache, puts there (first)."""
    return write.args[1] if write.op == "write" else write.args[1][0]


def as_write(view: TermGraph, term: Term) -> Term | None:
    """A write of rows into a cache, also at its beginning."""
    if term.op == "filled" and len(term.args[1]) == 1:
        cache, (rows,), dim = term.args
        return written(view, cache, rows, 0, "range", dim)
    return term if term.op == "write" else None


@rule(npu.npu_kv_rmsnorm_rope_cache.default)
def _kv_rope_v1(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    parts = _kv_rope(view, dict(zip(_names(node.target), args, strict=True)))
    return NotImplemented if parts is None else (*parts[2:], *parts[:2])


@rule(npu.npu_kv_rmsnorm_rope_cache_v2_functional.default)
def _kv_rope_functional(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    parts = _kv_rope(view, dict(zip(_names(node.target), args, strict=True)))
    return NotImplemented if parts is None else parts


def _names(target: Any) -> list[str]:
    return [a.name for a in target._schema.arguments]


def _kv_rope(view: TermGraph, given: dict[str, Any]) -> tuple[Any, ...] | None:
    """What the operator returns: k_embed, y, k_cache, ckv_cache."""
    kv, gamma, cos, sin = (given[name] for name in ("kv", "gamma", "cos", "sin"))
    plain = all(
        given[name] is None for name in ("k_rope_scale", "c_kv_scale", "k_rope_offset", "c_kv_offset", "v")
    )
    mode, epsilon = given["cache_mode"], given["epsilon"]
    if not plain or mode not in SLOTS or not isinstance(epsilon, float):
        return None
    wide, rank = torch.float32, gamma.shape[0]
    latent, turning = part(view, kv, 3, 0, rank), part(view, kv, 3, rank, kv.shape[3] - rank)
    normalized = view.make("rms_norm", (view.cast(latent, wide), view.cast(gamma, wide), epsilon), wide)
    y = view.cast(normalized, kv.dtype)
    k = view.make("npu.npu_interleave_rope.default", (turning, cos, sin), kv.dtype)
    how = "PA_NZ" if mode == "PA_NZ" else "PA"
    stored = tuple(
        written(view, given[name], rows, given["index"], how, None)
        for name, rows in (("k_cache", k), ("ckv_cache", y))
    )
    if given["is_output_kv"]:
        return k, y, *stored
    nothing = (view.make("unwritten", (t,), kv.dtype) for t in stored)
    return (*nothing, *stored)


if hasattr(higher_order, "auto_functionalized_v2"):

    @rule(higher_order.auto_functionalized_v2)
    def _auto_functionalized(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
        target = node.args[0]
        if target is not npu.npu_kv_rmsnorm_rope_cache_v2.default:
            return NotImplemented
        caches = ("k_cache", "ckv_cache")
        given = {name: view.term(value) for name, value in node.kwargs.items()}
        bases = given.pop("_all_bases", ())
        order = [given.pop(f"_{name}_base_index", None) for name in caches]
        if sorted(i for i in order if isinstance(i, int)) != [0, 1] or any(n.startswith("_") for n in given):
            return NotImplemented
        given |= {name: bases[i] for name, i in zip(caches, order, strict=True)}
        defaults = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
        parts = _kv_rope(view, defaults | given)
        if parts is None:
            return NotImplemented
        stored = dict(zip(order, parts[2:], strict=True))
        return (*parts[:2], stored[0], stored[1])


@rule(npu.npu_scatter_pa_kv_cache_functional.default)
def _scatter_pa(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    key, value, key_cache, value_cache, slots, *others, mode = args
    if any(o is not None for o in others) or mode != "Norm":
        return NotImplemented
    return tuple(
        written(view, cache, rows, slots, "PA", None)
        for cache, rows in ((key_cache, key), (value_cache, value))
    )
