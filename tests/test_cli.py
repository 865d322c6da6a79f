"""The npu-fusion command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from npu_fusion.cli import main

FACTORY = "tests.models.w8a8:make_merged"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")  # tables without line breaks
    torch._dynamo.reset()


def test_explain_shows_fusions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", FACTORY]) == 0
    output = capsys.readouterr().out
    assert "npu_dequant_swiglu_quant" in output


def test_explain_shows_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "tests.models.w8a8:make_separate", "--dynamic"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "two separate matmuls" in output
    assert "w8a8.py" in output


def test_explain_takes_a_file_and_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parent / "models" / "w8a8.py"
    assert main(["explain", f"{path}:make_merged", "--json", "--static"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["fused"]["npu_dequant_swiglu_quant"] == 1
    assert content["dry_run"] is True


def test_expectations_decide_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", FACTORY, "--expect", "npu_dequant_swiglu_quant=1"]) == 0
    assert main(["explain", FACTORY, "--expect", "npu_dequant_swiglu_quant=3"]) == 1
    captured = capsys.readouterr()
    assert "1 instead of 3" in captured.err
    assert "npu_dequant_swiglu_quant" in captured.out  # the report is shown all the same


def test_target_and_numerics_are_applied(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", FACTORY, "--json", "--target", "ascend910b"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["fused"]["npu_dequant_swiglu_quant"] == 1
    assert "npu_dynamic_quant" not in content["fused"]  # float32 input, which the hardware does not take
    assert main(["explain", FACTORY, "--json", "--numerics", "strict"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert "npu_dequant_swiglu_quant" not in content["fused"]  # the guard for zero rows would go


def test_a_dump_is_written(tmp_path: Path) -> None:
    assert main(["explain", FACTORY, "--dump", str(tmp_path)]) == 0
    assert list(tmp_path.glob("*/report.html"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "no_such_module:make"], "cannot import 'no_such_module'"),
        (["explain", "tests.models.w8a8:nope"], "has no function 'nope'"),
        (["explain", "tests.models.w8a8"], "MODULE:FACTORY is 'tests.models.w8a8'"),
        (["explain", "nowhere.py:make"], "there is no file 'nowhere.py'"),
        (["explain", "tests.models.w8a8:merged"], r"accepted: (model, args) or (model, args, kwargs)"),
        (["explain", FACTORY, "--expect", "three"], "--expect is 'three'; accepted: OPERATOR=COUNT"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("npu-fusion: error: ")
    assert error.count("\n") == 1
