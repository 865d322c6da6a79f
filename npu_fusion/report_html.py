"""The report as one self-contained HTML page: tables, pictures, and the graph before and after side by side.

The page loads nothing, needs no script to be read, and stays small for large graphs: what is the same on both
sides folds away, intermediate stages show only what they changed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape

from npu_fusion import _page_assets as assets
from npu_fusion import _picture
from npu_fusion._listing import Line, by_name, parse
from npu_fusion._marks import Region, mark
from npu_fusion._page_graph import GraphView, anchor
from npu_fusion._report_text import Table, counted, duration, operators_table, short_source, timing_table
from npu_fusion._version import __version__
from npu_fusion.report import FusionReport, Refusal

MOST_DETAILS = 3
"""Distinct values of one near miss that show at once; the rest folds away."""
MOST_PLACES = 6
MOST_PICTURES = 12


def render(report: FusionReport) -> str:
    """The whole page. Graphs appear only if ``report.stages`` holds them, first stage before, last after."""
    return _Page(report).html()


class _Page:
    def __init__(self, report: FusionReport) -> None:
        self.report = report
        self.stages = [(name, parse(code)) for name, code in report.stages]
        self.before = self.stages[0][1] if self.stages else []
        self.after = self.stages[-1][1] if self.stages else []
        self.before_by_name, self.after_by_name = by_name(self.before), by_name(self.after)
        self.marks = mark(report, self.before_by_name, self.after_by_name)
        self.graph = GraphView(report, self.marks)

    def html(self) -> str:
        # The listings are written first: what they show decides what the tables can link to.
        graph = self._graph()
        sections = [
            self._fusions(),
            self._pictures(),
            self._refusals(),
            self._numbers(),
            graph,
            self._between(),
        ]
        title = escape(f"{self.report.graph} · npu_fusion")
        hues = "".join(f".k{index}{{--h:{hue}}}" for index, hue in enumerate(assets.HUES))
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
            f"<title>{title}</title>\n<style>{assets.CSS}{hues}</style></head>\n<body>"
            f'<a class="skip" href="#graph">Skip to the graph</a>\n{self._header()}\n<main>\n'
            + "\n".join(filter(None, sections))
            + f"\n<footer>npu_fusion {escape(__version__)}</footer></main>\n"
            f"<script>{assets.JS}</script></body></html>\n"
        )

    def _header(self) -> str:
        report = self.report
        badges = [f'<span class="badge">host {escape(report.host)}</span>'] if report.host else []
        if report.dry_run:
            badges.append('<span class="badge warn">dry run: nothing was changed</span>')
        if report.from_cache:
            badges.append('<span class="badge">from the compile cache</span>')
        tiles = [
            ("fusions" if not report.dry_run else "fusions found", f"{len(report.fusions):,}"),
            ("near misses", f"{len(report.refused):,}"),
        ]
        if report.operators_before:
            before, after = sum(report.operators_before.values()), sum(report.operators_after.values())
            tiles.append(("operators before → after", f"{before:,} → {after:,}"))
        tiles.append(("time of the passes", duration(report.seconds)))
        shown = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles
        )
        failures = ""
        if report.failures:
            items = "".join(f"<li>{escape(failure)}</li>" for failure in report.failures)
            heading = (
                f"{counted(len(report.failures), 'pass', 'passes')} failed and left the graph as it was:"
            )
            failures = f'<div class="alert" role="alert">{heading}<ul>{items}</ul></div>'
        return (
            f"<header><h1>{escape(report.graph)}</h1><p>{' '.join(badges)}</p>"
            f'<dl class="tiles">{shown}</dl>{failures}</header>'
        )

    def _fusions(self) -> str:
        if not self.report.fusions:
            return '<section id="fusions"><h2>Fusions</h2><p>Nothing in this graph was fused.</p></section>'
        groups: dict[tuple[str, str], list[Region]] = {}
        for region in self.marks.regions:
            groups.setdefault((region.fused.operator, region.fused.level), []).append(region)
        rows = []
        for (operator, level), regions in groups.items():
            notes = list(dict.fromkeys(note for region in regions for note in region.fused.notes))
            if not notes and level == "strict":
                notes = ["not at all"]
            rows.append(
                f'<tr class="{self.graph.kind(operator)}" id="{anchor(operator, level)}"><th scope="row">'
                f'<span class="swatch"></span><code>{escape(operator)}</code></th>'
                f'<td class="num">{len(regions):,}</td><td>{escape(level)}</td>'
                f"<td>{'<br>'.join(map(escape, notes))}</td><td>{self._places(regions)}</td></tr>"
            )
        heads = ("Operator", "Count", "Numerics", "How results may differ", "Where")
        return f'<section id="fusions"><h2>Fusions</h2>{_frame("Fusions", heads, rows, {1})}</section>'

    def _places(self, regions: Sequence[Region]) -> str:
        chips: dict[str, list[str]] = {}
        for region in regions:
            told = f"{counted(len(region.before or region.fused.nodes), 'node')} replaced"
            if region.into:
                told += f", became part of fusion {region.into}"
            chip = self._chip(f"r{region.number}", str(region.number), told)
            chips.setdefault(region.fused.source or "", []).append(chip)
        return _where(chips)

    def _chip(self, target: str, label: str, title: str, attributes: str = 'class="chip"') -> str:
        """A small link to a mark in the graph; plain text where the graph does not show it."""
        shown = target in self.graph.anchored
        start = f'<a href="#{target}"' if shown else "<span"
        return f'{start} {attributes} title="{escape(title)}">{escape(label)}</{"a" if shown else "span"}>'

    def _refusals(self) -> str:
        groups = self.report.refusals()
        if not groups:
            return ""
        number = {id(refusal): index for index, refusal in enumerate(self.report.refused)}
        rows = []
        for place, ((fusion, reason), refusals) in enumerate(groups.items()):
            details: dict[str, list[Refusal]] = {}
            for refusal in refusals:
                details.setdefault(refusal.detail, []).append(refusal)
            items = []
            for detail, instances in details.items():
                chips: dict[str, list[str]] = {}
                for refusal in instances:
                    index = number[id(refusal)]
                    told = f"{fusion}: {reason}" + (f" ({detail})" if detail else "")
                    chip = self._chip(f"m{index}", str(index + 1), told, f'class="chip near" id="why{index}"')
                    chips.setdefault(refusal.source or "", []).append(chip)
                items.append(f"<div>{escape(detail)}</div>{_where(chips)}")
            listed = "".join(items[:MOST_DETAILS])
            if items[MOST_DETAILS:]:
                rest = "".join(items[MOST_DETAILS:])
                listed += f"<details><summary>{len(items) - MOST_DETAILS:,} more</summary>{rest}</details>"
            rows.append(
                f'<tr id="near-{place}"><th scope="row"><code>{escape(fusion)}</code></th>'
                f'<td>{escape(reason)}</td><td class="num">{len(refusals):,}</td><td>{listed}</td></tr>'
            )
        heads = ("Fusion", "Why not", "Count", "Values and places")
        return f'<section id="near"><h2>Near misses</h2>{_frame("Near misses", heads, rows, {2})}</section>'

    def _numbers(self) -> str:
        drawn = [_numbers_table(table) for table in (operators_table(self.report), timing_table(self.report))]
        return f'<div class="duo">{"".join(drawn)}</div>' if any(drawn) else ""

    def _pictures(self) -> str:
        shapes: dict[object, list[Region]] = {}
        for region in self.marks.regions:
            if region.into is None and 0 < len(region.before) <= _picture.MOST_NODES:
                key = (region.fused.operator, _picture.shape(*self._lines(region)))
                shapes.setdefault(key, []).append(region)
        if not shapes:
            return ""
        figures = [self._figure(regions) for regions in list(shapes.values())[:MOST_PICTURES]]
        more = len(shapes) - len(figures)
        note = f'<p class="soft">{counted(more, "more shape")} not drawn.</p>' if more else ""
        return (
            f'<section id="shapes"><h2>What was replaced</h2><div class="pictures">{"".join(figures)}</div>'
            f"{note}</section>"
        )

    def _lines(self, region: Region) -> tuple[list[Line], list[Line]]:
        replaced = [self.before_by_name[name] for name in region.before]
        emitted = [self.after_by_name[name] for name in region.after if name in region.fused.emitted]
        return replaced, emitted

    def _figure(self, regions: Sequence[Region]) -> str:
        example = regions[0]
        operator = escape(example.fused.operator)
        inside = set(example.before)
        outside = (line for line in self.before_by_name.values() if line.name not in inside)
        outputs = inside & {name for line in outside for name in line.inputs}
        drawn = _picture.draw(*self._lines(example), example.fused.operator, outputs)
        link = self._chip(f"r{example.number}", str(example.number), "Show in the graph")
        return (
            f'<figure class="{self.graph.kind(example.fused.operator)}"><figcaption><code>{operator}</code> '
            f'<span class="soft">× {len(regions):,}, for example {link}</span></figcaption>'
            f'<div tabindex="0" role="region" aria-label="Picture of {operator}">{drawn}</div></figure>'
        )

    def _graph(self) -> str:
        if not self.stages:
            hint = "The code was not kept: set <code>dump_dir</code> or <code>TORCH_COMPILE_DEBUG=1</code>."
            return f'<section id="graph"><h2>Graph</h2><p class="soft">{hint}</p></section>'
        options = (
            ("all", "all lines"),
            ("marked", "fused and near misses"),
            ("fused", "fused"),
            ("near", "near misses"),
        )
        chosen = "".join(f'<option value="{value}">{label}</option>' for value, label in options)
        first, last = escape(self.stages[0][0]), escape(self.stages[-1][0])
        # The listing is written before the map: the map links only to what the listing shows.
        listing = self.graph.side_by_side(self.before, self.after)
        return (
            '<section id="graph"><h2>Graph</h2><div class="tools" role="search">'
            '<input type="search" id="search" placeholder="Search  ( / )" aria-label="Search the graph">'
            f'<select id="show" aria-label="Lines to show">{chosen}</select>'
            '<button type="button" id="previous" title="Key p">‹ previous</button>'
            '<button type="button" id="next" title="Key n">next fusion ›</button>'
            '<output id="found" for="search show"></output></div>'
            f"{self.graph.map(self.before)}"
            f'<div class="heads"><span>{first}</span><span>{last}</span></div>{listing}</section>'
        )

    def _between(self) -> str:
        if len(self.stages) < 3:
            return ""
        shown = []
        for (_, left), (name, right) in zip(self.stages, self.stages[1:], strict=False):
            removed, added, listing = self.graph.changes(left, right)
            told = f"{counted(removed, 'line')} out, {counted(added, 'line')} in" if listing else "no change"
            shown.append(
                f'<details class="stage"><summary><b>{escape(name)}</b>: {told}</summary>{listing}</details>'
            )
        return f'<section id="stages"><h2>Stage by stage</h2>{"".join(shown)}</section>'


def _frame(label: str, heads: Sequence[str], rows: Sequence[str], numeric: Collection[int]) -> str:
    """A table that scrolls sideways on its own where the window is narrow."""
    cells = "".join(
        f'<th scope="col"{" class=num" if column in numeric else ""}>{escape(head)}</th>'
        for column, head in enumerate(heads)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _numbers_table(table: Table) -> str:
    if not table.rows:
        return ""
    rows = []
    for first, *rest in table.rows:
        cells = "".join(f'<td class="num">{escape(cell)}</td>' for cell in rest)
        rows.append(f'<tr><th scope="row"><code>{escape(first)}</code></th>{cells}</tr>')
    title = escape(table.title)
    return f"<section><h2>{title}</h2>{_frame(table.title, table.heads, rows, table.numeric)}</section>"


def _where(chips: Mapping[str, Sequence[str]]) -> str:
    items = []
    for source, links in chips.items():
        place = (
            f'<code class="soft" title="{escape(source)}">{escape(short_source(source))}</code> '
            if source
            else ""
        )
        items.append(f"<li>{place}{''.join(links)}</li>")
    first = f'<ul class="where">{"".join(items[:MOST_PLACES])}</ul>'
    if not items[MOST_PLACES:]:
        return first
    rest = f'<ul class="where">{"".join(items[MOST_PLACES:])}</ul>'
    return f"{first}<details><summary>{len(items) - MOST_PLACES:,} more places</summary>{rest}</details>"
