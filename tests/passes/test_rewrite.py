"""Putting a graph in order after uses were redirected."""

from __future__ import annotations

import itertools
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from npu_fusion.config import FusionConfig
from npu_fusion.passes import pipeline
from npu_fusion.passes.rewrite import RewriteError, order
from tests.passes._harness import fuse


def _graph(**inputs: str) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """One node for each name, in this order, whose inputs are the letters of its value."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for name in inputs:
        nodes[name] = graph.create_node("call_function", operator.add, name=name)
    for name, read in inputs.items():
        nodes[name].args = tuple(nodes[letter] for letter in read)
    graph.output(nodes[name])
    return graph, nodes


def _names(graph: fx.Graph) -> str:
    return "".join(n.name for n in graph.nodes if n.op != "output")


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"a": "", "b": "a", "c": "b"}, "abc"),
        ({"a": "", "b": "d", "c": "a", "d": "a", "e": "bc"}, "adbce"),
        ({"a": "", "b": "e", "c": "a", "d": "c", "e": "d", "f": "b"}, "acdebf"),
        ({"a": "cd", "b": "", "c": "d", "d": "b", "e": "a"}, "bdcae"),
        ({"a": "dc", "b": "", "c": "d", "d": "b", "e": "a"}, "bdcae"),
    ],
)
def test_only_what_comes_too_late_moves(inputs: dict[str, str], expected: str) -> None:
    graph, _ = _graph(**inputs)
    order(graph)
    assert _names(graph) == expected
    graph.lint()


def test_a_long_chain_in_reverse_is_no_deep_recursion() -> None:
    graph = fx.Graph()
    nodes = [graph.create_node("call_function", operator.neg, name=f"n{i}") for i in range(3000)]
    for node, late in itertools.pairwise(nodes):
        node.args = (late,)
    graph.output(nodes[0])
    order(graph)
    assert [n.name for n in graph.nodes][:-1] == [n.name for n in reversed(nodes)]
    graph.lint()


def test_a_cycle_is_an_error_and_no_endless_loop() -> None:
    graph, _ = _graph(a="", b="ad", c="b", d="c")
    with pytest.raises(RewriteError, match=r"\w depends on itself"):
        order(graph)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def test_new_calls_look_like_traced_ones() -> None:
    """Patterns of others compare arguments, and read shapes from ``tensor_meta``."""
    emitted: list[fx.Node] = []

    def layer(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return _norm(_norm(x + y, weight, 1e-6), other, 1e-5)

    def look(graph: fx.Graph) -> None:
        pipeline.run(graph, FusionConfig(strict=True))
        emitted.extend(n for n in graph.nodes if "npu" in str(n.target) or "getitem" in str(n.target))

    x, weight = torch.randn(3, 8), torch.randn(8)
    fuse(layer, [x, x + 1, weight, weight + 1], prepare_graph=look)
    add, norm = (n for n in emitted if "npu" in str(n.target))
    assert len(add.args) == 3 and not add.kwargs  # 1e-6 is the default
    assert norm.args[2:] == (1e-5,)
    for node in emitted:
        if isinstance(node.meta["val"], torch.Tensor):
            assert node.meta["tensor_meta"].shape == node.meta["val"].shape
            assert node.meta["tensor_meta"].dtype == node.meta["val"].dtype


@pytest.mark.parametrize("dynamic", [False, True])
def test_no_view_forth_and_back_is_left_of_what_was_there_and_what_is_new(dynamic: bool) -> None:
    """What is replaced has the model's rows; the model views them as they were before."""

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.view(-1, 8), (8,), weight, 1e-6).view(x.shape).cos()

    got = fuse(layer, [torch.randn(2, 3, 8), torch.randn(8)], dynamic=dynamic)
    assert got.fused == {"npu_rms_norm": 1}
    assert "aten.view" not in got.code and "aten.reshape" not in got.code
    torch.testing.assert_close(got.result, got.expected)
