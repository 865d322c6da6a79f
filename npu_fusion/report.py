"""What the pipeline did to one graph, and what it did not do and why: data, text and JSON.

The text is drawn by :mod:`npu_fusion._report_text`, the HTML page by :mod:`npu_fusion.report_html`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from npu_fusion import _report_text


@dataclass(frozen=True)
class Fused:
    """One rewrite that was made (or, in a dry run, would have been)."""

    fusion: str
    """Name of the fusion, which is also its flag in FusionConfig: ``dequant_swiglu_quant``."""
    operator: str
    """The operator emitted: ``npu_dequant_swiglu_quant``."""
    level: str
    """Numerics level that the rewrite needs: strict, accurate or relaxed."""
    notes: tuple[str, ...] = ()
    """In what way the result may differ from the source expression."""
    nodes: tuple[str, ...] = ()
    """Names of the FX nodes that were replaced, in graph order."""
    emitted: tuple[str, ...] = ()
    """Names of the FX nodes that took their place, in graph order (empty in a dry run)."""
    source: str | None = None
    """``file:line`` of the user's code that the replaced result came from."""


@dataclass(frozen=True)
class Refusal:
    """One near miss: what looked like a fusion and why it is none."""

    fusion: str
    reason: str
    """The rule that failed, in words; the same text for every instance of the same cause."""
    detail: str = ""
    """The values of this instance."""
    nodes: tuple[str, ...] = ()
    source: str | None = None


@dataclass
class FusionReport:
    """The account of one compiled graph.

    ``fused``: operator name -> count, e.g. ``{"npu_dequant_swiglu_quant": 61}``.
    ``refused``: list of :class:`Refusal`.
    ``fusions``: list of :class:`Fused`, in graph order.
    ``timing``: stage -> seconds. ``operators_before`` / ``operators_after``: operator -> count.
    ``stages``: (stage, readable FX code) pairs, kept only when ``dump_dir`` or TORCH_COMPILE_DEBUG asks.
    """

    graph: str = "graph"
    host: str = ""
    dry_run: bool = False
    from_cache: bool = False
    fusions: list[Fused] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Passes that raised and were undone (strict mode raises instead)."""
    began: float = 0.0
    """When the pipeline began, on the clock of ``time.perf_counter``."""
    timing: dict[str, float] = field(default_factory=dict)
    operators_before: dict[str, int] = field(default_factory=dict)
    operators_after: dict[str, int] = field(default_factory=dict)
    stages: list[tuple[str, str]] = field(default_factory=list)
    dump_dir: str | None = None

    @property
    def fused(self) -> dict[str, int]:
        return dict(Counter(f.operator for f in self.fusions))

    @property
    def seconds(self) -> float:
        """Time of the whole pipeline."""
        return sum(self.timing.values())

    def refusals(self, fusion: str | None = None) -> dict[tuple[str, str], list[Refusal]]:
        """Refusals grouped by (fusion, reason), most frequent first."""
        groups: dict[tuple[str, str], list[Refusal]] = {}
        for refusal in self.refused:
            if fusion is None or refusal.fusion == fusion:
                groups.setdefault((refusal.fusion, refusal.reason), []).append(refusal)
        return dict(sorted(groups.items(), key=lambda item: -len(item[1])))

    def text(self, width: int = 110) -> str:
        """Readable plain text in lines of at most ``width`` characters (60 or more, else ValueError)."""
        return _report_text.text(self, width)

    def print(self, console: Any = None) -> None:
        """Tables on ``console`` (a ``rich.console.Console``; None: standard output); text without rich."""
        _report_text.print_report(self, console)

    def __str__(self) -> str:
        return self.text()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the code of the stages, as JSON types."""
        content = asdict(self)
        content.pop("stages")
        content["fused"] = self.fused
        content["seconds"] = self.seconds
        return content

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> FusionReport:
        """The inverse of :meth:`to_dict`."""
        data = {k: v for k, v in content.items() if k not in ("fused", "seconds")}
        data["fusions"] = [Fused(**_with_tuples(entry)) for entry in data["fusions"]]
        data["refused"] = [Refusal(**_with_tuples(entry)) for entry in data["refused"]]
        return cls(**data)


def merged(reports: Sequence[FusionReport]) -> FusionReport:
    """One account of several graphs (a model with graph breaks): everything added up, in order."""
    if len(reports) == 1:
        return reports[0]
    total = FusionReport(
        graph=f"{len(reports)} graphs",
        host=reports[0].host if reports else "",
        dry_run=any(r.dry_run for r in reports),
    )
    for report in reports:
        total.fusions.extend(report.fusions)
        total.refused.extend(report.refused)
        total.failures.extend(report.failures)
        for mine, theirs in (
            (total.timing, report.timing),
            (total.operators_before, report.operators_before),
            (total.operators_after, report.operators_after),
        ):
            for key, value in theirs.items():
                mine[key] = mine.get(key, 0) + value  # type: ignore[assignment]
    return total


def _with_tuples(entry: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples: give them back to the frozen records."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
