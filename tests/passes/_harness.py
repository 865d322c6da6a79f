"""Capture a function as the hosts do, run the pipeline and its result, and keep what is to be judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import compile_fx, fake_tensor_prop
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.virtualized import V

from npu_fusion.config import FusionConfig, fusion_flags
from npu_fusion.passes import pipeline
from npu_fusion.passes.rewrite import Admission
from npu_fusion.report import FusionReport

DIALECTS = ("aot", "inductor")
"""Undecomposed AOT graphs (torchair, npugraph_ex, eager host) and Inductor's decomposed ones."""


@dataclass
class Outcome:
    report: FusionReport
    expected: Any
    """What eager gives."""
    result: Any
    """What the rewritten graph gives."""
    code: str
    before: str

    @property
    def fused(self) -> dict[str, int]:
        return self.report.fused

    def reasons(self, fusion: str) -> list[str]:
        return [f"{r.reason}: {r.detail}" for r in self.report.refused if r.fusion == fusion]


def _post_grad_only(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
    """What Inductor does to a graph before it generates code; then the graph itself: a second less a test."""
    view_to_reshape(gm)
    with torch.no_grad():
        mode = fake_tensor_prop(gm, inputs)
    with V.set_fake_mode(mode):
        post_grad_passes(gm, is_inference=kwargs.get("is_inference", True))
    gm.recompile()
    return gm.forward


def fuse(
    fn: Callable[..., Any],
    args: Sequence[Any],
    *,
    dynamic: bool = False,
    dialect: str = "aot",
    prepare_graph: Callable[[fx.Graph], None] | None = None,
    inference: bool = True,
    admission: Admission | None = None,
    **config: Any,
) -> Outcome:
    """Compile ``fn`` with the pipeline in strict mode (a failing pass fails the test) and run both.

    ``prepare_graph`` may edit the captured graph before the pipeline sees it (stream labels, say).
    ``inference`` and ``admission`` are what the pipeline is told. Inductor's dialect runs its passes but not
    its code generator.
    """
    torch._dynamo.reset()
    settings = FusionConfig(**{"strict": True, **config})
    reports: list[FusionReport] = []
    before: list[str] = []
    code: list[str] = []

    def run(graph: fx.Graph, decomposed: bool) -> None:
        if prepare_graph is not None:
            prepare_graph(graph)
        before.append(pipeline.readable(graph))
        told: Any = {"decomposed": decomposed, "inference": inference, "admission": admission}
        reports.append(pipeline.run(graph, settings, **told))
        code.append(pipeline.readable(graph))

    backend: Any
    if dialect == "inductor":

        def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            patches = {"post_grad_custom_pre_pass": lambda g: run(g, True), "fx_graph_cache": False}
            with torch._functorch.config.patch(enable_autograd_cache=False):
                return compile_fx(gm, inputs, inner_compile=_post_grad_only, config_patches=patches)

    else:

        def compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            run(gm.graph, False)
            gm.recompile()
            return gm.forward

        backend = aot_autograd(fw_compiler=compiler)

    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        expected = fn(*args)
        result = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    assert len(reports) == 1
    return Outcome(reports[0], expected, result, code[0], before[0])


def fuse_only(name: str, fn: Callable[..., Any], args: Sequence[Any], **options: Any) -> Outcome:
    """:func:`fuse` with every other fusion switched off, so that what is not fused is eager's to the bit."""
    return fuse(fn, args, **{flag: flag == name for flag in fusion_flags()}, **options)
