"""The torch.compile backend: which compiler takes the graph, with which fusions, and what came of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from npu_fusion import _compat
from npu_fusion._recorded import RECORDED
from npu_fusion.config import FusionConfig
from npu_fusion.hosts import _torchair_api, eager, inductor, npugraph_ex, torchair
from npu_fusion.meta_impls._calls import exactly
from npu_fusion.report import FusionReport

HOSTS = ("auto", "torchair", "npugraph_ex", "inductor", "eager")


_COMPILERS: dict[str, Callable[..., Callable[..., Any]]] = {
    "torchair": torchair.compile_graph,
    "npugraph_ex": npugraph_ex.compile_graph,
    "inductor": inductor.compile_graph,
    "eager": eager.compile_graph,
}


class NpuBackend:
    """A backend for ``torch.compile(model, backend=...)``; made by :func:`get_npu_backend`.

    ``reports``: one :class:`npu_fusion.FusionReport` per compiled graph, in the order of compilation.
    """

    def __init__(self, config: FusionConfig, host: str, compiler_config: Any) -> None:
        self.config = config
        self.host = host
        self.compiler_config = compiler_config
        self.reports: list[FusionReport] = []
        self.record: Callable[[FusionReport], None] = self.reports.append
        self.__name__ = "npu_fusion"  # what torch.compile shows for a backend

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **unknown: Any) -> Callable[..., Any]:
        if unknown:
            raise TypeError(
                f"torch.compile passed {', '.join(sorted(unknown))} to a backend made by get_npu_backend(); "
                "accepted: none (configure with get_npu_backend(fusion_config=...) or backend='npu_fusion')"
            )
        _compat.specialize_floats(gm)
        name = _compat.compile_name() or f"graph_{len(self.reports)}"
        compile_graph = _COMPILERS[self.host]
        compiled = compile_graph(gm, inputs, self.config, name, self.record, self.compiler_config)
        # Bit-identical is what the reference kernels are: others may sum in another order.
        return exactly(compiled) if self.config.numerics == "strict" else compiled

    def reset(self) -> None:
        """Called by ``torch._dynamo.reset()``: forget the reports."""
        self.reports.clear()


def get_npu_backend(
    compiler_config: Any = None,
    fusion_config: FusionConfig | Mapping[str, Any] | None = None,
    host: str = "auto",
) -> NpuBackend:
    """A torch.compile backend that fuses, then hands the graph to ``host``.

    ``host``:

    * ``"torchair"``: lowered to GE, or captured as an ACL graph, as ``torchair.CompilerConfig`` says;
    * ``"npugraph_ex"``: captured as an ACL graph by npugraph_ex;
    * ``"inductor"``: compiled by Inductor (CPU, CUDA);
    * ``"eager"``: run operator by operator;
    * ``"auto"``: the host whose configuration is given; torchair where torch_npu has a device, or was
      loaded offline to lower graphs; otherwise Inductor, or eager with a warning where Inductor has no C++
      compiler.

    ``compiler_config``: configuration of the host's own compiler: ``torchair.CompilerConfig``,
    ``npugraph_ex.CompilerConfig`` or a dict of its options, for ``inductor`` a dict of its config options. It
    is not changed; a ``post_grad_custom_pre_pass`` in it runs before the fusions.
    ``fusion_config``: a :class:`npu_fusion.FusionConfig` or a dict of its fields; ``NPU_FUSION_*``
    environment variables override it.

    Raises ``ValueError`` or ``TypeError`` naming the argument, and ``ImportError`` where the host is not
    installed, before anything is compiled.
    """
    if host not in HOSTS:
        raise ValueError(f"host is {host!r}; accepted: {', '.join(map(repr, HOSTS))}")
    config = FusionConfig.make(fusion_config)
    resolved = _automatic(compiler_config) if host == "auto" else host
    _check_compiler_config(compiler_config, resolved)
    if resolved in ("torchair", "npugraph_ex"):
        _torchair_api.load(resolved)
    if resolved == "npugraph_ex":
        npugraph_ex.settings_of(compiler_config)  # refuses what it does not know
    return NpuBackend(config, resolved, compiler_config)


def _automatic(compiler_config: Any) -> str:
    package = _torchair_api.package_of(compiler_config)
    if package is not None:
        return package
    if _torchair_api.offline() or _compat.has_npu():
        return "torchair"
    missing = None if torch.cuda.is_available() else _compat.why_no_inductor()
    if missing is None:
        return "inductor"
    warnings.warn(
        f"npu_fusion runs the fused graph eagerly: Inductor cannot be used because {missing}. "
        "host='eager' says so without this warning.",
        RuntimeWarning,
        stacklevel=3,
    )
    return "eager"


def _check_compiler_config(given: Any, host: str) -> None:
    """Refuse a configuration that is not one of the host's."""
    if given is None:
        return
    accepted = {
        "torchair": "a torchair.CompilerConfig, or None",
        "npugraph_ex": "an npugraph_ex.CompilerConfig, a dict of its options, or None",
        "inductor": "a dict of torch._inductor.config options, or None",
        "eager": "None (there is no compiler)",
    }[host]
    package = _torchair_api.package_of(given)
    good = {
        "torchair": package == "torchair",
        "npugraph_ex": package == "npugraph_ex" or isinstance(given, Mapping),
        "inductor": isinstance(given, Mapping),
        "eager": False,
    }[host]
    if not good:
        kind = ValueError if host == "eager" else TypeError
        raise kind(f"compiler_config is a {type(given).__name__} with host={host!r}; accepted: {accepted}")
    if host == "inductor":
        known = torch._inductor.list_options()
        for name in given:
            if name not in known:
                raise ValueError(
                    f"compiler_config has no key {name!r}; accepted: see torch._inductor.list_options()"
                )


def npu_fusion_backend(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The registered backend: ``torch.compile(model, backend="npu_fusion", options={...})``.

    ``options``: fields of :class:`npu_fusion.FusionConfig`, and ``host`` / ``compiler_config`` of
    :func:`get_npu_backend`. The reports are in :func:`npu_fusion.reports`.
    """
    if mode not in (None, "default"):
        raise ValueError(f"mode is {mode!r}; accepted by backend='npu_fusion': 'default'")
    fields = dict(options or {})
    backend = get_npu_backend(fields.pop("compiler_config", None), fields, fields.pop("host", "auto"))
    backend.record = RECORDED.append
    return backend(gm, inputs)
