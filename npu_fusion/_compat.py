"""Everything that differs between the supported versions of torch (2.6 and later), and nothing else."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx

MINIMUM = (2, 6)

E8M0: torch.dtype | None = getattr(torch, "float8_e8m0fnu", None)
"""The dtype of scales of mx types, a power of two each (torch 2.7 and later)."""


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def require_torch() -> None:
    """Refuse a torch that is too old with one clear message."""
    if torch_version() < MINIMUM:
        raise ImportError(
            f"npu_fusion needs torch {MINIMUM[0]}.{MINIMUM[1]} or later; this is torch {torch.__version__}"
        )


def find_fake_mode(graph: fx.Graph) -> Any:
    """The FakeTensorMode that the graph's values belong to, or None for a graph of real or no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def hint(value: Any) -> Any:
    """The number that a symbolic size was traced with; other values as they are."""
    if isinstance(value, torch.SymInt):
        return int(value.node.hint)
    return value


def specialize_floats(gm: fx.GraphModule) -> None:
    """Make the Python floats that Dynamo turned into graph inputs constants again, each with a guard.

    With ``dynamic=True`` Dynamo passes floats of modules (an RMSNorm's eps) as 0-d tensors and reads them
    with ``item()``. Fused operators take them as attributes, so they have to be numbers. This is what
    ``torch._dynamo.config.specialize_float`` does, restricted to the graph at hand.
    """
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    changed = False
    for node in list(gm.graph.nodes):
        if node.op != "call_method" or node.target != "item":
            continue
        source = node.args[0]
        example = source.meta.get("example_value")
        if (
            source.op == "placeholder"
            and isinstance(example, FakeTensor)
            and example.dim() == 0
            and example.dtype == torch.float64
            and isinstance(example.item_memo, torch.SymFloat)
        ):
            node.replace_all_uses_with(guard_scalar(example.item_memo))
            gm.graph.erase_node(node)
            changed = True
    if changed:
        gm.recompile()


def inference_aware_pass_base() -> Any:
    """Base class of a graph pass that Inductor tells whether a graph is for inference (torch 2.9 and later).

    Older versions call the pass with the graph alone.
    """
    from torch._inductor import custom_graph_pass

    return getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", custom_graph_pass.CustomGraphPass)


def may_need_grad(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Can the graph be traced for training: is grad mode on and does an input require a gradient?"""
    tensors = [*inputs, *gm.parameters()]
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def inductor_cache_dir() -> Path:
    """Where Inductor keeps its caches."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


@contextmanager
def without_compile_caches() -> Iterator[None]:
    """Compile afresh: no cached AOTAutograd result is used or written."""
    from torch._functorch import config

    with config.patch(enable_autograd_cache=False):
        yield


def compile_name() -> str | None:
    """A name for the graph that Dynamo is compiling: ``graph_<frame>_<recompilation>``."""
    from torch._guards import CompileContext

    compile_id = CompileContext.current_compile_id()
    if compile_id is None:
        return None
    return f"graph_{compile_id}".replace("/", "_").replace("[", "").replace("]", "")


def aot_stage() -> str | None:
    """Which graph AOTAutograd has compiled right now: ``"inference"``, ``"forward"``, ``"backward"`` or
    ``"joint"``; None outside of AOTAutograd."""
    from torch._functorch._aot_autograd import logging_utils

    names, _, _ = logging_utils.get_aot_compilation_context()
    return names[-1].rpartition("_")[2] if names else None


def at_dynamo_reset(listener: Any) -> None:
    """Have the next ``torch._dynamo.reset()`` call ``listener.reset()``, as it does with backends."""
    from torch._dynamo import eval_frame

    eval_frame.cached_backends[id(listener)] = listener


@contextmanager
def no_recompile_limit() -> Iterator[None]:
    """Trace a function however often it has been traced before (the limit got its name in torch 2.7)."""
    from torch._dynamo import config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({name: 2**16}):
        yield


def has_npu() -> bool:
    """Has torch_npu been imported (by ``import torch``, where it is installed), and is there a device?"""
    npu = getattr(torch, "npu", None)
    return npu is not None and bool(npu.is_available())


def why_no_inductor() -> str | None:
    """What Inductor misses to compile for the CPU, or None if it can."""
    from torch._inductor import config, exc

    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "the headers of Python are not installed"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return f"there is no C++ compiler ({config.cpp.cxx})"
    return None


def real_tensors() -> AbstractContextManager[Any]:
    """Compute with real tensors although a graph is being compiled, where a FakeTensorMode is on."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()
