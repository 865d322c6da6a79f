"""Everything that touches the insides of torchair and npugraph_ex, which differ between their releases.

Source: torch_npu 2.13.0, dynamo/torchair and dynamo/npugraph_ex.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

PASS = "post_grad_custom_pre_pass"
"""``fn(gm, example_inputs, config)`` on the functional, undecomposed graph, before torchair's patterns."""

OFFLINE = "NPU_FUSION_OFFLINE"
"""Environment variable of a process that has torch_npu without CANN (:mod:`npu_fusion.hosts.offline`)."""


def offline() -> bool:
    """Is torch_npu here without a device, so that a graph can be lowered but not run by GE?"""
    return os.environ.get(OFFLINE) == "1"


@contextlib.contextmanager
def without_cpu_kernels() -> Iterator[None]:
    """Offline, where the tensors are on the CPU: trace attention as matmuls, not as a kernel for CPUs that
    nothing lowers. On an NPU torch_npu gives its own operator."""
    if not offline():
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def load(package: str) -> Any:
    """``torchair`` or ``npugraph_ex``, which ``import torch_npu`` puts in place."""
    try:
        importlib.import_module("torch_npu")
        return importlib.import_module(package)
    except (ImportError, OSError) as error:
        raise ImportError(
            f"host={package!r} needs torch_npu with {package}, which cannot be imported here ({error}); "
            "without an NPU, `npu-fusion lower` checks the lowering offline (docs/ascend.md)"
        ) from error


def package_of(compiler_config: Any) -> str | None:
    """``"torchair"`` or ``"npugraph_ex"`` for an object of that package's ``CompilerConfig``, else None."""
    for cls in type(compiler_config).__mro__:
        for package in ("npugraph_ex", "torchair"):
            if cls.__name__ == "CompilerConfig" and package in cls.__module__.split("."):
                return package
    return None


def clone(compiler_config: Any) -> Any:
    """A copy whose options can be set without changing the user's; their values are the same objects."""
    made = copy.copy(compiler_config)
    for name, value in vars(compiler_config).items():
        if type(value).__module__.split(".")[0] in ("torchair", "npugraph_ex", "torch_npu"):
            vars(made)[name] = clone(value)
    return made


def given_pass(compiler_config: Any) -> Any:
    """The pass that the user has set, or None."""
    return getattr(compiler_config, PASS).value


def lowers_to_ge(package: str, compiler_config: Any) -> bool:
    """Does the graph become a GE graph? In its other modes torchair captures an ACL graph, as npugraph_ex."""
    return package == "torchair" and compiler_config.mode.value == "max-autotune"


def dump_ge_graph(compiler_config: Any, folder: str) -> None:
    """Have torchair write the GE graph as text into ``folder``, that of the graph's report; a dump that the
    user has configured stays where it is."""
    graph_dump = compiler_config.debug.graph_dump
    if not graph_dump.enabled or graph_dump.path in _directed:
        graph_dump.type = "pbtxt"
        graph_dump.path = folder
        _directed.add(graph_dump.path)


_directed: set[str] = set()
"""Where graphs of this process were written by :func:`dump_ge_graph`; any other path is the user's."""


def label_streams(gm: fx.GraphModule, package: str) -> None:
    """Let ``package`` note for every node in which stream, and under which core limit, it runs.

    It does so itself only after the pass for custom passes.
    """
    utils = importlib.import_module(f"{package}._utils.graph_utils")
    helper = getattr(utils, "add_scope_metadata_to_node_meta", None) or getattr(
        utils, "add_stream_label_to_node_meta", None
    )
    if helper is not None:  # the labels came with torchair's stream scopes: before, there were no streams
        helper(gm)


def has_ge_converter(operator: Any) -> bool:
    """Can torchair lower ``operator`` to GE by a converter of its own?

    One that torchair would generate from GE's registered operators does not count: what it makes of the
    arguments cannot be known before there is a device.
    """
    converters = importlib.import_module("torchair._ge_concrete_graph.fx2ge_converter")
    return converters._get_converter(operator) is not None  # imports the ones of torch_npu's operators first
