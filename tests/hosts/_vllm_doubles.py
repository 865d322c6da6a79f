"""Stand-ins for what the adapter touches of vLLM, vllm-ascend and npugraph_ex, by name and signature.

Where vllm-ascend can be imported, ``test_vllm_ascend.py`` runs against it as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.custom_graph_pass import CustomGraphPass

_context: Any = None


@contextmanager
def pass_context(compile_range: Any) -> Iterator[None]:
    global _context
    _context = SimpleNamespace(compile_range=compile_range)
    yield
    _context = None


class VllmInductorPass(CustomGraphPass):
    def __init__(self, config: Any) -> None:
        self.pass_config = config.compilation_config.pass_config
        self.pass_name = type(self).__name__

    def uuid(self) -> Any:
        raise AssertionError("the adapter has an identity of its own")

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        return True

    def begin(self) -> None:
        self.running = True

    def end_and_log(self) -> None:
        assert self.running
        self.running = False


class GraphFusionPassManager:
    def __init__(self) -> None:
        self.passes: list[VllmInductorPass] = []

    def __call__(self, graph: fx.GraphModule) -> fx.GraphModule:
        for each in self.passes:
            if each.is_applicable_for_range(_context.compile_range):
                each(graph)  # type: ignore[arg-type]
        graph.recompile()
        return graph

    def add(self, pass_: VllmInductorPass) -> None:
        assert isinstance(pass_, VllmInductorPass)
        self.passes.append(pass_)

    def configure(self, config: Any) -> None:
        self.configured_with = config


def fusion_pass_compile(
    graph: fx.GraphModule,
    example_inputs: list[Any],
    compiler_config: dict[str, Any],
    compile_range: Any,
    key: str | None = None,
) -> tuple[Callable[..., Any], None]:
    manager = compiler_config["graph_fusion_manager"]
    return aot_autograd(fw_compiler=lambda gm, _: manager(gm))(graph, example_inputs), None


class CompilerConfig:
    """npugraph_ex's: each option is an object with a ``value``, which assigning to the option sets."""

    __module__ = "npugraph_ex.configs.compiler_config"

    def __init__(self) -> None:
        for name, value in (
            ("post_grad_custom_pre_pass", None),
            ("mode", "npugraph_ex"),
            ("force_eager", False),
        ):
            vars(self)[name] = SimpleNamespace(value=value)

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self)[name].value = value


def _configure_backend(
    config: Any,
    ascend_compilation_config: Any,
    vllm_config: Any,
    process_kwargs_options: Callable[..., None] | None = None,
) -> None:
    config.force_eager = True


def npugraph_ex_compile(
    graph: fx.GraphModule,
    example_inputs: list[Any],
    compiler_config: dict[str, Any],
    vllm_config: Any,
    ascend_compilation_config: Any,
    compile_range: Any,
    key: str,
    cache_dir: str,
) -> tuple[Callable[..., Any], tuple[str, str]]:
    config = CompilerConfig()
    own = sys.modules["vllm_ascend.compilation.compiler_interface"]
    own._configure_backend(config, ascend_compilation_config, vllm_config, process_kwargs_options=None)
    path = os.path.join(cache_dir, key)

    def compiler(gm: fx.GraphModule, inputs: Any) -> Any:
        run = vars(config)["post_grad_custom_pre_pass"].value
        if run is not None:
            run(gm, inputs, config)
        with open(path, "w") as file:
            file.write(gm.code)
        return gm.forward

    return aot_autograd(fw_compiler=compiler)(graph, example_inputs), (key, path)


class AscendCompiler:
    def compute_hash(self, vllm_config: Any) -> str:
        return "0123456789"


def modules() -> dict[str, ModuleType]:
    """What to put into ``sys.modules``."""
    contents = {
        "vllm_ascend": {},
        "vllm_ascend.compilation": {},
        "vllm_ascend.compilation.graph_fusion_pass_manager": {
            "VllmInductorPass": VllmInductorPass,
            # A class of its own, because the adapter wraps a method of it.
            "GraphFusionPassManager": type("GraphFusionPassManager", (GraphFusionPassManager,), {}),
        },
        "vllm_ascend.compilation.compiler_interface": {
            "AscendCompiler": type("AscendCompiler", (AscendCompiler,), {}),
            "_configure_backend": _configure_backend,
            "fusion_pass_compile": fusion_pass_compile,
            "npugraph_ex_compile": npugraph_ex_compile,
        },
        "npugraph_ex": {},
        "npugraph_ex._utils": {},
        "npugraph_ex._utils.graph_utils": {},
    }
    made = {}
    for name, content in contents.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(content, __path__=[])
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, made[name])
    return made
