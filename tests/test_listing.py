"""Reading print_readable listings back, and aligning two of them."""

from __future__ import annotations

import random
from itertools import combinations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from npu_fusion._listing import Line, align, by_name, parse
from tests.sample_report import sample


def test_every_node_of_a_real_graph_is_read() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first, second = torch.ops.aten.split.Tensor(torch.ops.aten.mm.default(x, w), 8, -1)
        size = x.shape[0] * 2
        return (
            first,
            torch.ops.aten.silu.default(second).to(torch.bfloat16),
            torch.ops.aten.full.default([size], 1),
        )

    module = make_fx(forward, tracing_mode="symbolic")(torch.ones(3, 4), torch.ones(4, 16))
    for expanded in (False, True):
        lines = by_name(parse(module.print_readable(print_output=False, expanded_def=expanded)))
        assert [n.name for n in module.graph.nodes if n.name not in lines] == []
        for node in module.graph.nodes:
            if node.op == "call_function":
                inputs = tuple(dict.fromkeys(n.name for n in node.all_input_nodes))
                assert lines[node.name].inputs == inputs, node
        assert lines["mm"].type.startswith("f32[")
        assert lines["mm"].code == "aten.mm.default(x_1, w_1)"


def test_operator_names() -> None:
    def operator(code: str) -> str:
        return Line("n", "", code).operator

    assert operator("aten.silu.default(x)") == "silu"
    assert operator("npu.npu_rms_norm.default(x, w, 1e-06)") == "npu_rms_norm"
    assert operator("higher_order.cond(p, t, f, (x,))") == "cond"
    assert operator("torch.sym_max(a, b)") == "sym_max"
    assert operator("split[0]") == "[0]"
    assert operator("arg0_1 * 2") == "x * 2"


def test_subgraphs_do_not_mix_with_the_graph() -> None:
    code = """
class GraphModule(torch.nn.Module):
    def forward(self, arg0_1: "f32[2]"):
        # File: /a/b.py:3 in forward, code: y = sin(x) < 2
        sin: "f32[2]" = torch.ops.aten.sin.default(arg0_1);  arg0_1 = None
        return (sin,)

    class body(torch.nn.Module):
        def forward(self, arg0_1: "i64[7]"):
            cos: "i64[7]" = torch.ops.aten.cos.default(arg0_1);  arg0_1 = None
            return (cos,)
"""
    lines = parse(code)
    own = by_name(lines)
    assert list(own) == ["arg0_1", "sin", "output"]
    assert own["arg0_1"].type == "f32[2]"
    assert own["sin"].comment == "# File: /a/b.py:3 in forward, code: y = sin(x) < 2"
    assert [line.name for line in lines if line.graph == "body"] == ["", "arg0_1", "cos", "output"]


def test_strings_and_keywords_are_no_inputs() -> None:
    code = "class M(torch.nn.Module):\n    def forward(self, rint, dtype):\n"
    code += "        y = torch.ops.npu.f.default(rint, round_mode = 'dtype', dtype = torch.int8)\n"
    assert by_name(parse(code))["y"].inputs == ("rint",)


def test_align_gives_back_both_listings_and_pairs_what_is_common() -> None:
    report = sample(3)
    left, right = (parse(code) for _, code in (report.stages[0], report.stages[-1]))
    blocks = align(left, right)
    assert [line for block in blocks for line in block.left] == left
    assert [line for block in blocks for line in block.right] == right
    paired = [
        (a.key, b.key) for block in blocks if block.same for a, b in zip(block.left, block.right, strict=True)
    ]
    assert all(a == b for a, b in paired)
    assert len(paired) == len({line.key for line in left} & {line.key for line in right})


@given(st.integers(0, 8), st.integers(0, 10_000))
@settings(deadline=None, max_examples=60)
def test_align_pairs_the_longest_common_order(size: int, seed: int) -> None:
    generator = random.Random(seed)
    names = [f"n{index}" for index in range(size)]
    left = [Line(name, "", "f()") for name in generator.sample(names, generator.randint(0, size))]
    right = [Line(name, "", "f()") for name in generator.sample(names, generator.randint(0, size))]
    blocks = align(left, right)
    assert [line for block in blocks for line in block.left] == left
    assert [line for block in blocks for line in block.right] == right
    assert all(block.left == block.right for block in blocks if block.same)
    paired = sum(len(block.left) for block in blocks if block.same)
    places = [right.index(line) for line in left if line in right]
    longest = max(
        n for n in range(len(places) + 1) if any(list(c) == sorted(c) for c in combinations(places, n))
    )
    assert paired == longest
