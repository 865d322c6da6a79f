"""What the demos print, and the conditions under which they measure."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import npu_fusion
from npu_fusion import _compat

Rows = list[tuple[str, str]]


@contextmanager
def step(console: Console, what: str) -> Iterator[None]:
    """Show that something is going on, and for how long."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        progress.add_task(what)
        started = time.perf_counter()
        yield
    console.print(f"[green]✓[/] {what} [dim]({time.perf_counter() - started:.1f} s)[/]")


@contextmanager
def no_caches() -> Iterator[None]:
    """Compile for real, so that the times shown are those of a first compilation."""
    from torch._inductor import config

    with config.patch(fx_graph_cache=False), _compat.without_compile_caches():
        yield


def origin(console: Console, training: dict[str, Any]) -> None:
    """Where a trained model comes from."""
    console.print(
        f"  {training['parameters']:,} parameters, trained on {training['bytes_seen']:,} bytes of Python "
        f"source by [italic]{training['command']}[/]"
    )


def fusions(console: Console, report: npu_fusion.FusionReport, highlighted: Collection[str]) -> None:
    """Every fusion, then the report; the operators ``highlighted`` in bold."""
    table = Table(title="Every fusion, in the order of the graph", title_justify="left")
    for column in ("operator", "replaces", "numerics", "source"):
        table.add_column(column)
    for fusion in report.fusions:
        where = fusion.source.rpartition("/")[2] if fusion.source else ""
        style = "bold" if fusion.operator in highlighted else None
        table.add_row(fusion.operator, f"{len(fusion.nodes)} nodes", fusion.level, where, style=style)
    console.print(table)
    report.print(console)


def compilation(report: npu_fusion.FusionReport, capture: float, total: float) -> Rows:
    """What compiling took, and where its graphs are."""
    return [
        ("capture (tracing the model)", f"{capture:.2f} s"),
        ("npu_fusion passes", f"{report.seconds:.3f} s = {report.seconds / capture:.1%} of capture"),
        ("all of the compilation", f"{total:.1f} s"),
        ("graphs before and after", str(report.dump_dir)),
        ("open in a browser", str(Path(str(report.dump_dir)) / "report.html")),
    ]


def numbers(console: Console, rows: Rows) -> None:
    table = Table(title="Measured", title_justify="left", show_header=False)
    for what, value in rows:
        table.add_row(what, value)
    console.print(table)


def written(console: Console, title: str, prompt: bytes, text: bytes) -> None:
    """A prompt and what a model wrote after it."""
    shown = Text(prompt.decode(errors="replace"), style="dim") + Text(text.decode(errors="replace"))
    console.print(Panel(shown, title=title, title_align="left"))


def other_graphs(console: Console, reports: Collection[npu_fusion.FusionReport]) -> None:
    if len(reports) > 1:
        console.print(f"  ({len(reports)} graphs were compiled; the first is shown)")
