"""Fake values for nodes that have none: passes of others, written by hand, often leave them out."""

from __future__ import annotations

import contextlib

from torch import fx

from npu_fusion import _compat


def complete(graph: fx.Graph) -> None:
    """Give every call without ``meta["val"]`` the value that its fake implementation returns.

    Raises what the implementation raises; the graph is then as it was, but for values found before.
    """
    missing = [n for n in graph.nodes if n.op == "call_function" and "val" not in n.meta]
    if not missing:
        return
    mode = _compat.find_fake_mode(graph)
    for node in missing:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with mode or contextlib.nullcontext():
            node.meta["val"] = node.target(*args, **kwargs)
