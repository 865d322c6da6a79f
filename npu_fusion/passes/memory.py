"""Who writes to whose memory. Graphs are functional but for an epilogue of copies, with rare exceptions."""

from __future__ import annotations

import operator

from torch import fx


def written_by(node: fx.Node) -> set[fx.Node]:
    """The storages (by the nodes that own them) that a node writes to."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return set()
    written = set()
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            for n in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(n, fx.Node):
                    written.add(storage_root(n))
    return written


def storage_root(node: fx.Node) -> fx.Node:
    """What a chain of views is a view of."""
    while node.op == "call_function" and (
        node.target is operator.getitem or getattr(node.target, "is_view", False)
    ):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        node = source
    return node
