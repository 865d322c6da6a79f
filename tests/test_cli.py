"""The npu-fusion command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import npu_fusion
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


def test_the_demo_without_its_packages_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # what importing a missing package looks like
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "transformers" in error
    assert "pip install npu-fusion[demo]" in error


def test_the_demo_of_latent_attention_needs_safetensors_and_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--model", "mla", "--bytes", "193"]) == 2
    assert "--bytes is 193 with --model mla; accepted: up to 192" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert main(["demo", "--model", "mla"]) == 2
    error = capsys.readouterr().err
    assert "safetensors" in error
    assert "pip install npu-fusion[demo]" in error


def test_without_rich_explain_prints_plain_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [m for m in sys.modules if m == "rich" or m.startswith("rich.")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["explain", FACTORY]) == 0
    assert "npu_dequant_swiglu_quant" in capsys.readouterr().out


def test_the_command_is_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "npu_fusion.cli", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"npu-fusion {npu_fusion.__version__}"
