"""Reports of graphs that no backend object of the user's collects."""

from __future__ import annotations

from npu_fusion import _compat
from npu_fusion.report import FusionReport


class _Recorded:
    def __init__(self) -> None:
        self.reports: list[FusionReport] = []

    def append(self, report: FusionReport) -> None:
        self.reports.append(report)
        _compat.at_dynamo_reset(self)

    def reset(self) -> None:
        """Called by ``torch._dynamo.reset()``."""
        self.reports.clear()


RECORDED = _Recorded()


def reports() -> list[FusionReport]:
    """Reports of what was compiled with ``backend="npu_fusion"`` by name, with a configuration that
    :func:`npu_fusion.enable` or :func:`npu_fusion.npugraph_ex_options` made, or inside vLLM-Ascend: in order,
    since the last ``torch._dynamo.reset()``."""
    return list(RECORDED.reports)
