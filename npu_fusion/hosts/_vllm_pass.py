"""The pipeline as a pass of vllm-ascend's ``GraphFusionPassManager``.

The class is made on first use, because its base class is vLLM's. Its objects can be copied and pickled all
the same: vLLM does both with its configuration.

Source: vllm-ascend 0.23.0, vllm_ascend/compilation/graph_fusion_pass_manager.py; vLLM 0.23.0,
vllm/compilation/passes and vllm/compilation/backends.py.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import fx

from npu_fusion import _compat
from npu_fusion._recorded import RECORDED
from npu_fusion.config import FusionConfig
from npu_fusion.hosts import _admission
from npu_fusion.hosts._run import optimize
from npu_fusion.hosts._vllm_operators import as_torch_npu
from npu_fusion.report import FusionReport


@functools.cache
def pass_class() -> Any:
    """``FusionPass(config, vllm_config=None)``. Raises ``ImportError`` without vllm-ascend."""
    # The very class that the manager asks for: vLLM has moved it between versions.
    base = module("compilation.graph_fusion_pass_manager").VllmInductorPass

    class FusionPass(base):  # type: ignore[misc, valid-type]
        def __init__(self, config: FusionConfig, vllm_config: Any = None) -> None:
            if vllm_config is not None:
                super().__init__(vllm_config)
            self.pass_name = "npu_fusion"
            self.config = config
            self.reports: list[FusionReport] = []

        def __call__(self, graph: fx.Graph | fx.GraphModule) -> None:
            """vllm-ascend's manager passes a module, vLLM's own a graph."""
            self.begin()
            nodes = graph.graph if isinstance(graph, fx.GraphModule) else graph
            settings, admission = _admission.of(self.config, for_ge=False)
            with as_torch_npu(nodes, settings.level):
                report = optimize(
                    nodes,
                    settings,
                    name=self.next_name(),
                    host="vllm_ascend",
                    inference=True,
                    decomposed=False,
                    admission=admission,
                )
            self.record(report)
            if isinstance(graph, fx.GraphModule):
                graph.recompile()
            self.end_and_log()

        def next_name(self) -> str:
            """Numbered, because Dynamo has one name for all pieces of a model."""
            return f"{_compat.compile_name() or 'graph'}_{len(self.reports)}"

        def record(self, report: FusionReport) -> None:
            self.reports.append(report)
            RECORDED.append(report)

        def uuid(self) -> str:
            """Enters vLLM's key for compiled graphs through its configuration."""
            return f"npu_fusion {self.config.cache_key()}"

        def __reduce__(self) -> Any:
            return _unpickled, (self.__dict__,)  # pickle cannot find a class that was made in a function

    return FusionPass


def _unpickled(state: dict[str, Any]) -> Any:
    made = pass_class().__new__(pass_class())
    made.__dict__.update(state)
    return made


def module(name: str) -> Any:
    """The module ``vllm_ascend.<name>``. Raises ``ImportError`` without vllm-ascend."""
    try:
        return importlib.import_module(f"vllm_ascend.{name}")
    except ImportError as error:
        raise ImportError(
            "npu_fusion.hosts.vllm_ascend needs vllm-ascend and vLLM, which cannot be imported here "
            f"({error})"
        ) from error
