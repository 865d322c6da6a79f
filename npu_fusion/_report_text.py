"""A FusionReport for the terminal: one set of tables, drawn as plain text or by rich."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npu_fusion.report import FusionReport

NARROWEST = 60
GAP = "  "
SENTENCE = 16
"""Narrower than this, a sentence is harder to read than a broken path."""


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of cells; ``numeric`` columns are aligned to the right."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()


def duration(seconds: float) -> str:
    """``0.00042`` -> ``0.42 ms``, ``1.5`` -> ``1.50 s``."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """``counted(2, "near miss", "near misses")`` -> ``2 near misses``."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def summary(report: FusionReport) -> str:
    """The report in one line."""
    found = "would be made" if report.dry_run else "made"
    parts = [
        f"{counted(len(report.fusions), 'fusion')} {found}",
        counted(len(report.refused), "near miss", "near misses"),
        duration(report.seconds),
    ]
    if report.failures:
        parts.insert(0, counted(len(report.failures), "failed pass", "failed passes"))
    if report.from_cache:
        parts.append("from the compile cache")
    host = f" for {report.host}" if report.host else ""
    return f"npu_fusion, {report.graph}{host}: {', '.join(parts)}"


def tables(report: FusionReport) -> list[Table]:
    """The tables that have anything to say."""
    found = [_fusions(report), _refusals(report), operators_table(report), timing_table(report)]
    return [table for table in found if table.rows]


def text(report: FusionReport, width: int) -> str:
    """Plain text, no line longer than ``width`` but where a single word is."""
    if width < NARROWEST:
        raise ValueError(f"FusionReport.text: width is {width}; accepted: {NARROWEST} or more")
    blocks = ["\n".join(textwrap.wrap(summary(report), width, break_long_words=False))]
    blocks += ["\n".join([table.title, *_draw(table, width)]) for table in tables(report)]
    blocks += _closing(report)
    return "\n\n".join(blocks)


def print_report(report: FusionReport, console: Any = None) -> None:
    """Rich tables on ``console`` (a ``rich.console.Console``, None: standard output); text without rich."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError:
        print(report.text())
        return
    console = console or Console()
    console.print(Text(summary(report), style="bold"))
    for table in tables(report):
        drawn = RichTable(title=table.title, title_justify="left", title_style="bold", header_style="dim")
        for column, head in enumerate(table.heads):
            right = column in table.numeric
            fixed = right or column == 0
            drawn.add_column(head, justify="right" if right else "left", no_wrap=fixed, overflow="fold")
        for row in table.rows:
            drawn.add_row(*map(Text, row))
        console.print(drawn)
    for line in _closing(report):
        console.print(Text(line))


def _fusions(report: FusionReport) -> Table:
    groups: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for fused in report.fusions:
        groups.setdefault((fused.operator, fused.level), []).append(fused.notes)
    rows = []
    for (operator, level), notes in groups.items():
        distinct = dict.fromkeys(note for instance in notes for note in instance)
        rows.append((operator, str(len(notes)), level, "; ".join(distinct)))
    title = "Fusions that would be made (dry run)" if report.dry_run else "Fusions"
    return _trimmed(Table(title, ("operator", "count", "numerics", "notes"), tuple(rows), frozenset({1})))


def _refusals(report: FusionReport) -> Table:
    rows = []
    for (fusion, reason), group in report.refusals().items():
        source = next((refusal.source for refusal in group if refusal.source), "")
        rows.append((fusion, reason, str(len(group)), group[0].detail, short_source(source)))
    heads = ("fusion", "reason", "count", "first detail", "first source")
    return _trimmed(Table("Near misses", heads, tuple(rows), frozenset({2})))


def short_source(source: str) -> str:
    """``file:line`` with the file's folder only: enough to know it; the full path is in JSON and HTML."""
    return "/".join(source.replace("\\", "/").split("/")[-2:])


def _trimmed(table: Table) -> Table:
    """Without the columns at the right end that have nothing in them."""
    end = len(table.heads)
    while end and not any(row[end - 1] for row in table.rows):
        end -= 1
    return replace(table, heads=table.heads[:end], rows=tuple(row[:end] for row in table.rows))


def operators_table(report: FusionReport) -> Table:
    """Operators whose count changed."""
    rows = []
    for operator in {**report.operators_before, **report.operators_after}:
        before = report.operators_before.get(operator, 0)
        after = report.operators_after.get(operator, 0)
        if before != after:
            rows.append((operator, str(before), str(after), f"{after - before:+d}"))
    heads = ("operator", "before", "after", "change")
    return Table("Operators that changed", heads, tuple(rows), frozenset({1, 2, 3}))


def timing_table(report: FusionReport) -> Table:
    """Time per stage."""
    rows = tuple((stage, duration(seconds)) for stage, seconds in report.timing.items())
    return Table("Time", ("stage", "time"), rows, frozenset({1}))


def _closing(report: FusionReport) -> list[str]:
    lines = [f"Failed and undone: {failure}" for failure in report.failures]
    if report.dump_dir:
        lines.append(f"Dump: {report.dump_dir}")
    return lines


def _draw(table: Table, width: int) -> list[str]:
    widths = _fit(table, width - len(GAP))
    rule = tuple("-" * size for size in widths)
    return [
        GAP + line.rstrip()
        for row in (table.heads, rule, *table.rows)
        for line in _draw_row(row, widths, table.numeric)
    ]


def _draw_row(row: Sequence[str], widths: Sequence[int], numeric: frozenset[int]) -> list[str]:
    cells = [
        textwrap.wrap(cell, size, break_on_hyphens=False) for cell, size in zip(row, widths, strict=True)
    ]
    lines = []
    for index in range(max(1, *map(len, cells))):
        parts = [cell[index] if index < len(cell) else "" for cell in cells]
        aligned = [
            part.rjust(size) if column in numeric else part.ljust(size)
            for column, (part, size) in enumerate(zip(parts, widths, strict=True))
        ]
        lines.append(GAP.join(aligned))
    return lines


def _fit(table: Table, width: int) -> list[int]:
    """Column widths: that of the content; sentences give way first, then names and paths, widest first."""
    columns = list(zip(table.heads, *table.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    smallest = [len(head) for head in table.heads]
    while sum(widths) + len(GAP) * (len(widths) - 1) > width:
        candidates = [c for c in range(len(widths)) if c not in table.numeric and widths[c] > smallest[c]]
        if not candidates:
            break
        sentences = [
            c for c in candidates if widths[c] > SENTENCE and any(" " in cell for cell in columns[c][1:])
        ]
        widths[max(sentences or candidates, key=lambda c: widths[c])] -= 1
    return widths
