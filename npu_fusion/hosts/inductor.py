"""Host ``inductor``: the pipeline is a pass of Inductor, which compiles what is around the fused operators.

The pass sees Inductor's decomposed graph before its own post-grad passes. Its ``uuid`` is made of the package
version and the config, so Inductor's graph cache never mixes graphs of different configurations. A second
pass, after Inductor's own (which are for functional graphs), lets operators write into their caches. Passes
that the user has set run first.

When Inductor takes a whole graph out of its cache no pass runs and there would be no report. The report is
therefore stored beside Inductor's cache and read back; if it is not there, the graph is compiled afresh.
"""

from __future__ import annotations

import abc
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from npu_fusion import _compat
from npu_fusion.config import FusionConfig
from npu_fusion.hosts._in_place import write_in_place
from npu_fusion.hosts._run import optimize
from npu_fusion.passes import pipeline
from npu_fusion.report import FusionReport

PASS, LAST_PASS = "post_grad_custom_pre_pass", "post_grad_custom_post_pass"


class _Pass(_compat.inference_aware_pass_base()):  # type: ignore[misc]
    """A pass as Inductor wants it; ``before`` are those that the user has set."""

    def __init__(self, config: FusionConfig, inference: bool, before: Any = None) -> None:
        self.config = config
        self.inference = inference
        self.before = _as_list(before)

    def __call__(self, graph: fx.Graph, is_inference: bool | None = None) -> None:
        for earlier in self.before:
            _call_pass(earlier, graph, is_inference)
        self.run(graph, self.inference if is_inference is None else is_inference)

    @abc.abstractmethod
    def run(self, graph: fx.Graph, inference: bool) -> None:
        """The pass itself, in place."""

    def uuid(self) -> Any:
        earlier = [p.uuid() if hasattr(p, "uuid") else None for p in self.before]
        if any(u is None for u in earlier):
            return None  # Inductor then does not cache, as it does for such a pass alone
        return (
            "npu_fusion",
            type(self).__name__,
            self.config.cache_key(),
            self.inference,
            *map(str, earlier),
        )


class FusionPass(_Pass):
    """The pipeline."""

    def __init__(
        self,
        config: FusionConfig,
        name: str,
        record: Callable[[FusionReport], None],
        inference: bool,
        before: Any = None,
    ) -> None:
        super().__init__(config, inference, before)
        self.name = name
        self.record = record
        self.fused = False

    def run(self, graph: fx.Graph, inference: bool) -> None:
        report = optimize(
            graph, self.config, name=self.name, host="inductor", inference=inference, decomposed=True
        )
        self.fused = bool(report.fusions) and not self.config.dry_run
        self.record(report)


class InPlacePass(_Pass):
    """Caches are written in place, in a graph that ``fusion`` has changed."""

    def __init__(self, fusion: FusionPass, before: Any = None) -> None:
        super().__init__(fusion.config, fusion.inference, before)
        self.fusion = fusion

    def run(self, graph: fx.Graph, inference: bool) -> None:
        if self.fusion.fused:
            write_in_place(graph)


def _as_list(passes: Any) -> list[Any]:
    if passes is None:
        return []
    return list(passes) if isinstance(passes, (list, tuple)) else [passes]


def _call_pass(graph_pass: Any, graph: fx.Graph, is_inference: bool | None) -> None:
    """Call another pass as Inductor would."""
    if is_inference is not None and isinstance(graph_pass, _compat.inference_aware_pass_base()):
        graph_pass(graph, is_inference)
    else:
        graph_pass(graph)


def compile_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    config: FusionConfig,
    name: str,
    record: Callable[[FusionReport], None],
    patches: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile with Inductor, the pipeline inside."""
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx

    given = dict(patches or {})
    reports: list[FusionReport] = []

    def collect(report: FusionReport) -> None:
        reports.append(report)
        record(report)

    inference = not _compat.may_need_grad(gm, inputs)
    before, before_last = (given.pop(key, getattr(inductor_config, key)) for key in (PASS, LAST_PASS))
    fusion = FusionPass(config, name, collect, inference, before)
    options = {**given, PASS: fusion, LAST_PASS: InPlacePass(fusion, before_last)}
    stored = _stored_report(gm, inputs, options)
    compiled: Any = compile_fx(gm, inputs, config_patches=options)
    if reports:
        _save(stored, reports[0])
        return compiled
    cached = _load(stored)
    if cached is None:
        with _compat.without_compile_caches():
            compiled = compile_fx(gm, inputs, config_patches={**options, "fx_graph_cache": False})
    else:
        cached.graph, cached.from_cache = name, True
        record(cached)
        pipeline.check_expectation(cached, config)
    return compiled


def _stored_report(gm: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> Path:
    """Where the report of this very graph lies, by everything that the passes' result depends on."""
    described = [
        f"{tuple(x.shape)} {x.stride()} {x.dtype} {x.device} {x.requires_grad}"
        if isinstance(x, torch.Tensor)
        else repr(x)
        for x in inputs
    ]
    settings = {key: value for key, value in options.items() if key not in (PASS, LAST_PASS)}
    passes = (options[PASS].uuid(), options[LAST_PASS].uuid())
    context = (torch.__version__, torch.is_grad_enabled(), passes, sorted(settings.items()))
    key = hashlib.sha256("\0".join([repr(context), gm.code, *described]).encode()).hexdigest()
    return _compat.inductor_cache_dir() / "npu_fusion" / f"{key}.json"


def _save(path: Path, report: FusionReport) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(report.to_json())
    scratch.replace(path)  # whole or not at all: other processes read it


def _load(path: Path) -> FusionReport | None:
    return FusionReport.from_dict(json.loads(path.read_text())) if path.exists() else None
