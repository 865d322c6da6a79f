"""Functional operators write into their caches where nothing can tell the difference.

::

    %out  = npu_mla_prolog_v3_functional(.., %view, ..)           %out = npu_mla_prolog_v3(.., %view, ..)
    %new  = getitem(%out, 5)                              ->
    copy_(%cache, reshape(%new))                                  (%view in place of %new)

with %view a view of the graph's input %cache. For every layer and token this saves two copies of a whole
cache. It is a choice between two spellings of one operator, not a fusion, and in no report. torchair and
npugraph_ex have passes of their own for it.

Conditions for each cache of a call: it is all of an input, seen in its own order; the new one is written back
to it as a whole; nothing reads the old one after the call; nothing writes to the new one; the graph does not
return it (its caller would hold the input instead of a tensor of its own). Otherwise the call stays.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from npu_fusion.passes.checks import product, row_major
from npu_fusion.passes.memory import written_by
from npu_fusion.passes.terms import sizes_of

aten = torch.ops.aten
npu = torch.ops.npu

_OPERATORS = {
    npu.npu_mla_prolog_v3_functional.default: (npu.npu_mla_prolog_v3.default, {9: 5, 10: 6}),
    npu.npu_kv_rmsnorm_rope_cache_v2_functional.default: (
        npu.npu_kv_rmsnorm_rope_cache_v2.default,
        {5: 2, 6: 3},
    ),
}
"""What writes in place, and for each cache (by position) which result is the new one."""

_MAY_BE_VIEWS = (aten.reshape.default, aten._unsafe_view.default, aten.contiguous.default)
_OF_METADATA = (
    aten.sym_size.int,
    aten.sym_stride.int,
    aten.sym_numel.default,
    aten.sym_storage_offset.default,
)


def write_in_place(graph: fx.Graph) -> None:
    """Rewrite ``graph``, a functional one but for its epilogue of copies, in place."""
    changed = False
    for functional, (in_place, caches) in _OPERATORS.items():
        for call in graph.find_nodes(op="call_function", target=functional):
            order = {node: position for position, node in enumerate(graph.nodes)}
            copies = [_written_back(call, at, result, order) for at, result in caches.items()]
            if all(copy is not None for copy in copies):
                _replace(call, in_place, caches, [copy for copy in copies if copy is not None])
                changed = True
    if changed:
        graph.lint()


def _written_back(call: fx.Node, at: int, result: int, order: dict[fx.Node, int]) -> fx.Node | None:
    """The node that copies a new cache into the old one, if the call may write there itself."""
    cache = call.args[at]
    root = _input(cache) if isinstance(cache, fx.Node) else None
    if root is None:
        return None
    own = [(copy, source) for copy, source in _copies_into(root) if _is_all_of(source, result, call)]
    if len(own) != 1:
        return None
    copy = own[0][0]
    for reader in _readers(root):
        if reader in (call, copy) or reader.target in _OF_METADATA or _is_all_of(reader, result, call):
            continue
        if order[reader] > order[call]:
            return None
    for new in _results(call, result):
        for reader in _readers(new):
            if reader is not copy and (reader.op == "output" or _writes(reader)):
                return None
    return copy


def _input(cache: fx.Node) -> fx.Node | None:
    """The input that ``cache`` is all of, in its order."""
    node = cache
    while _keeps_order(node):
        node = node.args[0]  # type: ignore[assignment]
    if node.op != "placeholder" or not row_major(node.meta["val"]) or not row_major(cache.meta["val"]):
        return None
    return node


def _is_all_of(source: fx.Node, result: int, call: fx.Node) -> bool:
    """Has ``source`` the elements of this result of the call, in their order?"""
    while True:
        if _keeps_order(source):
            source = source.args[0]  # type: ignore[assignment]
        elif source.target is aten.copy.default and _alike(source.args[0], source.args[1]):
            source = source.args[1]  # type: ignore[assignment]
        else:
            return source in _results(call, result)


def _keeps_order(node: fx.Node) -> bool:
    """Is it a view of all elements of its argument, in their order?"""
    if not _may_be_view(node) or node.target is operator.getitem or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    same = sympy.expand(product(sizes_of(before.shape)) - product(sizes_of(after.shape))) == 0
    return before.dtype == after.dtype and row_major(before) and row_major(after) and same


def _alike(first: Any, second: Any) -> bool:
    """Two tensors of one shape and dtype?"""
    a, b = first.meta["val"], second.meta["val"]
    return a.dtype == b.dtype and sizes_of(a.shape) == sizes_of(b.shape)


def _copies_into(root: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    for user in root.users:
        if user.target is aten.copy_.default and user.args[0] is root and isinstance(user.args[1], fx.Node):
            yield user, user.args[1]


def _results(call: fx.Node, index: int) -> list[fx.Node]:
    return [user for user in call.users if user.target is operator.getitem and user.args[1] == index]


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What uses the memory of ``node``, itself or by a view."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if _may_be_view(user):
                pending.append(user)
            else:
                yield user


def _may_be_view(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return _may_be_view(node.args[0])  # type: ignore[arg-type]
    return getattr(node.target, "is_view", False) or node.target in _MAY_BE_VIEWS


def _writes(node: fx.Node) -> bool:
    return bool(written_by(node)) or not isinstance(node.target, torch._ops.OpOverload)


def _replace(
    call: fx.Node, in_place: torch._ops.OpOverload, caches: dict[int, int], copies: list[fx.Node]
) -> None:
    kept = min(caches.values())
    graph = call.graph
    for copy in copies:
        node: Any = copy.args[1]
        graph.erase_node(copy)
        while not node.users and node.target is not operator.getitem:
            unused, node = node, node.args[0 if _may_be_view(node) else 1]
            graph.erase_node(unused)
    for at, result in caches.items():
        for new in _results(call, result):
            new.replace_all_uses_with(call.args[at])  # type: ignore[arg-type]
            graph.erase_node(new)
    call.target = in_place
    call.meta["val"] = call.meta["val"][:kept]
