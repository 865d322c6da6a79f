"""``npu-fusion bench``."""

from __future__ import annotations

import json

import pytest
import torch

from npu_fusion import _cli_bench
from npu_fusion.bench import measure
from npu_fusion.bench.measure import Measured
from npu_fusion.cli import main


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Nothing is timed; what would be: operator, tokens, threads."""
    found: list[tuple[str, int, int]] = []

    def pretend(operator: str, tokens: int, width: int, seconds: float) -> Measured:
        threads = torch.get_num_threads()
        found.append((operator, tokens, threads))
        return Measured(operator, tokens, width, threads, fused=2e-5, eager=1e-4, inductor=6e-5, bound=1e-5)

    monkeypatch.setattr(measure, "measure", pretend)
    return found


def test_it_prints_a_table_for_each_operator(
    calls: list[tuple[str, int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench"]) == 0
    out = capsys.readouterr().out
    for operator in ("dequant_swiglu_quant", "dynamic_quant", "add_rms_norm_dynamic_quant", "quant_matmul"):
        assert f"{operator}" in out
        assert {t for name, t, _ in calls if name.startswith(operator)} == set(_cli_bench.TOKENS)
    assert "Against the goals" in out
    assert "other work took a processor away during 0% of the blocks" in out


def test_it_measures_with_as_many_threads_as_asked_for(
    calls: list[tuple[str, int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    assert main(["bench", "--threads", "1", "--json"]) == 0
    assert {threads for _, _, threads in calls} == {1}
    assert torch.get_num_threads() == before
    first, *_ = json.loads(capsys.readouterr().out)
    assert (first["operator"], first["tokens"], first["threads"]) == ("dequant_swiglu_quant", 1, 1)
    assert (first["fused"], first["inductor"], first["bound"]) == (2e-5, 6e-5, 1e-5)


@pytest.mark.usefixtures("calls")
def test_without_a_compiler_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_cli_bench._compat, "why_no_inductor", lambda: "there is no C++ compiler (g++)")
    assert main(["bench"]) == 0
    assert "the column of Inductor is empty: there is no C++ compiler (g++)" in capsys.readouterr().err


def test_no_threads_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--threads", "0"]) == 2
    assert "--threads is 0; accepted: 1 or more" in capsys.readouterr().err


def test_one_row_is_really_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_cli_bench, "TOKENS", (1,))
    monkeypatch.setattr(_cli_bench, "WIDTH", 128)
    monkeypatch.setattr(_cli_bench, "SECONDS", 0.01)
    assert main(["bench", "--threads", "1", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert len(measured) == 4
    assert all(m["fused"] > 0 and m["bound"] > 0 for m in measured)
