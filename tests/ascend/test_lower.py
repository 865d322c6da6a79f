"""``npu-fusion lower``: a model becomes a GE graph in a child process; errors come with the user's line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npu_fusion import cli
from npu_fusion.hosts import offline

MODELS = Path(__file__).with_name("_models.py")


def line_of(text: str) -> int:
    return next(n for n, line in enumerate(MODELS.read_text().splitlines(), 1) if text in line)


def test_a_model_of_two_graphs(tmp_path: Path) -> None:
    config = {"numerics": "accurate", "expect": {"npu_swiglu": 1}}
    lowering = offline.lower(f"{MODELS}:gated", tmp_path, dynamic=True, fusion_config=config)
    assert [graph.folder.name for graph in lowering.graphs] == ["graph_0_0", "graph_1_0"]
    assert lowering.report.fused == {"npu_swiglu": 1}
    first, second = lowering.graphs
    assert first.operators["SwiGlu"] == 1
    assert "SwiGlu" not in second.operators
    assert lowering.operators["SwiGlu"] == 1
    assert (lowering.soc, lowering.torch_npu[:2]) == ("Ascend910B1", "2.")
    assert 0 < lowering.difference < 0.05 * lowering.largest
    names = {path.name for path in first.folder.iterdir()}
    assert names >= {"0_before.py", "final.py", "ge.pbtxt", "report.json", "report.html"}
    assert "npu.npu_swiglu.default" in (first.folder / "final.py").read_text()
    assert "dim: -1" in (first.folder / "ge.pbtxt").read_text()  # dynamic sizes stay so


def test_a_second_run_takes_the_place_of_the_first_and_expectations_decide_the_status(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lowering.json").write_text("{}")
    (tmp_path / "graph_7_0").mkdir()
    (tmp_path / "graph_7_0" / "report.json").touch()
    command = ["lower", f"{MODELS}:gated", "--out", str(tmp_path), "--mode", "npugraph_ex", "--static"]
    assert cli.main([*command, "--target", "ascend950", "--expect", "npu_swiglu=2"]) == 1
    captured = capfd.readouterr()
    assert "npu_swiglu: 1 instead of 2" in captured.err
    assert "npu_swiglu" in captured.out  # the report is shown all the same
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph_0_0", "graph_1_0", "lowering.json"]
    answer = json.loads((tmp_path / "lowering.json").read_text())
    assert answer["soc"] == "Ascend950PR_9599"
    assert [graph["operators"] for graph in answer["graphs"]] == [{}, {}]  # there is no GE graph
    assert (tmp_path / "graph_0_0" / "final.py").is_file()


def test_the_report_is_printed_with_the_operators_of_the_ge_graph(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["lower", f"{MODELS}:gated", "--out", str(tmp_path), "--numerics", "strict"]) == 0
    printed = capfd.readouterr().out
    assert "operators of the GE graph" in printed
    assert "  Swish\n" in printed
    assert "largest difference from eager on the CPU: 0 (" in printed


def test_what_torchair_cannot_convert_is_named_with_the_users_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["lower", f"{MODELS}:eigenvalues", "--out", str(tmp_path)]) == 1
    operator = "torch.ops.aten._linalg_eigh.default"
    assert capfd.readouterr().err.strip().splitlines() == [
        f"npu-fusion: NotImplementedError: {operator} ge_converter is not implemented!",
        f"  at %_linalg_eigh = {operator}",
        f"  from {MODELS}:{line_of('torch.linalg.eigvalsh')}",
    ]


def test_a_model_that_fails_in_eager_is_not_torchairs_fault(tmp_path: Path) -> None:
    with pytest.raises(offline.LoweringError, match="the model itself fails, in eager: RuntimeError: mat1"):
        offline.lower(f"{MODELS}:wrong", tmp_path)


def test_a_process_that_dies_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(offline.LoweringError, match="imports torch_npu ended with signal 6; its last words"):
        offline.lower(f"{MODELS}:dies", tmp_path)


def test_a_factory_that_is_not_there_is_bad_input(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lower", f"{MODELS}:absent", "--out", str(tmp_path)]) == 2
    assert capfd.readouterr().err == "npu-fusion: error: '_models' has no function 'absent'\n"
