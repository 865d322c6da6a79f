"""Putting a graph in order after uses were redirected."""

from __future__ import annotations

import itertools
import operator

import pytest
from torch import fx

from npu_fusion.passes.rewrite import RewriteError, order


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
