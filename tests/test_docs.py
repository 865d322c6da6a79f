"""What the documentation says about the code is still so."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from npu_fusion.config import fusion_flags
from npu_fusion.passes.pattern import FUSIONS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
FUSIONS_TEXT = (ROOT / "docs" / "fusions.md").read_text(encoding="utf-8")


def texts_of_the_passes() -> list[re.Pattern[str]]:
    """Every string in passes/, an f-string with anything in place of its values."""
    patterns = []
    for path in (ROOT / "npu_fusion" / "passes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                patterns.append(re.escape(node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = [re.escape(v.value) if isinstance(v, ast.Constant) else ".+" for v in node.values]
                patterns.append("".join(parts))
    return [re.compile(pattern) for pattern in patterns if any(c.isalpha() for c in pattern)]


def documented_reasons() -> Iterator[str]:
    """First cells of the tables of refusals."""
    for table in FUSIONS_TEXT.split("| refused because | when |\n|---|---|\n")[1:]:
        for line in table.splitlines():
            if not line.startswith("|"):
                break
            yield line.removeprefix("| `").partition("` |")[0]


def test_every_documented_reason_is_one_that_the_passes_give() -> None:
    patterns, reasons = texts_of_the_passes(), list(documented_reasons())
    assert len(reasons) > 50
    assert [r for r in reasons if not any(pattern.fullmatch(r) for pattern in patterns)] == []


def test_every_fusion_has_a_flag_a_section_and_a_row() -> None:
    assert set(fusion_flags()) == set(FUSIONS)
    rows = re.findall(r"^\| \[(\w+)\] \| (\w+) \|", FUSIONS_TEXT, re.MULTILINE)
    stages = ("absorb", "compose", "lift")
    in_order = sorted(FUSIONS.values(), key=lambda f: (stages.index(f.stage), f.priority))
    assert rows == [(f.name, f.operator or f.name) for f in in_order]
    for fusion in FUSIONS.values():
        room = "lift" if fusion.stage == "lift" else "compose"
        path = f"npu_fusion/passes/{room}/{fusion.name}.py"
        shown = f"`{fusion.operator}`" if fusion.operator else "no operator"
        assert f"\n## {fusion.name}\n\n{shown} · [{fusion.stage}](../{path})\n" in FUSIONS_TEXT
        assert (ROOT / path).is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    """Of headings as GitHub makes them, and of ``<a id=..>``."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'<a id="([^"]+)">', text))
