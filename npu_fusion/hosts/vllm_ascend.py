"""Host vLLM-Ascend: the pipeline as one more pass of ``GraphFusionPassManager``, and inside npugraph_ex.

vllm-ascend compiles in one of two ways, and each has its own place for a pass::

    PIECEWISE graphs   AOTAutograd ─▶ GraphFusionPassManager: its passes ─▶ ours ─▶ run operator by operator
    FULL graphs        npugraph_ex.get_npu_backend(config):   ours (post_grad_custom_pre_pass) ─▶ its patterns

:func:`fusion_pass` makes the pass for the first, to be set in the compilation config by hand. :func:`install`
hooks into both in the process that calls it; the plugin ``npu_fusion_vllm`` calls it in each of vLLM's.

What :func:`install` wraps, and :meth:`Installation.remove` puts back:

* ``GraphFusionPassManager.configure``: adds our pass after vllm-ascend's own;
* ``compiler_interface._configure_backend``: sets our pass in the configuration of npugraph_ex (or torchair),
  which vllm-ascend makes anew for every graph;
* ``AscendCompiler.compute_hash``: our configuration enters the key under which vLLM caches compiled graphs.
  Without, a graph fused otherwise would be taken out of the cache.

Neither vLLM nor vllm-ascend is imported before one of the functions is called.

Source: vllm-ascend 0.23.0, vllm_ascend/compilation.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from npu_fusion.config import FusionConfig
from npu_fusion.hosts import _torchair_api
from npu_fusion.hosts._ascend_pass import make_pass
from npu_fusion.hosts._vllm_operators import as_torch_npu
from npu_fusion.hosts._vllm_pass import module, pass_class
from npu_fusion.report import FusionReport

PASS_KEY = "graph_fusion_manager"
"""Key in ``CompilationConfig.inductor_compile_config`` under which vllm-ascend takes a pass of the user's."""


def fusion_pass(
    vllm_config: Any = None, fusion_config: FusionConfig | Mapping[str, Any] | None = None
) -> Any:
    """The pipeline as a ``VllmInductorPass``, for a model that is compiled PIECEWISE::

        passes = {npu_fusion.hosts.vllm_ascend.PASS_KEY: fusion_pass()}
        LLM(model, compilation_config={"inductor_compile_config": passes})

    Called with a ``fx.GraphModule``, as vllm-ascend does, or a ``fx.Graph``, and rewrites it in place. Its
    ``reports`` has one report per graph. It goes to other processes by pickling; there its reports are those
    of that process. ``vllm_config`` is what vLLM's own passes are made with, and is not needed.

    Raises ``ImportError`` without vllm-ascend.
    """
    return pass_class()(FusionConfig.make(fusion_config), vllm_config)


class Installation:
    """What :func:`install` has done to this process."""

    def __init__(self, added: Any, undo: list[Callable[[], None]]) -> None:
        self.added = added
        """The pass."""
        self._undo = undo

    @property
    def reports(self) -> list[FusionReport]:
        """One per graph compiled in this process since, in order."""
        return list(self.added.reports)

    def remove(self) -> None:
        """Put back what was there. A second call does nothing.

        Raises ``RuntimeError`` where someone else has replaced the same function afterwards.
        """
        global _installed
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        if _installed is self:
            _installed = None


_installed: Installation | None = None


def install(fusion_config: FusionConfig | Mapping[str, Any] | None = None) -> Installation:
    """Have vllm-ascend run the pipeline on every graph that this process compiles from now on.

    Installing again with an equal configuration changes nothing and returns the same object; another
    configuration takes the place of the first. To be called before vLLM builds the model.

    Raises ``ImportError`` without vllm-ascend, ``RuntimeError`` with a version that compiles in another way.
    """
    global _installed
    added = fusion_pass(None, fusion_config)
    if _installed is not None:
        if _installed.added.config == added.config:
            return _installed
        _installed.remove()
    compiler, manager = (
        module("compilation.compiler_interface"),
        module("compilation.graph_fusion_pass_manager"),
    )
    places = [
        (*_place(manager, "GraphFusionPassManager.configure"), _adding),
        (*_place(compiler, "_configure_backend"), _attaching),
        (*_place(compiler, "AscendCompiler.compute_hash"), _hashing),
    ]
    _installed = Installation(added, [_wrap(owner, name, wrapper, added) for owner, name, wrapper in places])
    return _installed


def _place(inside: Any, path: str) -> tuple[Any, str]:
    *owners, name = path.split(".")
    owner = functools.reduce(lambda value, part: getattr(value, part, None), owners, inside)
    if not callable(getattr(owner, name, None)):
        raise RuntimeError(
            f"the vllm-ascend at hand has no {inside.__name__}.{path}; accepted: a version that compiles as "
            "0.23.0 does (fusion_pass() needs no hook and may still work)"
        )
    return owner, name


def _wrap(owner: Any, name: str, wrapper: Callable[[Any, Any], Any], added: Any) -> Callable[[], None]:
    original = getattr(owner, name)
    ours = functools.wraps(original)(wrapper(original, added))
    setattr(owner, name, ours)

    def undo() -> None:
        if getattr(owner, name) is not ours:
            raise RuntimeError(f"{name} of vllm-ascend was replaced after npu_fusion had wrapped it")
        setattr(owner, name, original)

    return undo


def _adding(original: Any, added: Any) -> Any:
    def configure(manager: Any, config: Any) -> None:
        original(manager, config)
        by_hand = config.compilation_config.inductor_compile_config.get(PASS_KEY)
        if not isinstance(by_hand, pass_class()):  # else vLLM adds that one
            manager.add(added)

    return configure


def _attaching(original: Any, added: Any) -> Any:
    def configure_backend(config: Any, *args: Any, **kwargs: Any) -> None:
        original(config, *args, **kwargs)
        package = _torchair_api.package_of(config)
        if package is None:
            raise TypeError(
                f"vllm-ascend configures a {type(config).__name__}; accepted: CompilerConfig of npugraph_ex "
                "or torchair"
            )
        earlier = _torchair_api.given_pass(config)
        pipeline = make_pass(added.config, package, added.record, earlier, added.next_name)

        def npu_fusion_pass(gm: fx.GraphModule, example_inputs: Any, compiler_config: Any) -> None:
            with as_torch_npu(gm.graph, added.config.level):
                pipeline(gm, example_inputs, compiler_config)
            gm.recompile()

        setattr(config, _torchair_api.PASS, npu_fusion_pass)

    return configure_backend


def _hashing(original: Any, added: Any) -> Any:
    def compute_hash(compiler: Any, vllm_config: Any) -> str:
        factors = f"{original(compiler, vllm_config)} {added.uuid()}"
        return hashlib.sha256(factors.encode(), usedforsecurity=False).hexdigest()[:10]

    return compute_hash
