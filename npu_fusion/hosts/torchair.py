"""Host ``torchair``: the pipeline is a pass of torchair, which lowers the graph to GE.

With ``mode="reduce-overhead"`` or ``"npugraph_ex"`` in its configuration, torchair captures an ACL graph
instead; that needs no GE converters. Offline, without a device, the graph is lowered all the same, and then
run operator by operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from npu_fusion.config import FusionConfig
from npu_fusion.hosts import _torchair_api
from npu_fusion.hosts._ascend_pass import compile_with
from npu_fusion.report import FusionReport


def compile_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    config: FusionConfig,
    name: str,
    record: Callable[[FusionReport], None],
    compiler_config: Any = None,
) -> Callable[..., Any]:
    """Compile with torchair as ``compiler_config`` (``torchair.CompilerConfig``) says; it is not changed."""
    torchair = _torchair_api.load("torchair")
    settings = torchair.CompilerConfig() if compiler_config is None else _torchair_api.clone(compiler_config)
    if _torchair_api.offline():
        settings.debug.run_eagerly = True
    return compile_with(torchair.get_npu_backend, settings, "torchair", gm, inputs, config, name, record)
