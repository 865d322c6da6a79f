"""The report as text, as rich tables and as JSON."""

from __future__ import annotations

import builtins
import json
from typing import Any

import pytest

from npu_fusion.report import Fused, FusionReport, Refusal
from tests.sample_report import sample


def many() -> FusionReport:
    long = "a rounding to bfloat16 between the dequantization and the activation is left out, which is closer"
    return FusionReport(
        graph="llama",
        host="inductor",
        fusions=[
            Fused("swiglu", "npu_swiglu", "strict"),
            Fused(
                "dequant_swiglu_quant",
                "npu_dequant_swiglu_quant",
                "accurate",
                (long, "factors in another order"),
            ),
            Fused("dequant_swiglu_quant", "npu_dequant_swiglu_quant", "accurate", (long,)),
        ],
        refused=[
            Refusal("rms_norm", "eps is a tensor", "eps: add_3", source=None),
            Refusal("swiglu", "halves overlap", "0:9 and 8:16", source="/models/a.py:7"),
            Refusal("rms_norm", "eps is a tensor", "eps: add_9", source="/models/b.py:12"),
        ],
        timing={"lift": 1.5, "compose": 0.004},
        operators_before={"aten.silu.default": 3, "aten.mm.default": 2},
        operators_after={"npu.npu_swiglu.default": 1, "aten.mm.default": 2},
        dump_dir="/tmp/dump/llama",
    )


def line_of(text: str, *words: str) -> str:
    found = [line for line in text.splitlines() if all(word in line for word in words)]
    assert len(found) == 1, f"{words} in {found}"
    return found[0]


def test_text_counts_groups_and_names_the_first_source() -> None:
    text = many().text(300)
    assert text.splitlines()[0] == "npu_fusion, llama for inductor: 3 fusions made, 3 near misses, 1.50 s"
    assert line_of(text, "npu_dequant_swiglu_quant").split()[1:3] == ["2", "accurate"]
    assert "factors in another order" in text
    near = line_of(text, "rms_norm")
    assert "eps is a tensor" in near
    assert near.split()[-3:] == ["eps:", "add_3", "models/b.py:12"]
    assert line_of(text, "lift").split() == ["lift", "1.50", "s"]
    assert text.endswith("Dump: /tmp/dump/llama")


def test_text_lists_only_operators_that_changed() -> None:
    text = many().text()
    assert line_of(text, "aten.silu.default").split() == ["aten.silu.default", "3", "0", "-3"]
    assert line_of(text, "npu.npu_swiglu.default").split() == ["npu.npu_swiglu.default", "0", "1", "+1"]
    assert "aten.mm.default" not in text


@pytest.mark.parametrize("width", [60, 80, 110, 300])
def test_text_keeps_the_width_and_loses_nothing(width: int) -> None:
    text = many().text(width)
    assert max(map(len, text.splitlines())) <= width
    assert "".join(many().text(300).split()).count("rounding") == 1
    if width >= 110:
        assert "aten.silu.default" in text


def test_text_refuses_a_width_that_no_table_fits() -> None:
    with pytest.raises(ValueError, match="width is 20; accepted: 60 or more"):
        many().text(20)


def test_narrow_text_wraps_sentences_before_names() -> None:
    report = FusionReport(refused=[Refusal("dequant_swiglu_quant", "words " * 30, source="/a/file.py:12")])
    for width in (80, 100):
        assert line_of(report.text(width), "dequant_swiglu_quant", "words", "a/file.py:12")
    assert "notes" not in FusionReport(fusions=[Fused("swiglu", "npu_swiglu", "strict")]).text()


def test_str_is_text() -> None:
    report = sample()
    assert str(report) == report.text()


def test_empty_report_is_one_line() -> None:
    assert FusionReport().text() == "npu_fusion, graph: 0 fusions made, 0 near misses, 0.00 ms"


def test_dry_run_cache_and_failures_are_said() -> None:
    report = FusionReport(dry_run=True, from_cache=True, failures=["swiglu: KeyError: 'val'"])
    report.fusions.append(Fused("swiglu", "npu_swiglu", "strict"))
    text = report.text()
    assert "1 failed pass, 1 fusion would be made" in text
    assert "from the compile cache" in text
    assert "Fusions that would be made (dry run)" in text
    assert "Failed and undone: swiglu: KeyError: 'val'" in text


def test_print_draws_rich_tables() -> None:
    console_module = pytest.importorskip("rich.console")
    console = console_module.Console(width=160, record=True, force_terminal=False)
    report = many()
    report.refused.append(Refusal("swiglu", "[bold]not markup[/bold]", source="c.py:1"))
    with console.capture() as captured:
        report.print(console)
    drawn = captured.get()
    assert "npu_dequant_swiglu_quant" in drawn
    assert "[bold]not markup[/bold]" in drawn
    assert "│" in drawn
    assert "Dump: /tmp/dump/llama" in drawn


def test_print_without_rich_is_the_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = builtins.__import__

    def without_rich(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "rich":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    many().print()
    assert capsys.readouterr().out == many().text() + "\n"


def test_refusals_are_grouped_most_frequent_first() -> None:
    groups = many().refusals()
    assert [(key, len(group)) for key, group in groups.items()] == [
        (("rms_norm", "eps is a tensor"), 2),
        (("swiglu", "halves overlap"), 1),
    ]
    assert list(many().refusals("swiglu")) == [("swiglu", "halves overlap")]


def test_json_round_trip() -> None:
    report = sample(3)
    content = json.loads(report.to_json())
    assert content["fused"] == {"npu_dequant_swiglu_quant": 2}
    assert content["seconds"] == pytest.approx(0.0037)
    back = FusionReport.from_dict(content)
    assert back.stages == []
    back.stages = report.stages
    assert back == report
