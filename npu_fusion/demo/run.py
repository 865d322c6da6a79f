"""The main job, end to end, on this machine's CPU: what ``make demo`` runs.

A trained byte-level Llama is quantized to W8A8, its gate and up projections are merged once, and it is
compiled with npu_fusion. Shown: every fusion, the operators before and after, the loss in floating point,
W8A8 eager and W8A8 fused, how far the fused result is from the eager one, and what the passes cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import npu_fusion
from npu_fusion import _compat
from npu_fusion.demo.corpus import evaluation_text
from npu_fusion.demo.model import context_length, evaluate_loss, facts, generate, load_byte_llama
from npu_fusion.quantization import quantize_linears

PROMPT = b"def median(values):\n    "
# A part of the held-out text with both prose and code, long enough for a loss that means something.
EVALUATED = slice(100_000, 104_096)
OPERATOR = "npu_dequant_swiglu_quant"


@dataclass(frozen=True)
class Result:
    """What the demo measured."""

    loss_float: float
    loss_w8a8: float
    loss_fused: float
    largest_difference: float
    """Of the logits, fused against eager, on one window."""
    seconds_capture: float
    seconds_passes: float
    report: npu_fusion.FusionReport


def run(host: str = "auto", dump_dir: str = "npu_fusion_dump", length: int = 160) -> Result:
    """Run the demo and print it; returns what was measured."""
    console = Console()
    # The model is tiny: more threads only wait for each other.
    torch.set_num_threads(1)
    console.rule("[bold]npu_fusion demo[/]: a W8A8 Llama on fused operators, on the CPU")
    with _step(console, "load the trained model and measure its loss in float32"):
        model = load_byte_llama()
        text = evaluation_text()[EVALUATED]
        loss_float = evaluate_loss(model, text)
    training = facts()["training"]
    console.print(
        f"  {training['parameters']:,} parameters, trained on {training['bytes_seen']:,} bytes of Python "
        f"source by [italic]{training['command']}[/]"
    )
    with _step(console, "quantize the linears to W8A8 and merge gate and up"):
        replaced = quantize_linears(model)
        prepared = npu_fusion.prepare(model)
    console.print(f"  {len(replaced)} linears to int8; {prepared}")
    window = torch.tensor([list(text[: context_length()])])
    with _step(console, "measure W8A8 eager"), torch.no_grad():
        loss_w8a8 = evaluate_loss(model, text)
        eager_logits = model(window).logits

    backend = npu_fusion.get_npu_backend(
        host=host,
        fusion_config={"dump_dir": dump_dir, "expect": {OPERATOR: model.config.num_hidden_layers}},
    )
    compiled = torch.compile(model, backend=backend, dynamic=True)
    started = time.perf_counter()
    with _step(console, f"compile with npu_fusion, host {backend.host}"), _no_caches(), torch.no_grad():
        fused_logits = compiled(window).logits
    total = time.perf_counter() - started
    report = backend.reports[0]
    capture = report.began - started
    difference = float((fused_logits - eager_logits).abs().max())
    with _step(console, "measure W8A8 fused"):
        loss_fused = evaluate_loss(compiled, text)

    _show_layers(console, report)
    report.print(console)
    _show_numbers(
        console,
        [
            ("loss, float32", f"{loss_float:.4f} nats per byte"),
            ("loss, W8A8 eager", f"{loss_w8a8:.4f}"),
            ("loss, W8A8 fused", f"{loss_fused:.4f}"),
            (
                "largest difference of logits, fused against eager",
                f"{difference:.2e} (largest logit {float(eager_logits.abs().max()):.1f})",
            ),
            ("capture (tracing the model)", f"{capture:.2f} s"),
            ("npu_fusion passes", f"{report.seconds:.3f} s = {report.seconds / capture:.1%} of capture"),
            ("all of the compilation", f"{total:.1f} s"),
            ("graphs before and after", str(report.dump_dir)),
            ("open in a browser", str(Path(str(report.dump_dir)) / "report.html")),
        ],
    )
    _show_text(console, compiled, length)
    if len(backend.reports) > 1:
        console.print(f"  ({len(backend.reports)} graphs were compiled; the first is shown)")
    return Result(loss_float, loss_w8a8, loss_fused, difference, capture, report.seconds, report)


@contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
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
def _no_caches() -> Iterator[None]:
    """Compile for real, so that the times shown are those of a first compilation."""
    from torch._inductor import config

    with config.patch(fx_graph_cache=False), _compat.without_compile_caches():
        yield


def _show_layers(console: Console, report: npu_fusion.FusionReport) -> None:
    table = Table(title="Every fusion, in the order of the graph", title_justify="left")
    for column in ("operator", "replaces", "numerics", "source"):
        table.add_column(column)
    for fusion in report.fusions:
        where = fusion.source.rpartition("/")[2] if fusion.source else ""
        style = "bold" if fusion.operator == OPERATOR else None
        table.add_row(fusion.operator, f"{len(fusion.nodes)} nodes", fusion.level, where, style=style)
    console.print(table)


def _show_numbers(console: Console, rows: list[tuple[str, str]]) -> None:
    table = Table(title="Measured", title_justify="left", show_header=False)
    for what, value in rows:
        table.add_row(what, value)
    console.print(table)


def _show_text(console: Console, model: Callable[..., Any], length: int) -> None:
    written = bytearray()
    columns = (TextColumn("generate with the fused model"), "{task.completed}/{task.total} bytes")
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=length)

        def on_byte(byte: int) -> None:
            written.append(byte)
            progress.advance(task)

        generate(model, PROMPT, length, temperature=0.7, on_byte=on_byte)
    text = Text(PROMPT.decode(), style="dim") + Text(written.decode(errors="replace"))
    console.print(Panel(text, title="written by the fused W8A8 model", title_align="left"))
