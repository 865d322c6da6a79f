"""Host ``eager``: the rewritten graph runs as it is, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from npu_fusion.config import FusionConfig
from npu_fusion.hosts._run import optimize
from npu_fusion.report import FusionReport


def compile_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    config: FusionConfig,
    name: str,
    record: Callable[[FusionReport], None],
    compiler_config: None = None,
) -> Callable[..., Any]:
    """Functionalize, run the pipeline on the undecomposed graph, and return something to call."""

    def compiler(inference: bool) -> Callable[..., Any]:
        def compile_one(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
            record(
                optimize(
                    graph_module.graph, config, name=name, host="eager", inference=inference, decomposed=False
                )
            )
            graph_module.recompile()
            return make_boxed_func(graph_module.forward)

        return compile_one

    backend = aot_autograd(
        fw_compiler=compiler(inference=False),
        inference_compiler=compiler(inference=True),
        keep_inference_input_mutations=True,
    )
    return backend(gm, inputs)
