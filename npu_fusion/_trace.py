"""How PyTorch users look into a compiler: ``TORCH_LOGS`` and the structured trace that tlparse reads.

``TORCH_LOGS="+npu_fusion"`` needs no registration: PyTorch takes any importable module's name and sets the
level and a handler on the logger of that name. ``npu_fusion`` shows one line per graph, ``+npu_fusion`` the
whole report.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch._logging import trace_structured
from torch._logging._internal import trace_log

from npu_fusion._report_text import summary
from npu_fusion.report import FusionReport

log = logging.getLogger("npu_fusion")


def log_report(report: FusionReport) -> None:
    """One line at level INFO, the whole report at level DEBUG."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s", report.text())
    else:
        log.info("%s", summary(report))


def tracing() -> bool:
    """Whether a structured trace is being written, so that the stages' code should be kept for it."""
    return bool(trace_log.handlers)


def emit_artifact(report: FusionReport) -> None:
    """Put the report into the structured trace, and the first and last stage if their code was kept.

    Artifacts ``npu_fusion_report`` (JSON), ``npu_fusion_graph_before`` and ``npu_fusion_graph_after``.
    Costs nothing where no trace is written.
    """
    _artifact("npu_fusion_report", "json", report.to_json)
    if report.stages:
        _artifact("npu_fusion_graph_before", "string", lambda: report.stages[0][1])
        _artifact("npu_fusion_graph_after", "string", lambda: report.stages[-1][1])


def _artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)
