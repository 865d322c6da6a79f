"""The main job, end to end, on this machine's CPU: what ``make demo`` runs.

A trained byte-level Llama is quantized to W8A8, its gate and up projections are merged once, and it is
compiled with npu_fusion. Shown: every fusion, the operators before and after, the loss in floating point,
W8A8 eager and W8A8 fused, how far the fused result is from the eager one, and what the passes cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn

import npu_fusion
from npu_fusion.demo import _show
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
    with _show.step(console, "load the trained model and measure its loss in float32"):
        model = load_byte_llama()
        text = evaluation_text()[EVALUATED]
        loss_float = evaluate_loss(model, text)
    _show.origin(console, facts()["training"])
    with _show.step(console, "quantize the linears to W8A8 and merge gate and up"):
        replaced = quantize_linears(model)
        prepared = npu_fusion.prepare(model)
    console.print(f"  {len(replaced)} linears to int8; {prepared}")
    window = torch.tensor([list(text[: context_length()])])
    with _show.step(console, "measure W8A8 eager"), torch.no_grad():
        loss_w8a8 = evaluate_loss(model, text)
        eager_logits = model(window).logits

    backend = npu_fusion.get_npu_backend(
        host=host,
        fusion_config={"dump_dir": dump_dir, "expect": {OPERATOR: model.config.num_hidden_layers}},
    )
    compiled = torch.compile(model, backend=backend, dynamic=True)
    started = time.perf_counter()
    compiling = f"compile with npu_fusion, host {backend.host}"
    with _show.step(console, compiling), _show.no_caches(), torch.no_grad():
        fused_logits = compiled(window).logits
    total = time.perf_counter() - started
    report = backend.reports[0]
    capture = report.began - started
    difference = float((fused_logits - eager_logits).abs().max())
    with _show.step(console, "measure W8A8 fused"):
        loss_fused = evaluate_loss(compiled, text)

    _show.fusions(console, report, {OPERATOR})
    _show.numbers(
        console,
        [
            ("loss, float32", f"{loss_float:.4f} nats per byte"),
            ("loss, W8A8 eager", f"{loss_w8a8:.4f}"),
            ("loss, W8A8 fused", f"{loss_fused:.4f}"),
            (
                "largest difference of logits, fused against eager",
                f"{difference:.2e} (largest logit {float(eager_logits.abs().max()):.1f})",
            ),
            *_show.compilation(report, capture, total),
        ],
    )
    written = _written(console, compiled, length)
    _show.written(console, "written by the fused W8A8 model", PROMPT, written)
    _show.other_graphs(console, backend.reports)
    return Result(loss_float, loss_w8a8, loss_fused, difference, capture, report.seconds, report)


def _written(console: Console, model: Callable[..., Any], length: int) -> bytes:
    columns = (TextColumn("generate with the fused model"), "{task.completed}/{task.total} bytes")
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=length)
        return generate(model, PROMPT, length, temperature=0.7, on_byte=lambda _: progress.advance(task))
