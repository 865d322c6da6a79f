"""What the pipeline costs on graphs of real size, beside one pattern of PyTorch's own matcher.

::

    python -m benchmarks.passes                                61 layers of every form; growth over 8 to 122
    python -m benchmarks.passes --forms npu --layers 8 61      less of it
    python -m benchmarks.passes --dynamic                      symbolic shapes (their capture takes minutes)
    python -m benchmarks.passes --markdown                     as Markdown
    python -m benchmarks.passes --update docs/performance.md   put the tables into the document

Every graph is captured and measured in a process of its own: the first run of the pipeline there is what a
user pays, imports included; the median is of runs on fresh copies of the graph, one run of everything that is
measured after the other. A garbage collection before each run, outside of the timing, leaves the pipeline no
debts of the capture to pay. Wall and processor time are both shown: on a busy machine they differ. The models
are those of :mod:`benchmarks.graphs`; all fusions are on (``relaxed`` ones for latent attention), and
nothing is kept for a report but its numbers.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, fx
from torch._inductor import pattern_matcher
from torch._inductor.virtualized import V

from benchmarks.graphs import FORMS, MLA, Captured, capture
from npu_fusion import FusionConfig, _compat
from npu_fusion.bench.table import Rows, update
from npu_fusion.passes import pipeline
from npu_fusion.quantization.modules.w8a8_linear import quantize_rows

DEPTH, LAYERS, REPEATS = 61, (8, 32, 61, 122), 5
GROWTH_FORM = "plain"
MOST_SECONDS = {"nothing": 0.2} | dict.fromkeys(MLA, 0.8)
MOST_SECONDS_ELSE, MOST_OF_CAPTURE, MOST_GROWTH = 0.5, 0.03, 1.25


@dataclass(frozen=True)
class Seconds:
    """Wall and processor time of some runs of the same thing."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def first(self) -> float:
        return self.wall[0]

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def least(self) -> float:
        return min(self.wall)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)


@dataclass(frozen=True)
class Cost:
    """What was measured on one graph."""

    form: str
    layers: int
    dynamic: bool
    nodes: int
    capture: float
    capture_cpu: float
    pipeline: Seconds
    fused: dict[str, int]
    unchanged: bool
    """Whether the graph is, node by node, the same object with the same content after the pipeline."""
    lint: Seconds
    deepcopy: Seconds
    collection: Seconds
    """A full garbage collection with this graph in memory."""
    pattern: str
    """The comparison: one pattern of ``register_replacement``; empty where there is nothing to find."""
    pattern_seconds: Seconds | None
    pattern_matches: int

    @property
    def name(self) -> str:
        return f"{self.form}, dynamic" if self.dynamic else self.form

    @property
    def of_capture(self) -> float:
        return self.pipeline.median / self.capture


def measure(form: str, layers: int, dynamic: bool = False, repeats: int = REPEATS) -> Cost:
    """Capture one graph and time the pipeline, the comparison and the yardsticks on copies of it."""
    captured = capture(form, layers, dynamic)
    clocks: dict[str, _Clock] = {
        name: _Clock() for name in ("pipeline", "lint", "deepcopy", "collection", "pattern")
    }
    pattern = _PATTERNS.get(form)
    matches = 0
    config = FusionConfig(strict=True, numerics="relaxed" if form in MLA else "accurate")
    for _ in range(repeats):
        gc.collect()
        with clocks["deepcopy"]:
            gm = copy.deepcopy(captured.gm)
        with clocks["collection"]:
            gc.collect()
        with clocks["lint"]:
            gm.graph.lint()
        before = _content(gm.graph)
        gc.collect()
        with clocks["pipeline"]:
            report = pipeline.run(gm.graph, config, decomposed=captured.decomposed)
        unchanged = _content(gm.graph) == before
        if pattern is not None:
            matches = _apply(pattern, captured, clocks["pattern"])
    return Cost(
        form=form,
        layers=layers,
        dynamic=dynamic,
        nodes=captured.nodes,
        capture=captured.seconds,
        capture_cpu=captured.cpu_seconds,
        pipeline=clocks["pipeline"].seconds(),
        fused=report.fused,
        unchanged=unchanged,
        lint=clocks["lint"].seconds(),
        deepcopy=clocks["deepcopy"].seconds(),
        collection=clocks["collection"].seconds(),
        pattern="" if pattern is None else pattern.name,
        pattern_seconds=None if pattern is None else clocks["pattern"].seconds(),
        pattern_matches=matches,
    )


class _Clock:
    """``with clock:`` adds one run."""

    def __init__(self) -> None:
        self.runs: list[tuple[float, float]] = []

    def __enter__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._began
        self.runs.append((time.perf_counter() - wall, time.process_time() - cpu))

    def seconds(self) -> Seconds:
        wall, cpu = zip(*self.runs, strict=True)
        return Seconds(wall, cpu)


def _content(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [
        (n, n.name, n.op, n.target, n.args, n.kwargs, tuple(n.users), sorted(n.meta)) for n in graph.nodes
    ]


# -- the comparison -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """What PyTorch's matcher is asked to do: ``search`` becomes ``replace``."""

    name: str
    search: Callable[..., Any]
    replace: Callable[..., Any]
    examples: Callable[[], list[Tensor]]


def _npu_search(q: Tensor, w: Tensor, channel: Tensor, token: Tensor) -> tuple[Tensor, ...]:
    product = torch.ops.npu.npu_quant_matmul(q, w, channel, pertoken_scale=token, output_dtype=torch.bfloat16)
    return torch.ops.npu.npu_dynamic_quant(torch.ops.npu.npu_swiglu(product))


def _npu_replace(q: Tensor, w: Tensor, channel: Tensor, token: Tensor) -> tuple[Tensor, ...]:
    product = torch.ops.npu.npu_quant_matmul(q, w, channel, output_dtype=torch.int32)
    return torch.ops.npu.npu_dequant_swiglu_quant(
        product, weight_scale=channel.float(), activation_scale=token, activate_left=True, quant_mode=1
    )


def _npu_examples() -> list[Tensor]:
    q, w = torch.zeros(4, 8, dtype=torch.int8), torch.zeros(8, 6, dtype=torch.int8)
    return [q, w, torch.ones(6, dtype=torch.bfloat16), torch.ones(4)]


def _quantize_replace(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = torch.ops.npu.npu_dynamic_quant(x)
    return q, scale.unsqueeze(-1)


def _quantize_examples() -> list[Tensor]:
    return [torch.ones(4, 8, dtype=torch.bfloat16)]


def _decomposed_search(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize_rows` with the constant as Inductor's own passes leave it."""
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    one = torch.full((), 1.0, dtype=torch.float32, device=x.device)
    q = (x / torch.where(scale == 0, one, scale)).round().clamp(-128, 127).to(torch.int8)
    return q, scale


_QUANTIZE = "quantization of rows"
_PATTERNS = {
    "npu": Pattern("quant_matmul, swiglu, dynamic_quant", _npu_search, _npu_replace, _npu_examples),
    "plain": Pattern(_QUANTIZE, quantize_rows, _quantize_replace, _quantize_examples),
    "inductor": Pattern(_QUANTIZE, _decomposed_search, _quantize_replace, _quantize_examples),
}


def _apply(pattern: Pattern, captured: Captured, clock: _Clock) -> int:
    """Register the pattern, and time it on a copy of the graph; returns the number of replacements."""
    matcher = pattern_matcher.PatternMatcherPass()
    how: dict[str, Any] = {} if captured.decomposed else {"get_decomp_fn": dict}
    pattern_matcher.register_replacement(
        pattern.search, pattern.replace, pattern.examples(), pattern_matcher.fwd_only, matcher, **how
    )
    gm = copy.deepcopy(captured.gm)
    gc.collect()
    with V.set_fake_mode(_compat.find_fake_mode(gm.graph)), clock:
        return int(matcher.apply(gm.graph))


# -- what it means ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """Least squares: seconds = start + per_layer * layers."""

    start: float
    per_layer: float
    growth: float
    """Seconds per layer from the largest but one to the largest graph, over those from the smallest to it."""


def fit(costs: Sequence[Cost]) -> Fit | None:
    """The line through the minima; None with less than three sizes."""
    points = sorted((c.layers, min(c.pipeline.cpu)) for c in costs)
    if len(points) < 3:
        return None
    slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
    (x0, y0), *_, (x1, y1), (x2, y2) = points
    return Fit(intercept, slope, ((y2 - y1) / (x2 - x1)) / ((y1 - y0) / (x1 - x0)))


def tables(depth: Sequence[Cost], growth: Sequence[Cost]) -> list[Rows]:
    """All tables: cost at one depth, the comparison, growth, limits."""
    result = [_cost_table(depth), _comparison(depth)]
    if growth:
        result.append(_growth_table(growth))
    result.append(_limits(depth, growth))
    return [rows for rows in result if rows.rows]


def _s(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"


def _cost_table(costs: Iterable[Cost]) -> Rows:
    return Rows(
        "cost",
        "The whole pipeline, in seconds",
        ("graph", "layers", "nodes", "fused", "capture", "first", "median", "min", "CPU", "of capture"),
        [
            (
                c.name,
                str(c.layers),
                f"{c.nodes:,}",
                str(sum(c.fused.values())),
                _s(c.capture),
                _s(c.pipeline.first),
                _s(c.pipeline.median),
                _s(c.pipeline.least),
                _s(c.pipeline.cpu_median),
                f"{c.of_capture:.1%}",
            )
            for c in costs
        ],
    )


def _comparison(costs: Iterable[Cost]) -> Rows:
    def row(c: Cost) -> Sequence[str]:
        ours = (_s(c.pipeline.median), str(sum(c.fused.values())))
        yardsticks = (_s(c.lint.median), _s(c.deepcopy.median), _s(c.collection.median))
        if c.pattern_seconds is None:
            return (c.name, *ours, "", "", "", "", *yardsticks)
        each = c.pattern_seconds.median / c.pattern_matches * 1e3 if c.pattern_matches else 0.0
        theirs = (_s(c.pattern_seconds.median), str(c.pattern_matches), f"{each:.1f}")
        return (c.name, *ours, c.pattern, *theirs, *yardsticks)

    return Rows(
        "comparison",
        "Beside one pattern of register_replacement and three yardsticks, medians in seconds",
        (
            "graph",
            "pipeline",
            "fused",
            "one pattern",
            "its time",
            "matches",
            "ms each",
            "lint",
            "deepcopy",
            "collection",
        ),
        [row(c) for c in costs],
    )


def _growth_table(costs: Iterable[Cost]) -> Rows:
    return Rows(
        "growth",
        "Growth with the number of layers, in seconds",
        ("layers", "nodes", "capture", "median", "min", "CPU min", "CPU ms per layer", "of capture"),
        [
            (
                str(c.layers),
                f"{c.nodes:,}",
                _s(c.capture),
                _s(c.pipeline.median),
                _s(c.pipeline.least),
                _s(min(c.pipeline.cpu)),
                f"{min(c.pipeline.cpu) / c.layers * 1e3:.2f}",
                f"{c.of_capture:.1%}",
            )
            for c in costs
        ],
    )


def _limits(depth: Iterable[Cost], growth: Sequence[Cost]) -> Rows:
    rows: list[Sequence[str]] = []

    def add(what: str, limit: str, measured: str, met: bool) -> None:
        rows.append((what, limit, measured, "yes" if met else "no"))

    for c in depth:
        most = MOST_SECONDS.get(c.form, MOST_SECONDS_ELSE)
        for what, seconds in (("median", c.pipeline.median), ("CPU", c.pipeline.cpu_median)):
            add(f"{c.name}, {what}", f"{most} s", f"{seconds:.3f} s", seconds <= most)
        first = c.pipeline.first
        add(f"{c.name}, first run", f"{most} s", f"{first:.3f} s", first <= most)
        if c.form == "nothing":
            same = c.unchanged and not c.fused
            add(f"{c.name}, the graph", "unchanged", "unchanged" if same else "changed", same)
        else:
            share = c.of_capture
            add(
                f"{c.name}, of the capture",
                f"{MOST_OF_CAPTURE:.0%}",
                f"{share:.1%}",
                share <= MOST_OF_CAPTURE,
            )
    line = fit(growth)
    if line is not None:
        text = f"{line.growth:.2f} ({line.start * 1e3:+.0f} ms {line.per_layer * 1e3:+.2f} ms per layer)"
        add("time per layer, large over small", f"{MOST_GROWTH}", text, line.growth <= MOST_GROWTH)
    return Rows("limits", "Against the limits", ("what", "limit", "measured", "met"), rows)


# -- running it ---------------------------------------------------------------------------------------


def measure_alone(form: str, layers: int, dynamic: bool, repeats: int) -> Cost:
    """:func:`measure` in a process of its own."""
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(1, get_context("spawn"), **one_thread) as alone:
        return alone.submit(measure, form, layers, dynamic, repeats).result()


@contextmanager
def _progress(what: str) -> Iterator[None]:
    console = Console(stderr=True)
    with console.status(what):
        began = time.perf_counter()
        yield
    console.print(f"{what}: {time.perf_counter() - began:.0f} s")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.passes", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="default: all")
    parser.add_argument("--depth", type=int, default=DEPTH, help=f"layers of these graphs; default: {DEPTH}")
    layers = " ".join(map(str, LAYERS))
    parser.add_argument(
        "--layers",
        type=int,
        nargs="*",
        default=LAYERS,
        help=f"for the growth of form {GROWTH_FORM!r}; none: leave it out; default: {layers}",
    )
    parser.add_argument("--dynamic", action="store_true", help="symbolic shapes instead of static ones")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"default: {REPEATS}")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--markdown", action="store_true", help="print Markdown")
    how.add_argument("--update", type=Path, metavar="FILE", help="replace the marked tables of this document")
    arguments = parser.parse_args(argv)
    for name, value in (("--depth", arguments.depth), ("--repeats", arguments.repeats)):
        if value < 1:
            parser.error(f"{name} is {value}; accepted: 1 or more")
    measured: dict[tuple[str, int], Cost] = {}
    wanted = [(form, arguments.depth) for form in arguments.forms]
    wanted += [(GROWTH_FORM, count) for count in arguments.layers]
    for form, count in dict.fromkeys(wanted):
        with _progress(f"{form}, {count} layers"):
            measured[form, count] = measure_alone(form, count, arguments.dynamic, arguments.repeats)
    shown = tables(
        [measured[form, arguments.depth] for form in arguments.forms],
        [measured[GROWTH_FORM, count] for count in sorted(arguments.layers)],
    )
    if arguments.update is not None:
        arguments.update.write_text(update(arguments.update.read_text(), "passes", shown))
    elif arguments.markdown:
        print("\n\n".join(f"{rows.title}:\n\n{rows.markdown()}" for rows in shown))
    else:
        console = Console(width=None if sys.stdout.isatty() else 160)
        for rows in shown:
            console.print(rows.rich())
    return 0


if __name__ == "__main__":
    sys.exit(main())
