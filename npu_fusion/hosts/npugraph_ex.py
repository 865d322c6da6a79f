"""Host ``npugraph_ex``: the pipeline is a pass of npugraph_ex, which captures the graph as an ACL graph.

Offline, without a device, its passes run and the result is run operator by operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from npu_fusion.config import FusionConfig
from npu_fusion.hosts import _torchair_api
from npu_fusion.hosts._ascend_pass import compile_with
from npu_fusion.report import FusionReport


def settings_of(compiler_config: Any) -> Any:
    """A ``CompilerConfig`` that can be changed: a copy of the given one, or one with the options of a dict.

    Raises ``ValueError`` for an option that npugraph_ex does not know.
    """
    if _torchair_api.package_of(compiler_config) is not None:
        return _torchair_api.clone(compiler_config)
    settings = _torchair_api.load("npugraph_ex").CompilerConfig()
    for option, value in (compiler_config or {}).items():
        setattr(settings, option, value)
    return settings


def compile_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    config: FusionConfig,
    name: str,
    record: Callable[[FusionReport], None],
    compiler_config: Any = None,
) -> Callable[..., Any]:
    """Compile with npugraph_ex. ``compiler_config``: ``npugraph_ex.CompilerConfig``, which is not changed, or
    a dict of its options."""
    npugraph_ex = _torchair_api.load("npugraph_ex")
    settings = settings_of(compiler_config)
    if _torchair_api.offline():
        settings.force_eager = True
    return compile_with(
        npugraph_ex.get_npu_backend, settings, "npugraph_ex", gm, inputs, config, name, record
    )
