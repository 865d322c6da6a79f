"""Compile a function for GE with the real torchair, the pipeline inside, and keep what it lowers to.

torchair converts the graph to GE and writes its ``.pbtxt``; offline it then runs the optimized FX graph on
the CPU. The GE graph is kept twice: as converted, which is what the ``.pbtxt`` holds, and after torchair's
own passes over it, which remove copies of caches. Both are run on the same inputs
(:mod:`tests.ascend._ge_run`) and have to give what the FX graph gives, in the results and in the inputs that
are written.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchair
from torch import fx
from torch.utils._pytree import tree_leaves
from torchair._ge_concrete_graph.fx2ge_converter import GeConcreteGraph
from torchair.patterns import pattern_util
from torchair.patterns.pattern_pass_manager import _PatternPassManager

import npu_fusion
from npu_fusion import targets
from npu_fusion.config import fusion_flags
from npu_fusion.report import FusionReport
from tests.ascend import _ge_run

_SIZES = re.compile(r"torch\.Size\(\[(.*)\]\)")


class Operator(_ge_run.Operator):
    """One operator of a GE graph, with its sizes."""

    def sizes(self, output: int = 0) -> list[int | str]:
        """Sizes of an output as torchair knows them; a symbolic one as text."""
        desc = self.op.output_desc[output]
        if self.op.type == "Data":
            return list(desc.shape.dim)
        found = _SIZES.search(desc.attr["_meta"].s.decode())
        assert found is not None, desc
        return [int(s) if s.isdigit() else s for s in found[1].split(", ") if s]


@dataclass
class Graph:
    """A GE graph."""

    proto: Any

    @property
    def counts(self) -> Counter[str]:
        return Counter(op.type for op in self.proto.op)

    def all(self, kind: str) -> list[Operator]:
        return [Operator(op) for op in self.proto.op if op.type == kind]

    def only(self, kind: str) -> Operator:
        (found,) = self.all(kind)
        return found

    def maker(self, value: str) -> Operator:
        """The operator that makes ``value``, which is written ``operator:index``."""
        name = value.rpartition(":")[0]
        return next(Operator(op) for op in self.proto.op if op.name == name)

    def source(self, value: str) -> Operator:
        """What ``value`` is a view or copy of."""
        found = self.maker(value)
        while found.op.type in ("Reshape", "Unsqueeze", "Squeeze", "Transpose", "TensorMove", "Identity"):
            found = self.maker(found.op.input[0])
        return found


@dataclass
class Lowered:
    """One compiled graph: what the pipeline did, what torchair made of it, and its result on the CPU."""

    report: FusionReport
    expected: Any
    """What eager gives."""
    result: Any
    graph: Graph
    """As converted."""
    optimized: Graph
    """After torchair's own passes over it."""
    fx_graph: fx.Graph
    """The FX graph that was converted, after torchair's own pattern passes."""
    pbtxt: str

    @property
    def fused(self) -> dict[str, int]:
        return self.report.fused

    def reasons(self, fusion: str) -> list[str]:
        return [f"{r.reason}: {r.detail}" for r in self.report.refused if r.fusion == fusion]


def lower(
    fn: Callable[..., Any],
    args: Sequence[Any],
    *,
    dynamic: bool = False,
    afterwards: Callable[[fx.Graph], None] | None = None,
    **config: Any,
) -> Lowered:
    """Compile ``fn`` for GE, a failing pass failing the test, and run it and eager; ``args`` may be written.

    Without ``target`` there are no limits of a SoC, so that examples can be small. ``afterwards`` may edit
    the FX graph last.
    """
    torch._dynamo.reset()
    kept: list[tuple[Graph, Graph, fx.Graph]] = []
    optimize = GeConcreteGraph.optimize_graph_without_runtime

    def keep(graph: Any, *inputs: Any, **options: Any) -> None:
        before = copy.deepcopy(graph.graph._proto)
        optimize(graph, *inputs, **options)
        kept.append((Graph(before), Graph(graph.graph._proto), graph.fx_graph.graph))
        _compare_when_run(graph, before)

    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        compiler_config = torchair.CompilerConfig()
        compiler_config.debug.graph_dump.type = "pbtxt"
        compiler_config.debug.graph_dump.path = directory
        if afterwards is not None:
            compiler_config.post_grad_custom_post_pass = lambda gm, inputs, config: afterwards(gm.graph)
        backend = npu_fusion.get_npu_backend(compiler_config, {"strict": True, **config}, host="torchair")
        expected = fn(*(a.clone() if isinstance(a, torch.Tensor) else a for a in args))
        with (
            mock.patch.object(GeConcreteGraph, "optimize_graph_without_runtime", keep),
            mock.patch.object(targets, "detect", return_value=None),
            # torchair's is for the whole process: once an ACL graph was compiled, GE gets its patterns, too,
            # and then operators that have no converter
            mock.patch.object(pattern_util, "pattern_pass_manager", _PatternPassManager()),
        ):
            result = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
        (dumped,) = Path(directory).glob("*.pbtxt")
        pbtxt = dumped.read_text()
    ((graph, optimized, fx_graph),) = kept
    (report,) = backend.reports
    return Lowered(report, expected, result, graph, optimized, fx_graph, pbtxt)


def _compare_when_run(graph: Any, before: Any) -> None:
    """Each time the FX graph of a GeConcreteGraph is run, run both GE graphs, too."""
    given: list[list[Any]] = []

    def remember(module: Any, args: tuple[Any, ...]) -> None:
        given.append([a.clone() if isinstance(a, torch.Tensor) else a for a in args])

    def compare(module: Any, args: tuple[Any, ...], results: Any) -> None:
        inputs = given.pop()
        for proto in (before, graph.graph._proto):
            mine = [a.clone() if isinstance(a, torch.Tensor) else torch.tensor(a) for a in inputs]
            fed = mine if proto is before else [info.func(*mine) for info in graph._input_info_list]
            outputs = _ge_run.run(proto, fed)
            if proto is not before:  # GE writes these results to the memory of inputs
                for output, index in graph._graph_output_ref_input.items():
                    fed[index].copy_(outputs[output])
            for fx_index, ge_index in graph._fx_outputs_mapping.items():
                torch.testing.assert_close(outputs[ge_index], results[fx_index])
            for have, want in zip(mine, args, strict=True):
                torch.testing.assert_close(have, torch.as_tensor(want))

    graph.fx_graph.register_forward_pre_hook(remember)
    graph.fx_graph.register_forward_hook(compare)


def lower_only(name: str, fn: Callable[..., Any], args: Sequence[Any], **options: Any) -> Lowered:
    """:func:`lower` with every other fusion switched off."""
    flags: dict[str, Any] = {flag: flag == name for flag in fusion_flags()}
    return lower(fn, args, **flags, **options)


def assert_near(got: Lowered, tolerance: float = 2e-2, steps: int = 2) -> None:
    """Results are eager's: floats to ``tolerance`` of the largest value, few int8 values to ``steps``."""
    for have, want in zip(tree_leaves(got.result), tree_leaves(got.expected), strict=True):
        assert (have.shape, have.dtype) == (want.shape, want.dtype)
        off = (have.double() - want.double()).abs()
        if want.dtype == torch.int8:
            assert off.max() <= steps and (off > 0).double().mean() < 0.2
        else:
            assert off.max() <= tolerance * want.double().abs().max()


def assert_dynamic(got: Lowered, *names: str) -> None:
    """Inputs have sizes that are left open, and so have results of the operators ``names``."""
    inputs = [op for op in got.graph.all("Data") if op.sizes()]
    assert inputs and any(-1 in op.sizes() for op in inputs)
    for name in names:
        for op in got.graph.all(name):
            assert any(isinstance(size, str) for size in op.sizes()), op.sizes()
