"""The files of a dump."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from npu_fusion import dump
from npu_fusion.report import FusionReport
from tests.sample_report import sample


def test_files_of_a_graph(tmp_path: Path) -> None:
    report = sample(2, name="llama_0")
    folder = dump.write(report, tmp_path / "made" / "here")
    assert folder == tmp_path / "made" / "here" / "llama_0"
    assert report.dump_dir == str(folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["0_before.py", "1_compose.py", "2_after.py", "report.html", "report.json"]
    assert (folder / "0_before.py").read_text(encoding="utf-8") == report.stages[0][1]
    assert (folder / "2_after.py").read_text(encoding="utf-8") == report.stages[-1][1]
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert content["dump_dir"] == str(folder)
    assert content["fused"] == {"npu_dequant_swiglu_quant": 1}
    assert "llama_0" in (folder / "report.html").read_text(encoding="utf-8")


def test_another_graph_of_the_same_name_keeps_its_folder(tmp_path: Path) -> None:
    folders = [dump.write(FusionReport(host=str(index)), tmp_path) for index in range(3)]
    assert [folder.name for folder in folders] == ["graph", "graph_1", "graph_2"]
    hosts = [json.loads((folder / "report.json").read_text(encoding="utf-8"))["host"] for folder in folders]
    assert hosts == ["0", "1", "2"]


def test_names_cannot_leave_the_directory(tmp_path: Path) -> None:
    report = FusionReport(graph="../../a/b:c", stages=[("before", "x"), ("../lift <1>", "y")])
    folder = dump.write(report, tmp_path)
    assert folder.parent == tmp_path
    assert sorted(path.name for path in folder.glob("*.py")) == ["0_before.py", "1_lift_1.py"]
    assert dump.write(FusionReport(graph=".."), tmp_path) == tmp_path / "graph"


def test_ten_stages_sort_by_name(tmp_path: Path) -> None:
    folder = dump.write(FusionReport(stages=[(f"s{index}", "") for index in range(11)]), tmp_path)
    names = sorted(path.name for path in folder.glob("*.py"))
    assert names == [f"{index:02}_s{index}.py" for index in range(11)]


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = FusionReport()
    with pytest.raises(OSError, match=r"dump_dir is .*file/below.*accepted: a directory"):
        dump.write(report, tmp_path / "file" / "below")
    assert report.dump_dir is None


def test_debug_directory_follows_torch_compile_debug(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._dynamo import config as dynamo_config
    from torch._dynamo.utils import get_debug_dir
    from torch._inductor import config as inductor_config

    monkeypatch.delenv("TORCH_COMPILE_DEBUG", raising=False)
    assert dump.debug_directory() is None
    monkeypatch.setenv("TORCH_COMPILE_DEBUG", "0")
    assert dump.debug_directory() is None
    monkeypatch.setenv("TORCH_COMPILE_DEBUG", "1")
    with dynamo_config.patch(debug_dir_root=str(tmp_path / "torch_compile_debug")):
        found = dump.debug_directory()
        assert found == Path(get_debug_dir()) / "npu_fusion"
        assert found.parent.parent == tmp_path / "torch_compile_debug"
        assert found.parent.name.startswith("run_")
        assert str(os.getpid()) in found.parent.name
        with inductor_config.patch({"trace.debug_dir": str(tmp_path / "mine")}):
            assert dump.debug_directory() == tmp_path / "mine" / "npu_fusion"
