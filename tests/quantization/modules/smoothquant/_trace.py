"""One graph without breaks or writes to its inputs, and eager's results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd


def traced(fn: Callable[..., Tensor], calls: Sequence[Sequence[Tensor]], dynamic: bool) -> list[fx.Graph]:
    """Compile ``fn`` and call it; each result has to be eager's to the bit, each input stays what it was."""
    torch._dynamo.reset()
    graphs: list[fx.Graph] = []

    def record(gm: fx.GraphModule, _: Any) -> fx.GraphModule:
        graphs.append(gm.graph)
        return gm

    compiled = torch.compile(fn, backend=aot_autograd(fw_compiler=record), dynamic=dynamic, fullgraph=True)
    with torch.no_grad():
        for args in calls:
            before = [a.clone() for a in args]
            expected = fn(*args)
            result = compiled(*args)
            assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
            assert torch.equal(result, expected)
            assert all(map(torch.equal, args, before))
    for graph in graphs:
        writes = [
            n.target
            for n in graph.nodes
            if getattr(n.target, "_schema", None) and n.target._schema.is_mutable
        ]
        assert writes == []
    return graphs
