"""A hand-made report of a real small graph, for the tests of what shows reports."""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

import npu_fusion  # noqa: F401  (defines torch.ops.npu)
from npu_fusion.report import Fused, FusionReport, Refusal

aten = torch.ops.aten
HIDDEN = 8
CHAIN = 14
"""Nodes of one dequant, SwiGLU, quant chain in the plain graph."""


def _forward(x: torch.Tensor, scale: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Per weight pair: integer product, dequantization, SwiGLU, dynamic quantization, projection back."""
    outputs = []
    for up, down in zip(weights[::2], weights[1::2], strict=True):
        product = aten._int_mm.default(x, up)
        real = aten.mul.Tensor(aten._to_copy.default(product, dtype=torch.float32), scale)
        gate, value = aten.split.Tensor(real, HIDDEN, -1)
        act = aten.mul.Tensor(aten.silu.default(gate), value)
        row = aten.div.Tensor(aten.amax.default(aten.abs.default(act), [-1], True), 127.0)
        rounded = aten.round.default(aten.div.Tensor(act, row))
        quantized = aten._to_copy.default(aten.clamp.default(rounded, -128, 127), dtype=torch.int8)
        outputs += [aten.tanh.default(aten._int_mm.default(quantized, down)), row]
    return tuple(outputs)


def _counts(graph: fx.Graph) -> dict[str, int]:
    calls = (
        node for node in graph.nodes if node.op == "call_function" and node.target is not operator.getitem
    )
    return dict(Counter(str(node.target) for node in calls))


def _code(module: fx.GraphModule) -> str:
    module.recompile()
    return module.print_readable(print_output=False)


def sample(layers: int = 2, *, dry_run: bool = False, name: str = "graph_0") -> FusionReport:
    """Every layer fused but the last, whose chain is a near miss."""
    widths = (2 * HIDDEN, 4) * layers
    weights = [torch.zeros(HIDDEN, width, dtype=torch.int8) for width in widths]
    arguments = (torch.zeros(32, HIDDEN, dtype=torch.int8), torch.zeros(2 * HIDDEN), *weights)
    module = make_fx(_forward, tracing_mode="fake")(*arguments)
    graph = module.graph
    for node in graph.nodes:
        if node.target is aten._int_mm.default:
            node.meta["stack_trace"] = '  File "/home/user/model.py", line 31, in forward\n    x = mm(x, w)\n'
    report = FusionReport(graph=name, host="inductor", dry_run=dry_run, operators_before=_counts(graph))
    report.stages.append(("before", _code(module)))

    chains = []
    for node in graph.nodes:
        if node.target is aten._int_mm.default and len(chains) <= 2 * layers:
            chains.append(node)
    for index, product in enumerate(chains[::2]):
        nodes = list(graph.nodes)
        start = nodes.index(product) + 1
        chain = nodes[start : start + CHAIN]
        names = tuple(node.name for node in chain)
        source = "/home/user/model.py:31"
        if index == layers - 1:
            reason = "another node reads an intermediate value"
            report.refused.append(Refusal("dequant_swiglu_quant", reason, f"{names[3]} <&>", names, source))
            continue
        quantized, row = chain[-1], next(n for n in chain if n.target is aten.div.Tensor)
        emitted: tuple[str, ...] = ()
        if not dry_run:
            with graph.inserting_after(chain[-1]):
                call = graph.call_function(torch.ops.npu.npu_dequant_swiglu_quant.default, (product,))
            with graph.inserting_after(call):
                first = graph.call_function(operator.getitem, (call, 0))
            with graph.inserting_after(first):
                second = graph.call_function(operator.getitem, (call, 1))
            first.meta["val"], second.meta["val"] = quantized.meta["val"], row.meta["val"].squeeze(-1)
            users = [user for user in quantized.users if user not in chain]
            for user in users:
                user.replace_input_with(quantized, first)
            for user in [user for user in row.users if user not in chain]:
                user.replace_input_with(row, second)
            for node in reversed(chain):
                graph.erase_node(node)
            emitted = (call.name, first.name, second.name)
        note = "rounding of the float32 product is left out"
        report.fusions.append(
            Fused(
                "dequant_swiglu_quant",
                "npu_dequant_swiglu_quant",
                "accurate",
                (note,),
                names,
                emitted,
                source,
            )
        )
    report.stages += [("compose", _code(module)), ("after", _code(module))]
    report.operators_after = _counts(graph)
    report.timing = {"canonicalize": 0.0012, "lift": 0.0004, "compose": 0.0021}
    return report


def large(layers: int, nodes_per_layer: int) -> FusionReport:
    """A report as a model of many layers gives it, written directly: tracing it would take long."""
    before, after, report = [], [], FusionReport(graph="large", timing={"compose": 0.3})
    for layer in range(layers):
        names = [f"mul_{layer}_{index}" for index in range(nodes_per_layer)]
        for index, name in enumerate(names):
            reads = names[index - 1] if index else "arg0_1"
            code = f"torch.ops.aten.mul.Tensor({reads}, arg0_1);  {reads} = None"
            line = f'        {name}: "bf16[s77, 4096]" = {code}'
            before.append(line)
            if not 10 <= index < 24:
                after.append(line)
            if index == 23:
                emitted = f"npu_swiglu_{layer}"
                kind = '"bf16[s77, 4096]"'
                after.append(f"        {emitted}: {kind} = torch.ops.npu.npu_swiglu.default({names[9]})")
        source = f"/home/user/layer.py:{layer}"
        report.fusions.append(
            Fused("swiglu", "npu_swiglu", "strict", (), tuple(names[10:24]), (emitted,), source)
        )
        refused = tuple(names[40:52])
        report.refused.append(Refusal("rms_norm", "eps is a tensor", f"layer {layer}", refused, source))
    head = 'class GraphModule(torch.nn.Module):\n    def forward(self, arg0_1: "bf16[s77, 4096]"):\n'
    tail = f"        return (mul_{layers - 1}_{nodes_per_layer - 1},)\n"
    report.stages = [
        (n, head + "\n".join(lines) + "\n" + tail) for n, lines in (("before", before), ("after", after))
    ]
    report.operators_before = {"aten.mul.Tensor": len(before)}
    report.operators_after = {"aten.mul.Tensor": len(after) - layers, "npu.npu_swiglu.default": layers}
    return report
