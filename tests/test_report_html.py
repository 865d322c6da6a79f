"""The HTML page: its content as text, and its behaviour in a browser where one is installed."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from npu_fusion import report_html
from npu_fusion._marks import mark
from npu_fusion.report import Fused, FusionReport, Refusal
from tests.sample_report import CHAIN, large, sample

VOID = {"meta", "input", "br"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


class Page(HTMLParser):
    """Checks that tags nest, and collects what the tests ask for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.items: list[dict[str, str]] = []
        self.ids: Counter[str] = Counter()
        self.targets: set[str] = set()
        self.external: list[str] = []
        self.tags: Counter[str] = Counter()
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        if tag == "li":
            self.items.append(given)
        if "id" in given:
            self.ids[given["id"]] += 1
        if tag == "a":
            self.targets.add(given["href"])
        self.external += [value for name, value in given.items() if name in ("src", "srcset", "data")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


def page_of(report: FusionReport) -> Page:
    return Page(report_html.render(report))


@pytest.mark.parametrize("dry_run", [False, True])
def test_every_region_is_marked_with_the_same_colour_on_both_sides(dry_run: bool) -> None:
    page = page_of(sample(4, dry_run=dry_run))
    for region in ("1", "2", "3"):
        items = [item for item in page.items if item.get("data-r") == region]
        assert len(items) == CHAIN + (CHAIN if dry_run else 3)
        assert {item["class"] for item in items} == {"f k0"}
        assert page.ids[f"r{region}"] == 1
    near = [item for item in page.items if item.get("data-m") == "0"]
    assert len(near) == 2 * CHAIN
    assert {item["class"] for item in near} == {"n"}


def test_links_lead_somewhere_and_ids_are_unique() -> None:
    page = page_of(sample(4))
    assert max(page.ids.values()) == 1
    assert {"#r1", "#r2", "#r3", "#m0"} <= page.targets
    assert [target for target in page.targets if target[1:] not in page.ids] == []


def test_page_is_self_contained() -> None:
    html = report_html.render(sample())
    page = Page(html)
    assert page.external == []
    assert page.tags["link"] == page.tags["img"] == page.tags["iframe"] == 0
    assert all(target.startswith("#") for target in page.targets)
    assert not re.search(r"https?://|@import|url\(", html)
    assert "default-src 'none'" in html


def test_tables_say_what_the_report_says() -> None:
    text = page_of(sample(4)).text
    assert "npu_dequant_swiglu_quant3accuraterounding of the float32 product is left out" in text
    assert "dequant_swiglu_quantanother node reads an intermediate value1getitem_6 <&>" in text
    assert "user/model.py:31" in text
    assert "aten.silu.default41-3" in text
    assert "60 → 27" in text
    assert "3.70 ms" in text


def test_a_strict_fusion_says_that_nothing_differs() -> None:
    report = FusionReport(fusions=[Fused("swiglu", "npu_swiglu", "strict", source="a.py:1")])
    assert "npu_swiglu1strictnot at alla.py:1" in page_of(report).text


def test_stage_by_stage_counts_lines() -> None:
    text = page_of(sample(2)).text
    # One chain and the two readers of its results (the projection, the return) go out.
    assert f"compose: {CHAIN + 2} lines out, 5 lines in" in text
    assert "after: no change" in text


def test_one_picture_for_each_shape() -> None:
    assert page_of(sample(5)).tags["figure"] == 1
    assert page_of(large(3, 131)).tags["figure"] == 1
    assert page_of(FusionReport()).tags["figure"] == 0


def test_everything_is_escaped() -> None:
    evil = "<script>alert(1)</script>&amp;\"'"
    code = "class M(torch.nn.Module):\n    def forward(self, x):\n"
    code += f'        # File: {evil}\n        y: "{evil[:-2]}" = f({evil});\n'
    report = FusionReport(
        graph=evil,
        host=evil,
        fusions=[Fused(evil, evil, evil, (evil,), ("y",), ("y",), evil)],
        refused=[Refusal(evil, evil, evil, ("y",), evil)],
        failures=[evil],
        timing={evil: 1.0},
        operators_before={evil: 1},
        stages=[(evil, code), (evil, code + "        z = y"), (evil, code)],
    )
    html = report_html.render(report)
    page = Page(html)
    assert page.tags["script"] == 1
    assert html.count("<script>") == 1
    assert page.text.count("<script>alert(1)</script>&amp;") > 10


def test_without_code_the_page_says_how_to_get_it() -> None:
    report = sample(2)
    report.stages = []
    page = page_of(report)
    assert "dump_dir" in page.text
    assert "#r1" not in page.targets
    assert page.ids["search"] == 0


def test_nothing_fused_folds_the_graph_away() -> None:
    report = large(4, 131)
    report.fusions, report.refused = [], []
    report.stages = [report.stages[0], ("after", report.stages[0][1])]
    page = page_of(report)
    assert "Nothing in this graph was fused." in page.text
    assert page.tags["details"] == 1
    assert "⋯ 520 lines" in page.text


def test_a_fusion_of_fusions_covers_all_their_nodes() -> None:
    report = FusionReport(
        fusions=[
            Fused("swiglu", "npu_swiglu", "strict", (), ("silu", "mul"), ("npu_swiglu",)),
            Fused("dynamic_quant", "npu_dynamic_quant", "strict", (), ("abs", "div"), ("npu_dynamic_quant",)),
            Fused("swiglu_quant", "q", "strict", (), ("npu_swiglu", "npu_dynamic_quant"), ("fused",)),
        ],
        refused=[Refusal("dequant_swiglu_quant", "no", nodes=("mm", "npu_swiglu"))],
    )
    marks = mark(report, {"mm", "silu", "mul", "abs", "div"}, {"mm", "fused"})
    assert [region.into for region in marks.regions] == [3, 3, None]
    assert marks.regions[2].before == ("silu", "mul", "abs", "div")
    assert {name: region.number for name, region in marks.before.items()} == dict.fromkeys(
        ("silu", "mul", "abs", "div"), 3
    )
    assert list(marks.after) == ["fused"]
    assert list(marks.near_before) == ["mm", "silu", "mul"]


def test_large_graph_is_small_and_quick() -> None:
    report = large(61, 131)
    start = time.perf_counter()
    html = report_html.render(report)
    assert time.perf_counter() - start < 10
    assert len(html.encode()) < 3_000_000


def browse(page: Path, profile: Path, *flags: str, query: str = "") -> str:
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            "--virtual-time-budget=3000",
            *flags,
            page.as_uri() + query,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def body_data(dom: str) -> dict[str, str]:
    found = re.search(r"<body([^>]*)>", dom)
    assert found, dom[:500]
    return dict(re.findall(r'data-(\w+)="([^"]*)"', found[1]))


@needs_browser
def test_browser_runs_the_page(tmp_path: Path) -> None:
    report = sample(4)
    page = tmp_path / "report <1>.html"
    page.write_text(report_html.render(report), encoding="utf-8")

    data = body_data(browse(page, tmp_path / "plain", "--dump-dom"))
    assert data["ready"] == "yes"
    assert data["regions"] == "3"
    assert int(data["marked"]) == 3 * (CHAIN + 3) + 2 * CHAIN

    dom = browse(page, tmp_path / "hash", "--dump-dom", query="#r2")
    data = body_data(dom)
    assert (data["hit"], data["hits"]) == ("r2", str(CHAIN + 3))
    assert len(re.findall(r'<li class="f k0 hit" data-r="2"', dom)) == CHAIN + 3

    data = body_data(browse(page, tmp_path / "search", "--dump-dom", query="?search=SILU&show=fused"))
    assert data["found"] == str(3 * 2)  # each fused layer's silu and the mul that reads it

    picture = tmp_path / "page.png"
    browse(page, tmp_path / "picture", "--window-size=1280,1600", f"--screenshot={picture}")
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (1280, 1600)


@needs_browser
def test_browser_finds_its_way_in_a_large_page(tmp_path: Path) -> None:
    report = large(61, 131)
    page = tmp_path / "large.html"
    page.write_text(report_html.render(report), encoding="utf-8")
    dom = browse(page, tmp_path / "profile", "--dump-dom", query="?search=mul_60_90#m60")
    data = body_data(dom)
    assert data["regions"] == "61"
    # The jump leaves the search, which would have hidden its target.
    assert data["hit"] == "m60"
    assert data["hits"] == "24"
    assert data["found"] == data["lines"]
