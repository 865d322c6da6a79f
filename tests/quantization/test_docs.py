"""What docs/quantization.md says is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks import quantization
from npu_fusion.quantization import PRESETS
from npu_fusion.quantization._combinations import markdown
from npu_fusion.quantization.algorithms import ALGORITHMS

TEXT = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text(encoding="utf-8")


def table(name: str) -> str:
    return TEXT.partition(f"<!-- quantization: {name} -->\n")[2].partition("<!-- end -->")[0].strip()


def test_the_table_of_combinations_is_the_one_that_is_checked_against() -> None:
    assert table("combinations") == markdown().strip()


@pytest.mark.parametrize("name", [*quantization.TABLES, "peers", "scaling"])
def test_every_table_was_measured(name: str) -> None:
    assert len(table(name).splitlines()) > 3


def test_tables_have_the_rows_that_their_commands_give() -> None:
    def first_cells(name: str) -> list[str]:
        return [line.removeprefix("| ").partition(" |")[0] for line in table(name).splitlines()[2:]]

    assert first_cells("outliers")[1:] == list(quantization.FULL)
    assert first_cells("weights") == [name for name in quantization.ALONE for _ in (1, 256)]
    assert set(first_cells("time")) >= set(PRESETS)


def test_presets_and_algorithms_are_named() -> None:
    assert [name for name in PRESETS if f"`{name}`" not in TEXT] == []
    assert [name for name in ALGORITHMS if f"`{name}`" not in TEXT] == []


def test_the_files_it_links_to_exist() -> None:
    for link in re.findall(r"\]\((\.\./[^)#]+)", TEXT):
        assert (Path(__file__).parents[2] / "docs" / link).exists(), link


def test_a_table_is_put_between_its_lines() -> None:
    rows = quantization.Rows("title", [["a", "b"], ["1", "2"]])
    document = "x\n<!-- quantization: bits -->\nold\n<!-- end -->\ny\n"
    for _ in range(2):
        document = quantization.update(document, "bits", rows)
    assert (
        document == "x\n<!-- quantization: bits -->\n| a | b |\n| --- | --- |\n| 1 | 2 |\n<!-- end -->\ny\n"
    )
    with pytest.raises(ValueError, match="the document has no '<!-- quantization: bits -->'"):
        quantization.update("", "bits", rows)
