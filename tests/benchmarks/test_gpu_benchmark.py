"""The benchmark of the GPU kernels, as far as it goes without a GPU: its clock is replaced."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import npu_fusion  # noqa: F401  (registers the operators)
from benchmarks import gpu
from npu_fusion.bench.table import update

CPU = torch.device("cpu")
DOCUMENT = Path(__file__).parents[2] / "docs" / "performance.md"


def wall(call: Callable[[], object]) -> Callable[[], float]:
    began = time.perf_counter()
    call()
    taken = time.perf_counter() - began
    return lambda: taken


def test_calls_take_turns_in_an_order_that_shifts_and_the_median_counts() -> None:
    order: list[str] = []
    times = {"a": iter([0.0, 1.0, 9.0, 2.0]), "b": iter([0.0, 5.0, 5.0, 6.0])}

    def clock(call: Callable[[], object]) -> Callable[[], float]:
        call()
        name = order[-1]
        return lambda: next(times[name])

    calls = {name: (lambda name=name: order.append(name)) for name in times}
    assert gpu.interleaved(calls, clock, 0.0, rounds=(3, 3)) == {"a": 2.0, "b": 5.0}
    assert order == ["a", "b", *("a", "b"), *("b", "a"), *("a", "b")]


def test_rounds_end_with_the_time_but_not_before_the_fewest() -> None:
    counted: list[int] = []
    gpu.interleaved({"a": lambda: counted.append(1)}, wall, 0.0, rounds=(4, 100))
    assert len(counted) == 1 + 4
    counted.clear()
    gpu.interleaved({"a": lambda: counted.append(1)}, wall, 60.0, rounds=(1, 6))
    assert len(counted) == 1 + 6


@pytest.mark.parametrize("operator", ["dynamic_quant", "quant_matmul, weight n x k"])
def test_an_operator_is_measured(operator: str) -> None:
    found = gpu.measure(operator, 4, 128, wall, CPU, 0.0)
    assert (found.operator, found.tokens, found.width) == (operator, 4, 128)
    assert min(found.fused, found.fused_host) > 0
    assert found.gain is not None and found.of_bound is not None


@pytest.mark.parametrize("operator", gpu.OPERATORS)
def test_every_operator_runs_beside_its_formula(operator: str) -> None:
    tokens, width = 4, None if operator in gpu.PROLOG else 128
    with torch.device(CPU):
        made = gpu.make(operator, tokens, width, torch.Generator(CPU).manual_seed(0))
        assert made.fused() is not None
        assert made.eager(*made.args) is not None


def test_what_the_libraries_do_not_take_is_left_out() -> None:
    def refuse() -> None:
        raise RuntimeError("self.size(0) needs to be greater than 16, but got 1")

    def fail() -> None:
        raise RuntimeError("out of memory")

    assert not gpu._runs(refuse)
    assert gpu._runs(lambda: None)
    with pytest.raises(RuntimeError, match="out of memory"):
        gpu._runs(fail)


FOUND = gpu.Measured("dynamic_quant", 4096, 1536, 10e-6, 3e-6, 50e-6, 12e-6, 4e-6, 9e-6)
PRODUCT = dataclasses.replace(
    FOUND, operator=gpu.OPERATORS[-1], width=None, eager=None, inductor=None, inductor_host=None, bound=None
)


def test_tables_hold_what_was_measured() -> None:
    slower = dataclasses.replace(FOUND, tokens=16384, inductor=8e-6, bound=6e-6)
    machine, memory, products, goals = gpu.tables([FOUND, slower, PRODUCT], [("device", "one")])
    assert machine.rows == [("device", "one")]
    assert memory.rows[0] == (
        *("dynamic_quant", "4096", "1536", "10.0", "50.0", "12.0", "9.00", "1.20", "0.90"),
        *("3.00", "4.00"),
    )
    assert products.rows[0][3:] == ("10.0", "", "", "", "", "", "3.00", "")
    assert len(memory.header) == len(memory.rows[0]) == len(products.rows[0])
    assert goals.rows == [
        ("dynamic_quant, times as fast as Inductor", "1.0", "0.80 at 16384 x 1536", "no"),
        ("dynamic_quant, of the speed of a copy", "0.85", "0.60 at 16384 x 1536", "no"),
    ]
    assert [row[-1] for row in gpu.goals([FOUND]).rows] == ["yes", "yes"]
    assert len(gpu.goals([dataclasses.replace(FOUND, tokens=2048)]).rows) == 1


def test_the_document_has_a_place_for_every_table() -> None:
    shown = gpu.tables([FOUND, PRODUCT], [("device", "one")])
    updated = update(DOCUMENT.read_text(), "gpu", shown)
    assert all(rows.markdown() in updated for rows in shown)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--tokens", "0"], ["--widths", "-1"], ["--operators", "rms"]])
def test_wrong_arguments_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert arguments[0] in capsys.readouterr().err
