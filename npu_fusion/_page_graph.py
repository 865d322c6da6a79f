"""The listings of the HTML report: graph before and after side by side, what a stage changed, and the map."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from itertools import groupby

from npu_fusion._listing import Block, Line, align
from npu_fusion._marks import Marks, Region
from npu_fusion._page_assets import HUES
from npu_fusion._report_text import counted
from npu_fusion.report import FusionReport

CONTEXT = 3
"""Unmarked lines that stay visible next to a marked or changed one."""
SMALLEST_FOLD = 6


def anchor(operator: str, level: str) -> str:
    """The id of an operator's row in the table of fusions."""
    return "op-" + re.sub(r"\W", "-", f"{operator}-{level}")


class GraphView:
    """Writes listings of one report and remembers in ``anchored`` which marks (``r12``, ``m3``) they show."""

    def __init__(self, report: FusionReport, marks: Marks) -> None:
        self.marks = marks
        self.anchored: set[str] = set()
        operators = dict.fromkeys(fused.operator for fused in report.fusions)
        self._kinds = {operator: f"k{index % len(HUES)}" for index, operator in enumerate(operators)}
        rows = {key: index for index, key in enumerate(report.refusals())}
        self._near = [
            (rows[r.fusion, r.reason], f"{r.fusion}: {r.reason}" + (f" ({r.detail})" if r.detail else ""))
            for r in report.refused
        ]

    def kind(self, operator: str) -> str:
        """The CSS class that carries the operator's colour."""
        return self._kinds[operator]

    def side_by_side(self, before: Sequence[Line], after: Sequence[Line]) -> str:
        parts = []
        for block in align(before, after):
            parts.append(
                self._same(block) if block.same else self._pair(block.left, block.right, "pair diff")
            )
        return f'<div class="code">{"".join(parts)}</div>'

    def changes(self, left: Sequence[Line], right: Sequence[Line]) -> tuple[int, int, str]:
        """How many lines a stage took out and put in, and the listing of both (empty without a change)."""
        removed = added = 0
        items = []
        for block in align(left, right):
            if block.same:
                changed = [
                    (a, b) for a, b in zip(block.left, block.right, strict=True) if _text(a) != _text(b)
                ]
                out, new = [a for a, _ in changed], [b for _, b in changed]
            else:
                out, new = list(block.left), list(block.right)
            removed, added = removed + len(out), added + len(new)
            items += [f'<li class="del">{_text(line)}</li>' for line in out]
            items += [f'<li class="add">{_text(line)}</li>' for line in new]
        listing = f'<div class="code"><ol>{"".join(items)}</ol></div>' if items else ""
        return removed, added, listing

    def map(self, before: Sequence[Line]) -> str:
        """A strip with every fused node of the graph at its place, near misses below; empty without any."""
        lines = [line for line in before if line.name]
        bars = []
        run: tuple[Region, int] | None = None
        for place, line in enumerate([*lines, None]):
            region = self.marks.before.get(line.name) if line and not line.graph else None
            if run and run[0] is not region:
                bars.append(self._bar(run[0], run[1], place))
                run = None
            if region and not run:
                run = (region, place)
        ticks = "".join(
            f'<rect class="near" x="{place}" y="21" width="1" height="5"/>'
            for place, line in enumerate(lines)
            if not line.graph and line.name in self.marks.near_before
        )
        if not bars and not ticks:
            return ""
        label = (
            "Where in the graph, from first to last node, the fusions lie (above) and the near misses (below)"
        )
        return (
            f'<svg class="map" viewBox="0 0 {len(lines)} 26" preserveAspectRatio="none" role="img" '
            f'aria-label="{label}"><title>{label}</title>{"".join(bars)}{ticks}</svg>'
        )

    def _bar(self, region: Region, start: int, end: int) -> str:
        title = escape(f"{region.number}: {region.fused.operator}")
        return (
            f'<a class="{self.kind(region.fused.operator)}" href="#r{region.number}" tabindex="-1">'
            f'<rect x="{start}" y="0" width="{end - start}" height="18"><title>{title}</title></rect></a>'
        )

    def _same(self, block: Block) -> str:
        """Common nodes: both sides near what is marked or changed, the long stretches between folded."""
        parts = []
        for visible, run in groupby(range(len(block.left)), self._visible(block).__getitem__):
            places = list(run)
            stretch = slice(places[0], places[-1] + 1)
            left, right = block.left[stretch], block.right[stretch]
            if visible or len(places) < SMALLEST_FOLD:
                parts.append(self._pair(left, right, "pair both" if _equal(left, right) else "pair"))
            else:
                parts.append(self._fold(left, right))
        return "".join(parts)

    def _visible(self, block: Block) -> list[bool]:
        size = len(block.left)
        centres = [-1, size] + [index for index, line in enumerate(block.left) if self._marked(line)]
        visible = [False] * size
        for centre in centres:
            start, end = max(0, centre - CONTEXT), min(size, centre + CONTEXT + 1)
            visible[start:end] = [True] * (end - start)
        return visible

    def _fold(self, left: Sequence[Line], right: Sequence[Line]) -> str:
        same = _equal(left, right)
        content = f"<ol>{self._list(left, True)}</ol>" if same else self._pair(left, right, "pair")
        told = f"{counted(len(left), 'line')}{'' if same else ', inputs differ'}"
        return f"<details><summary>⋯ {told}</summary>{content}</details>"

    def _pair(self, left: Sequence[Line], right: Sequence[Line], style: str) -> str:
        # What is equal on both sides is left to the left on narrow screens, unless it is marked on the right.
        if style == "pair both" and any(self.marks.after.get(line.name) for line in right):
            style = "pair"
        lists = f"<ol>{self._list(left, True)}</ol><ol>{self._list(right, False)}</ol>"
        # --n lets the browser reserve the height of what it has not laid out yet.
        return f'<div class="{style}" style="--n:{max(len(left), len(right))}">{lists}</div>'

    def _list(self, lines: Sequence[Line], is_before: bool) -> str:
        return "".join(self._item(line, is_before) for line in lines)

    def _item(self, line: Line, is_before: bool) -> str:
        own = not line.graph and line.name
        owners, nears = (
            (self.marks.before, self.marks.near_before)
            if is_before
            else (self.marks.after, self.marks.near_after)
        )
        region = owners.get(line.name) if own else None
        near = nears.get(line.name, []) if own else []
        if not region and not near:
            return f"<li>{_text(line)}</li>"
        styles, data, tags = [], "", ""
        if region:
            styles += ["f", self.kind(region.fused.operator)]
            data += f' data-r="{region.number}"'
            tags += self._tag(region)
        if near:
            styles.append("n")
            data += f' data-m="{" ".join(map(str, near))}"'
            tags += self._near_tags(near)
        return f'<li class="{" ".join(styles)}"{data}>{tags}{_text(line)}</li>'

    def _tag(self, region: Region) -> str:
        """The label of a region, on its first line only."""
        key = f"r{region.number}"
        if key in self.anchored:
            return ""
        self.anchored.add(key)
        fused = region.fused
        href = anchor(fused.operator, fused.level)
        return f'<a class="tag" id="{key}" href="#{href}">{region.number} {escape(fused.operator)}</a>'

    def _near_tags(self, near: Sequence[int]) -> str:
        new = [index for index in near if f"m{index}" not in self.anchored]
        if not new:
            return ""
        self.anchored.update(f"m{index}" for index in new)
        first, *rest = new
        why = escape("\n".join(self._near[index][1] for index in new))
        label = "near miss" if not rest else f"near miss ×{len(new)}"
        marks = "".join(f'<span id="m{index}"></span>' for index in rest)
        href = f"near-{self._near[first][0]}"
        return f'<a class="tag near" id="m{first}" href="#{href}" title="{why}">{label}</a>{marks}'

    def _marked(self, line: Line) -> bool:
        marks = self.marks
        found = (marks.before, marks.after, marks.near_before, marks.near_after)
        return not line.graph and any(line.name in names for names in found)


def _equal(left: Sequence[Line], right: Sequence[Line]) -> bool:
    return all(_text(a) == _text(b) for a, b in zip(left, right, strict=True))


def _text(line: Line) -> str:
    """One line as HTML: comment, name, type, and the expression with its operator set off."""
    if line.comment:
        return f"<em>{escape(line.comment)}</em><span>{_text(replace(line, comment=''))}</span>"
    if not line.name or line.name == "output":
        return escape(line.code)
    kind = f" <i>{escape(line.type)}</i>" if line.type else ""
    name = f"<b>{escape(line.name)}</b>{kind}"
    if not line.code:
        return name
    operator, bracket, rest = line.code.partition("(")
    shown = f"<u>{escape(operator)}</u>" if bracket else escape(operator)
    return f"{name} = {shown}{escape(bracket + rest)}"
