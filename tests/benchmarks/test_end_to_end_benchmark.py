"""The end-to-end benchmark runs the same model in every variant, on one tiny layer."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end
from benchmarks.end_to_end import PARTS, SCENARIOS, VARIANTS, Run, Scenario
from npu_fusion.bench.table import Rows, update
from npu_fusion.bench.timing import Times

HIDDEN = 128
DECODE, _, PREFILL = SCENARIOS
SHORT = Scenario("prefill", 1, 8)


@functools.cache
def _runs(scenario: Scenario) -> list[Run]:
    return end_to_end.measure(scenario, ["npu_fusion", "int8", "bfloat16"], 1, HIDDEN, seconds=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [DECODE, SHORT])
def test_all_variants_compute_one_model(scenario: Scenario) -> None:
    ours, int8, bfloat16 = _runs(scenario)
    assert ours.apart == 0
    assert 0 <= int8.apart < 0.05
    assert 0 < bfloat16.apart < 0.2
    assert ours.tokens_per_second == scenario.tokens / ours.times.median


@pytest.mark.slow
def test_the_parts_are_those_of_the_call() -> None:
    ours, int8, _ = _runs(DECODE)
    assert list(ours.parts) == list(PARTS)
    assert min(ours.parts.values()) > 0
    assert int8.parts["other fused operators"] == 0


def test_weights_are_the_same_in_every_dtype() -> None:
    narrow, wide = (end_to_end.new_model(1, HIDDEN, dtype) for dtype in (torch.bfloat16, torch.float32))
    for (name, a), (other, b) in zip(narrow.named_parameters(), wide.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a.float(), b)
    assert narrow.config.num_key_value_heads == end_to_end.KEY_VALUE_HEADS


def test_a_decode_step_can_be_repeated() -> None:
    model = end_to_end.new_model(1, HIDDEN)
    cache = end_to_end._cache(model, 2)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with torch.no_grad():
        end_to_end._Step(model)(tokens, cache)
    assert int(cache.get_seq_length()) == 3
    assert cache.layers[0].keys.shape[2] == end_to_end.PLACES


def test_variants_of_torchao_need_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert end_to_end.available() == tuple(v for v in VARIANTS if not v.startswith("torchao"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert end_to_end.available() == tuple(VARIANTS)


def _run(variant: str, seconds: float, parts: tuple[float, ...] = (0.5, 0.25, 0.0, 0.25)) -> Run:
    return Run(variant, DECODE, Times((seconds,) * 9), 0.01, dict(zip(PARTS, parts, strict=True)))


def test_the_goal_is_held_against_the_best_of_the_others() -> None:
    runs = [
        _run("npu_fusion", 0.02),
        _run("npu_fusion, float32", 0.01),
        _run("int8", 0.018),
        _run("torchao", 0.016, (0.4, 0.4, 0.0, 0.2)),
    ]
    speed, gain, parts = end_to_end.tables(runs)
    assert speed.rows[1] == ["npu_fusion, float32", "100.0", "0.01"]
    assert gain.rows == [[DECODE.name, "npu_fusion, float32", "torchao", "1.60", "1.5", "yes", "1.25"]]
    assert parts.rows[3][1:] == ["16.0", "400.0", "400.0", "0.0", "200.0"]
    assert [rows.name for rows in end_to_end.tables(runs[:1])] == ["speed", "parts"]


def test_the_document_has_a_place_for_every_table() -> None:
    document = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    update(document, "end to end", [Rows(name, "", ("a",), ()) for name in ("speed", "gain", "parts")])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--layers", "0"], "--layers is 0; accepted: 1 or more"),
        (["--threads", "0"], "--threads is 0; accepted: 1 or more"),
        (["--hidden", "100"], "--hidden is 100; accepted: multiples of 128"),
        (["--variants", "fp4"], "--variants"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        end_to_end.main(arguments)
    assert error in capsys.readouterr().err
