"""TORCH_LOGS and TORCH_TRACE, in processes of their own: PyTorch reads both when it is imported."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from npu_fusion import _trace
from tests.sample_report import sample

ROOT = Path(__file__).parents[1]
SHOW = "from npu_fusion import _trace; from npu_fusion.report import FusionReport, Refusal\n"
SHOW += "report = FusionReport(graph='g7', refused=[Refusal('swiglu', 'halves overlap')])\n"
SHOW += "report.stages = [('before', 'code before'), ('after', 'code after')]\n"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TORCH_LOGS", "TORCH_TRACE"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**inherited, **environment},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("first", ["import torch", "import npu_fusion"])
def test_torch_logs_plus_shows_the_whole_report(first: str) -> None:
    done = run(f"{first}\n{SHOW}_trace.log_report(report)", TORCH_LOGS="+npu_fusion")
    assert "npu_fusion, g7: 0 fusions made, 1 near miss" in done.stderr
    assert "halves overlap" in done.stderr


def test_torch_logs_shows_one_line_per_graph() -> None:
    done = run(f"import torch\n{SHOW}_trace.log_report(report)", TORCH_LOGS="npu_fusion")
    assert done.stderr.count("npu_fusion, g7: 0 fusions made, 1 near miss") == 1
    assert "halves overlap" not in done.stderr


def test_silent_without_torch_logs() -> None:
    assert "g7" not in run(f"{SHOW}_trace.log_report(report)").stderr


def test_levels_of_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    report = sample()
    with caplog.at_level(logging.INFO, logger="npu_fusion"):
        _trace.log_report(report)
    with caplog.at_level(logging.DEBUG, logger="npu_fusion"):
        _trace.log_report(report)
    first, second = (record for record in caplog.records if record.name == "npu_fusion")
    assert first.getMessage() == report.text().splitlines()[0]
    assert second.getMessage() == report.text()


def artifacts(directory: Path) -> dict[str, str]:
    """Name -> payload of the artifacts in the trace logs that PyTorch has written to ``directory``."""
    found: dict[str, str] = {}
    for path in directory.glob("*.log"):
        name = ""
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("\t"):
                found[name] = f"{found[name]}\n{line[1:]}" if found.get(name) else line[1:]
            else:
                name = json.loads(line[line.index("{") :]).get("artifact", {}).get("name", "")
    return found


def test_torch_trace_gets_report_and_graphs(tmp_path: Path) -> None:
    done = run(f"{SHOW}print(_trace.tracing())\n_trace.emit_artifact(report)", TORCH_TRACE=str(tmp_path))
    assert done.stdout.strip() == "True"
    found = artifacts(tmp_path)
    assert json.loads(found["npu_fusion_report"])["refused"][0]["reason"] == "halves overlap"
    assert found["npu_fusion_graph_before"] == "code before"
    assert found["npu_fusion_graph_after"] == "code after"


def test_torch_trace_without_kept_code_has_the_report_alone(tmp_path: Path) -> None:
    run(f"{SHOW}report.stages = []\n_trace.emit_artifact(report)", TORCH_TRACE=str(tmp_path))
    assert {name for name in artifacts(tmp_path) if name.startswith("npu_fusion")} == {"npu_fusion_report"}


def test_without_a_trace_nothing_is_computed() -> None:
    code = f"{SHOW}_trace.emit_artifact(report)\n"
    # PyTorch's lazy handler leaves at the first event; from then on nobody listens.
    code += "assert not _trace.tracing()\n"
    code += "FusionReport.to_json = lambda self: 1 / 0\n_trace.emit_artifact(report)"
    run(code)
