"""The benchmark of the passes measures what it says, on graphs of two layers."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from torch import fx

import npu_fusion
from benchmarks import graphs, passes

LAYERS = 2


@functools.cache
def _cost(form: str, dynamic: bool = False) -> passes.Cost:
    return passes.measure(form, LAYERS, dynamic, repeats=2)


@pytest.mark.parametrize("form", ["npu", "plain", "inductor"])
def test_a_llama_fuses_in_every_layer_and_form(form: str) -> None:
    cost = _cost(form)
    assert cost.fused["npu_dequant_swiglu_quant"] == LAYERS
    assert cost.fused["npu_rotary_mul"] == 2 * LAYERS
    assert not cost.unchanged
    assert len(cost.pipeline.wall) == len(cost.pipeline.cpu) == 2
    assert 0 < cost.pipeline.least <= cost.pipeline.median
    assert cost.capture > 0


@pytest.mark.parametrize("form", graphs.MLA)
def test_latent_attention_is_absorbed_and_fused_in_every_layer_and_form(form: str) -> None:
    cost = _cost(form)
    assert cost.fused["mla_absorb"] == LAYERS
    assert cost.fused["npu_mla_prolog_v3_functional"] == LAYERS
    assert cost.fused["npu_swiglu"] == LAYERS
    assert cost.pattern_seconds is None


@pytest.mark.parametrize(("form", "matches"), [("npu", 1), ("plain", 6), ("inductor", 6)])
def test_the_comparison_finds_its_pattern_everywhere(form: str, matches: int) -> None:
    cost = _cost(form)
    assert cost.pattern_matches == matches * LAYERS
    assert cost.pattern_seconds is not None
    assert cost.pattern_seconds.least > 0


@pytest.mark.slow
@pytest.mark.parametrize(("form", "matches"), [("npu", LAYERS), ("mla", 0), ("mla-inductor", 0)])
def test_symbolic_shapes_fuse_as_much(form: str, matches: int) -> None:
    cost = _cost(form, dynamic=True)
    assert cost.fused == _cost(form).fused
    assert cost.pattern_matches == matches


def test_a_graph_with_nothing_to_fuse_stays_the_object_that_it_was() -> None:
    cost = _cost("nothing")
    assert (cost.fused, cost.unchanged, cost.pattern_seconds) == ({}, True, None)
    llama = _cost("plain")
    assert 0.5 < cost.nodes / llama.nodes < 1.5


@pytest.mark.parametrize("what", ["argument", "meta", "new node"])
def test_any_change_of_a_graph_is_noticed(what: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.relu, (x,))
    graph.output(y)
    before = passes._content(graph)
    assert passes._content(graph) == before
    if what == "argument":
        y.args = (1,)
    elif what == "meta":
        y.meta["val"] = None
    else:
        graph.placeholder("z")
    assert passes._content(graph) != before


def test_the_npu_form_is_a_model_whose_logits_survive_the_fusions() -> None:
    model, args = graphs.build("npu", 1)
    backend = npu_fusion.get_npu_backend(host="eager")
    with torch.no_grad():
        expected = model(*args)
        result = torch.compile(model, backend=backend)(*args)
    assert backend.reports[0].fused["npu_dequant_swiglu_quant"] == 1
    torch.testing.assert_close(result, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_the_mla_form_decodes_one_token_after_a_prompt() -> None:
    model, (tokens, cache) = graphs.build("mla", 1)
    backend = npu_fusion.get_npu_backend(host="eager", fusion_config={"numerics": "relaxed"})
    with torch.no_grad():
        expected = model(tokens, copy.deepcopy(cache))
        result = torch.compile(model, backend=backend)(tokens, cache)
    assert result.shape == (graphs.BATCH, 1, graphs.VOCABULARY)
    assert int(cache.get_seq_length()) == graphs.TOKENS + 1
    assert backend.reports[0].fused["mla_absorb"] == 1
    torch.testing.assert_close(result, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def _line(*points: tuple[int, float]) -> list[passes.Cost]:
    return [
        dataclasses.replace(
            _cost("plain"),
            layers=layers,
            pipeline=passes.Seconds((seconds, seconds + 1), (seconds, seconds + 2)),
        )
        for layers, seconds in points
    ]


def test_the_fit_is_a_line_through_the_minima() -> None:
    found = passes.fit(_line((122, 1.32), (8, 0.18), (61, 0.71)))
    assert found is not None
    assert (found.start, found.per_layer, found.growth) == pytest.approx((0.1, 0.01, 1.0))
    quadratic = passes.fit(_line((8, 0.0064), (61, 0.3721), (122, 1.4884)))
    assert quadratic is not None
    assert quadratic.growth > 2
    assert passes.fit(_line((8, 0.1), (61, 0.7))) is None


def test_the_tables_hold_what_was_measured() -> None:
    slow = dataclasses.replace(
        _cost("plain"), capture=10.0, pipeline=passes.Seconds((0.7, 0.6, 0.6), (0.5, 0.4, 0.4))
    )
    cost, comparison, growth, limits = passes.tables(
        [slow, _cost("nothing")], _line((8, 0.18), (61, 0.71), (122, 1.32))
    )
    assert cost.rows[0][:2] == ("plain", "2")
    assert cost.rows[0][5:] == ("0.700", "0.600", "0.600", "0.400", "6.0%")
    assert comparison.rows[0][3] == "quantization of rows"
    assert comparison.rows[0][5] == str(6 * LAYERS)
    assert [row[0] for row in growth.rows] == ["8", "61", "122"]
    met = {row[0]: row[3] for row in limits.rows}
    assert met["plain, median"] == "no"
    assert met["plain, CPU"] == "yes"
    assert met["plain, of the capture"] == "no"
    assert met["nothing, the graph"] == "yes"
    assert met["time per layer, large over small"] == "yes"
    assert "| plain, median | 0.5 s | 0.600 s | no |" in limits.markdown()


def test_every_form_has_a_limit_of_its_own() -> None:
    seconds = passes.Seconds((0.6,), (0.6,))
    costs = [dataclasses.replace(_cost("plain"), form=form, pipeline=seconds) for form in graphs.FORMS]
    met = {row[0]: row[3] for row in passes.tables(costs, [])[-1].rows}
    assert {form for form in graphs.FORMS if met[f"{form}, median"] == "yes"} == set(graphs.MLA)


def test_a_changed_graph_with_nothing_to_fuse_misses_its_limit() -> None:
    changed = dataclasses.replace(_cost("nothing"), unchanged=False)
    limits = passes.tables([changed], [])[-1]
    assert ("nothing, the graph", "unchanged", "changed", "no") in limits.rows


def test_tables_go_between_their_marks() -> None:
    rows = passes.Rows("cost", "title", ("a", "b"), [("1", "2")])
    document = "x\n<!-- passes: cost -->\nold\n<!-- end -->\ny\n<!-- passes: limits -->\nkept\n<!-- end -->\n"
    updated = passes.update(document, "passes", [rows])
    assert updated == document.replace("old", "| a | b |\n| --- | ---: |\n| 1 | 2 |")
    with pytest.raises(ValueError, match="passes: growth"):
        passes.update(document, "passes", [dataclasses.replace(rows, name="growth")])


@pytest.mark.slow
def test_the_command_prints_all_tables(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--forms", "plain", "--depth", "2", "--layers", "1", "2", "3", "--repeats", "1"]
    assert passes.main(arguments) == 0
    out = capsys.readouterr().out
    for title in ("The whole pipeline", "Beside one pattern", "Growth with", "Against the limits"):
        assert title in out
    assert "plain, of the capture" in out


@pytest.mark.parametrize("arguments", [["--depth", "0"], ["--repeats", "0"], ["--forms", "llama"]])
def test_wrong_arguments_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        passes.main(arguments)
    assert f"{arguments[0]}" in capsys.readouterr().err
