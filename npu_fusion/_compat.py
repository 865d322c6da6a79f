"""Everything that differs between the supported versions of torch (2.6 and later), and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

MINIMUM = (2, 6)


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def require_torch() -> None:
    """Refuse a torch that is too old with one clear message."""
    if torch_version() < MINIMUM:
        raise ImportError(
            f"npu_fusion needs torch {MINIMUM[0]}.{MINIMUM[1]} or later; this is torch {torch.__version__}"
        )


def find_fake_mode(graph: fx.Graph) -> Any:
    """The FakeTensorMode that the graph's values belong to, or None for a graph of real or no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def stable_topological_sort(graph: fx.Graph) -> None:
    """Order nodes after their inputs, changing as little as possible."""
    from torch._inductor.pattern_matcher import stable_topological_sort as sort

    sort(graph)
