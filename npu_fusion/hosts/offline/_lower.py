"""``lower``: what a model becomes on Ascend, found out in a child process that has the real torch_npu.

::

    lower("model.py:make", "out")  ──▶  child: eager, then torch.compile with torchair  ──▶  out/
                                                                                              lowering.json
    out/graph_0_0/   0_before.py ... final.py   report.json   report.html   ge.pbtxt

``final.py`` is the FX graph after torchair's own passes, which is what it converts; ``ge.pbtxt`` the GE graph
(mode ``max-autotune`` only). The names depend on the model alone, so two runs can be compared with ``diff``.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_fusion.config import FusionConfig
from npu_fusion.hosts.offline._environment import environment
from npu_fusion.hosts.offline._errors import OfflineError
from npu_fusion.passes.pipeline import check_expectation
from npu_fusion.report import FusionReport, merged

MODES = ("max-autotune", "npugraph_ex", "reduce-overhead")
RESULT = "lowering.json"
_CHILD = """\
import contextlib, io, warnings
with contextlib.redirect_stdout(io.StringIO()):
    import torch_npu
warnings.filterwarnings("ignore", module="torch_npu|torchair|npugraph_ex")
from npu_fusion.hosts.offline import _child
_child.main()
"""
"""torch_npu comes before npu_fusion, which then defines only what torch_npu does not; it prints that there is
no CANN."""


class LoweringError(OfflineError):
    """The model does not lower, or to another result; the message is torchair's, with the source line."""


@dataclass(frozen=True)
class LoweredGraph:
    """One compiled graph of the model."""

    folder: Path
    report: FusionReport
    operators: dict[str, int]
    """GE operator -> count; empty where the mode makes no GE graph."""


@dataclass(frozen=True)
class Lowering:
    """What :func:`lower` found."""

    graphs: tuple[LoweredGraph, ...]
    torch_npu: str
    soc: str
    difference: float
    """Largest difference of a value from eager's, in outputs and in inputs that the model changes."""
    largest: float
    """Largest of the values compared."""

    @property
    def report(self) -> FusionReport:
        """One account of all graphs."""
        return merged([graph.report for graph in self.graphs])

    @property
    def operators(self) -> dict[str, int]:
        """GE operator -> count over all graphs, most frequent first."""
        total = sum((Counter(graph.operators) for graph in self.graphs), Counter[str]())
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def lower(
    factory: str,
    out: str | Path,
    *,
    mode: str = "max-autotune",
    dynamic: bool | None = None,
    fusion_config: FusionConfig | Mapping[str, Any] | None = None,
    soc: str | None = None,
    cann: str | None = None,
) -> Lowering:
    """Compile a model for Ascend, without an NPU, and write what it became to ``out``.

    ``factory``: ``"module:function"`` or ``"file.py:function"``; the function returns ``(model, args)`` or
    ``(model, args, kwargs)``, with CPU tensors. ``mode``: torchair's ``"max-autotune"`` (GE) or
    ``"reduce-overhead"``, or ``"npugraph_ex"``. ``dynamic``: as in ``torch.compile``. ``soc`` and ``cann``:
    as in :func:`npu_fusion.hosts.offline.environment`; ``soc`` is by default that of the config's target.
    The fused graph is run once, on the CPU, and compared with the model.

    Raises :class:`LoweringError` where the model fails, does not lower or gives other shapes,
    :class:`npu_fusion.FusionExpectationError` where ``expect``, summed over all graphs, is not met (after
    everything is written), ``ValueError`` for a bad argument, and :class:`OfflineError` where the
    environment cannot be used or ``out`` has files of something else.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; accepted: {', '.join(map(repr, MODES))}")
    config = FusionConfig.make(fusion_config)
    if soc is None and config.target is not None:
        soc = config.target.partition("-")[0]
    variables = environment(soc, cann)
    folder = Path(out).absolute()
    _clear(folder)
    request = {
        "factory": factory,
        "mode": mode,
        "dynamic": dynamic,
        "out": str(folder),
        # Counts are checked here, over all graphs.
        "config": dataclasses.asdict(config.replace(expect=None, dump_dir=str(folder))),
    }
    (folder / RESULT).write_text("{}", encoding="utf-8")  # marks the folder as ours before it fills
    child = subprocess.run([sys.executable, "-c", _CHILD, json.dumps(request)], env=variables)
    answer = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    if not answer:
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
        raise LoweringError(f"the process that imports torch_npu ended with {how}; its last words are above")
    if "error" in answer:
        raise (LoweringError if answer["lowering"] else OfflineError)(answer["error"])
    lowering = _read(folder, answer)
    check_expectation(lowering.report, config)
    return lowering


def _clear(folder: Path) -> None:
    """Make ``folder``, or remove from it what an earlier run has written."""
    if folder.exists() and not folder.is_dir():
        raise OfflineError(f"--out is {str(folder)!r}, a file; accepted: a directory, new or empty")
    folder.mkdir(parents=True, exist_ok=True)
    found = list(folder.iterdir())
    if found and not (folder / RESULT).is_file():
        raise OfflineError(
            f"--out is {str(folder)!r}, which has files of something else; "
            "accepted: a directory that is new, empty, or of an earlier run"
        )
    for path in found:
        if (path / "report.json").is_file():
            shutil.rmtree(path)


def _read(folder: Path, answer: Mapping[str, Any]) -> Lowering:
    graphs = []
    for graph in answer["graphs"]:
        path = folder / graph["folder"]
        report = FusionReport.from_dict(json.loads((path / "report.json").read_text(encoding="utf-8")))
        graphs.append(LoweredGraph(path, report, graph["operators"]))
    values = {name: answer[name] for name in ("torch_npu", "soc", "difference", "largest")}
    return Lowering(tuple(graphs), **values)
