"""The benchmark of the kernels compares what computes the same, and its tables hold what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from benchmarks import kernels as long_form
from npu_fusion.bench import measure as measuring
from npu_fusion.bench.cases import CASES
from npu_fusion.bench.measure import Measured, copy, measure
from npu_fusion.bench.products import K_N, MATMULS, N_K, PROLOGS, Call
from npu_fusion.bench.show import call_cost, disturbance, duration, goals, operator_table, tables
from npu_fusion.bench.table import Rows, update
from npu_fusion.bench.timing import FEWEST_ROUNDS, Times, interleaved

WIDTH = 256


def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def assert_same_values(fused: Any, eager: Any) -> None:
    """Up to the roundings that the operator does not make: a step of int8, some units of bfloat16."""
    pairs = list(zip(pytree.tree_leaves(fused), pytree.tree_leaves(eager), strict=True))
    assert pairs
    for a, b in pairs:
        assert a.dtype == b.dtype
        near = 1.0 if a.dtype == torch.int8 else 0.02 * float(b.abs().max())
        torch.testing.assert_close(a.double(), b.double().reshape(a.shape), rtol=0, atol=near)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("operator", CASES)
def test_operator_and_formula_compute_the_same(operator: str, tokens: int) -> None:
    case = CASES[operator]
    inputs = case.inputs(tokens, WIDTH, random())
    assert_same_values(case.fused(*inputs), case.eager(*inputs))


@pytest.mark.parametrize("operator", MATMULS)
def test_the_product_and_its_formula_compute_the_same(operator: str) -> None:
    call = MATMULS[operator](5, WIDTH, random())
    assert_same_values(call.fused(), call.eager(*call.args))
    _, weight, *_ = call.args
    assert weight.is_contiguous() == (operator.endswith(K_N))
    (layouts,) = call.products
    assert list(layouts) == [N_K, K_N]
    assert len({tuple(map(float, product().flatten()[:9])) for product in layouts.values()}) == 1


@pytest.mark.parametrize("operator", PROLOGS)
def test_a_prolog_and_its_formula_compute_the_same_and_write_the_same_caches(operator: str) -> None:
    call = PROLOGS[operator](2, random())
    kv_cache, kr_cache, _ = call.args[-3:]
    untouched = [cache.clone() for cache in (kv_cache, kr_cache)]
    query, query_rope, *_ = call.fused()
    written = [cache.clone() for cache in (kv_cache, kr_cache)]
    for cache, before in zip((kv_cache, kr_cache), untouched, strict=True):
        cache.copy_(before)
    assert_same_values((query, query_rope), call.eager(*call.args))
    for by_operator, by_formula, before in zip(written, (kv_cache, kr_cache), untouched, strict=True):
        assert not torch.equal(by_operator, before)
        assert_same_values(by_operator, by_formula)
    assert len(call.products) == 4


def test_a_measurement_has_every_column() -> None:
    found = measure("dynamic_quant", 2, WIDTH, 0.01, reference=True)
    assert (found.operator, found.tokens, found.width, found.threads) == ("dynamic_quant", 2, WIDTH, 1)
    assert min(found.fused, found.eager, found.bound) > 0
    assert found.reference is not None
    assert found.inductor is not None
    assert 0 <= found.disturbed <= 1
    assert found.gain == found.inductor / found.fused
    without = measure("dynamic_quant", 2, WIDTH, 0.01, inductor=False)
    assert (without.inductor, without.gain, without.reference) == (None, None, None)


@pytest.mark.parametrize("operator", ["dequant_swiglu_quant", "rotary_mul", "add_rms_norm_quant"])
def test_inductor_makes_one_graph_of_a_formula(operator: str) -> None:
    case = CASES[operator]
    inputs = case.inputs(2, WIDTH, random())
    explained = torch._dynamo.explain(case.eager)(*inputs)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_inductor_compiles_for_the_threads_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def compiler(function: Any, **_: Any) -> Any:
        return lambda *args: seen.append(measuring.inductor_config.cpp.threads)

    monkeypatch.setattr(torch, "compile", compiler)
    compiled = measuring._compiled(torch.relu, [torch.ones(1)])
    compiled()
    assert seen[0] == 1
    assert seen[1] != 1  # the default


def test_without_a_compiler_the_column_of_inductor_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring._compat, "why_no_inductor", lambda: "there is no C++ compiler")
    assert measure("dynamic_quant", 1, WIDTH, 0.01).inductor is None


def test_the_copy_moves_as_many_bytes_as_the_operator() -> None:
    x, y = torch.arange(64, dtype=torch.int32), torch.arange(100, 200, dtype=torch.int32)
    total = 2 * (x.numel() * 4 + 40)
    call = copy((x, y), total)
    pieces = call.__closure__
    assert pieces is not None
    ((first, source), (second, part)) = pieces[0].cell_contents
    assert (source.numel(), part.numel()) == (64, 10)
    call()
    assert torch.equal(first, x)
    assert torch.equal(second, y[:10])


def test_of_two_layouts_the_faster_one_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    products = [
        {"slow": lambda: called.append("slow 0"), "fast": lambda: called.append("fast 0")},
        {"fast": lambda: called.append("fast 1"), "slow": lambda: called.append("slow 1")},
    ]
    seconds = {"slow": 2.0, "fast": 1.0}

    def timed(calls: dict[Any, Any], *_: Any, **__: Any) -> dict[Any, Times]:
        return {key: Times((seconds[key[1]],)) for key in calls}

    monkeypatch.setattr(measuring, "interleaved", timed)
    measuring._bound(Call(lambda: None, lambda: None, (), products))()
    assert called == ["fast 0", "fast 1"]


def test_calls_take_turns_and_short_ones_are_repeated() -> None:
    counts = {"a": 0, "b": 0}

    def call(name: str) -> None:
        counts[name] += 1

    times = interleaved({"a": lambda: call("a"), "b": lambda: call("b")}, 0.0)
    blocks = [len(t.undisturbed) + len(t.disturbed) for t in times.values()]
    assert blocks == [FEWEST_ROUNDS] * 2
    assert min(counts.values()) > 10 * FEWEST_ROUNDS
    counts = dict.fromkeys(counts, 0)
    interleaved({"a": lambda: call("a")}, 0.0, block=0.0)
    assert counts["a"] < 3 * FEWEST_ROUNDS


def test_disturbed_blocks_do_not_count_while_there_are_others() -> None:
    enough = Times((1.0,) * FEWEST_ROUNDS, (9.0,) * 50)
    assert (enough.median, enough.least) == (1.0, 1.0)
    few = Times((1.0,), (9.0, 9.0))
    assert (few.median, few.least) == (9.0, 1.0)


def measured(operator: str, tokens: int, fused: float, **given: Any) -> Measured:
    fields: dict[str, Any] = {"width": 1536, "threads": 1, "eager": 1e-3, "inductor": 4e-5, "bound": 1e-5}
    return Measured(operator, tokens, fused=fused, **(fields | given))


def test_the_cost_of_a_call_is_what_a_row_less_would_not_save() -> None:
    rows = [measured("dequant_swiglu_quant", 1, 12e-6), measured("dequant_swiglu_quant", 16, 42e-6)]
    rows.append(measured("dequant_swiglu_quant", 1, 15e-6, threads=2))
    assert call_cost(rows) == {
        ("dequant_swiglu_quant", 1536, 1): pytest.approx(10e-6),
        ("dequant_swiglu_quant", 1536, 2): pytest.approx(13e-6),
    }
    assert call_cost(rows[:1]) == {}


def test_the_goals_are_held_against_the_worst_row() -> None:
    rows = [
        measured("dequant_swiglu_quant", 1, 12e-6),
        measured("dequant_swiglu_quant", 16, 10e-6),
        measured("dequant_swiglu_quant", 2048, 20e-6),
        measured("dynamic_quant", 1, 10e-6),
        measured(next(iter(MATMULS)), 16, 12e-6),
        measured(next(iter(PROLOGS)), 8, 11e-6, width=None),
        measured("rms_norm", 2048, 1e-3),
    ]
    found = {row[0]: row[2:] for row in goals(rows).rows}
    assert found["dequant_swiglu_quant: times Inductor"] == ("at least 3.0", "2.00", "2048 x 1536", "no")
    assert found["dequant_swiglu_quant: of the copy"] == ("at least 0.6", "0.50", "2048 x 1536", "no")
    assert found["dynamic_quant: times Inductor"] == ("at least 2.0", "4.00", "1 x 1536", "yes")
    call = found["dequant_swiglu_quant: microseconds of a call over its arithmetic"]
    assert call == ("at most 12", "12.1", "width 1536", "no")
    assert found[f"{next(iter(MATMULS))}: over its products"][1:] == ("1.20", "16 x 1536", "no")
    assert found[f"{next(iter(PROLOGS))}: over its products"][1:] == ("1.10", "8 tokens", "yes")
    assert not any(what.startswith("rms_norm") for what in found)


def test_a_table_shows_each_row_once_with_its_ratios() -> None:
    rows = [measured("dynamic_quant", t, 2e-5, threads=n) for n in (2, 1) for t in (16, 1)]
    shown = operator_table(rows)
    assert [row[:3] for row in shown.rows] == [
        ["1", "1536", "1"],
        ["16", "1536", "1"],
        ["1", "1536", "2"],
        ["16", "1536", "2"],
    ]
    assert shown.rows[0][3:] == ["20.0", "1,000", "40.0", "", "10.0", "2.00", "0.50"]
    referenced = operator_table([measured("dynamic_quant", 1, 2e-5, reference=3e-5)])
    assert referenced.header[4] == "reference"
    assert referenced.rows[0][3:6] == ["20.0", "30.0", "1,000"]
    over = operator_table([measured(next(iter(MATMULS)), 1, 2e-5, inductor=None)])
    assert over.header[-1] == "over products"
    assert over.rows[0][3:] == ["20.0", "1,000", "", "", "10.0", "", "2.00"]
    assert [rows.name for rows in tables([measured("rms_norm", 1, 1e-5)])] == ["rms_norm"]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, ""), (1.234e-6, "1.23"), (12.34e-6, "12.3"), (1.234e-3, "1,234")]
)
def test_durations_are_microseconds_with_three_digits(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


def test_it_says_how_quiet_the_machine_was() -> None:
    rows = [measured("rms_norm", 1, 1e-5, disturbed=share) for share in (0.0, 0.5)]
    assert disturbance(rows) == "other work took a processor away during 25% of the blocks"


def test_tables_go_between_their_marks() -> None:
    rows = Rows("rms_norm", "title", ("a", "b"), [("1", r"\1")])
    document = "x\n<!-- kernels: rms_norm -->\nold\n<!-- end -->\ny\n"
    assert update(document, "kernels", [rows]) == document.replace(
        "old", "| a | b |\n| --- | ---: |\n| 1 | \\1 |"
    )
    with pytest.raises(ValueError, match="kernels: goals"):
        update(document, "kernels", [Rows("goals", "", (), ())])


def test_the_document_has_a_place_for_every_table() -> None:
    document = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    every = [Rows(name, "", ("a",), ()) for name in (*long_form.OPERATORS, "goals")]
    update(document, "kernels", every)


def test_the_command_prints_tables_and_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--operators", "dynamic_quant", "--tokens", "1", "2", "--widths", "128", "--threads", "1"]
    assert long_form.main([*arguments, "--seconds", "0.01"]) == 0
    assert "dynamic_quant, microseconds" in capsys.readouterr().out
    document = tmp_path / "performance.md"
    document.write_text("".join(f"<!-- kernels: {n} -->\n<!-- end -->\n" for n in ("dynamic_quant", "goals")))
    assert long_form.main([*arguments, "--seconds", "0.01", "--update", str(document)]) == 0
    assert "| 2 | 128 | 1 |" in document.read_text()
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--tokens", "0"], "--tokens has 0; accepted: 1 or more"),
        (["--threads", "0"], "--threads has 0; accepted: 1 or more"),
        (["--widths", "100"], "--widths has 100; accepted: multiples of 128"),
        (["--operators", "softmax"], "--operators"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        long_form.main(arguments)
    assert error in capsys.readouterr().err
