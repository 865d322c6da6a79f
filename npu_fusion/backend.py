"""The torch.compile backend: which compiler takes the graph, with which fusions, and what came of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from npu_fusion import _compat
from npu_fusion.config import FusionConfig
from npu_fusion.hosts import eager, inductor
from npu_fusion.report import FusionReport

HOSTS = ("auto", "inductor", "eager")


class NpuBackend:
    """A backend for ``torch.compile(model, backend=...)``; made by :func:`get_npu_backend`.

    ``reports``: one :class:`npu_fusion.FusionReport` per compiled graph, in the order of compilation.
    """

    def __init__(self, config: FusionConfig, host: str, compiler_config: Mapping[str, Any]) -> None:
        self.config = config
        self.host = host
        self.compiler_config = dict(compiler_config)
        self.reports: list[FusionReport] = []
        self.__name__ = "npu_fusion"  # what torch.compile shows for a backend

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **unknown: Any) -> Callable[..., Any]:
        if unknown:
            raise TypeError(
                f"torch.compile passed {', '.join(sorted(unknown))} to a backend made by get_npu_backend(); "
                "accepted: none (configure with get_npu_backend(fusion_config=...) or backend='npu_fusion')"
            )
        _compat.specialize_floats(gm)
        name = _compat.compile_name() or f"graph_{len(self.reports)}"
        if self.host == "eager":
            return eager.compile_graph(gm, inputs, self.config, name, self.reports.append)
        return inductor.compile_graph(
            gm, inputs, self.config, name, self.reports.append, self.compiler_config
        )

    def reset(self) -> None:
        """Called by ``torch._dynamo.reset()``: forget the reports."""
        self.reports.clear()


def get_npu_backend(
    compiler_config: Mapping[str, Any] | None = None,
    fusion_config: FusionConfig | Mapping[str, Any] | None = None,
    host: str = "auto",
) -> NpuBackend:
    """A torch.compile backend that fuses, then hands the graph to ``host``.

    ``compiler_config``: options of the host's own compiler; for ``inductor`` a dict of its config options.
    ``fusion_config``: a :class:`npu_fusion.FusionConfig` or a dict of its fields; ``NPU_FUSION_*``
    environment variables override it. ``host``: ``"inductor"`` compiles the rest of the graph, ``"eager"``
    runs it operator by operator, ``"auto"`` is Inductor, or eager with a warning where Inductor has no C++
    compiler to use.

    Raises ``ValueError`` or ``TypeError`` naming the argument before anything is compiled.
    """
    if host not in HOSTS:
        raise ValueError(f"host is {host!r}; accepted: {', '.join(map(repr, HOSTS))}")
    resolved = _automatic() if host == "auto" else host
    if compiler_config is not None:
        if resolved == "eager":
            raise ValueError("compiler_config is given, but host='eager' has no compiler; accepted: None")
        _check_inductor_options(compiler_config)
    return NpuBackend(FusionConfig.make(fusion_config), resolved, compiler_config or {})


def _automatic() -> str:
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


def _check_inductor_options(options: Any) -> None:
    if not isinstance(options, Mapping):
        raise TypeError(
            f"compiler_config is a {type(options).__name__}; accepted for host='inductor': "
            "a dict of torch._inductor.config options, or None"
        )
    known = torch._inductor.list_options()
    for name in options:
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
    backend.reports = _registered_reports
    return backend(gm, inputs)


def _reset_registered() -> None:
    _registered_reports.clear()


_registered_reports: list[FusionReport] = []
npu_fusion_backend.reset = _reset_registered  # type: ignore[attr-defined]  # torch._dynamo.reset() calls it


def reports() -> list[FusionReport]:
    """Reports of what was compiled with ``backend="npu_fusion"`` by name, in order, since the last reset."""
    return list(_registered_reports)
