"""What the Triton kernels cost on a GPU, beside eager, Inductor and the machine's limits.

::

    python -m benchmarks.gpu                                   all operators and sizes
    python -m benchmarks.gpu --operators dynamic_quant         some operators
    python -m benchmarks.gpu --tokens 1 4096 --widths 4096     some sizes
    python -m benchmarks.gpu --update docs/performance.md      put the tables into the document

The operators, the formulas beside them and their inputs are those of :mod:`npu_fusion.bench`. Times are the
device's, by CUDA events around one call. All calls for a size take turns, in an order that shifts from round
to round, and before each one a buffer larger than the second-level cache is written: every call finds its
inputs in memory, and the device is busy for so long that the host has the whole call ready when its turn
comes. So what a launch costs the host is not in these times; the columns *host* have that: the wall time of
one call of many that nobody waits for. Medians.

The bound is a device copy of as many bytes as the operator reads and writes together, or the matrix products
alone, each in its faster layout of the weight. What a size does not have (``torch._int_mm`` takes no fewer
than 17 rows on CUDA) is empty.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch.utils import _pytree as pytree

from npu_fusion.bench.cases import CASES
from npu_fusion.bench.measure import copy
from npu_fusion.bench.products import MATMULS, PROLOGS, Call
from npu_fusion.bench.show import duration
from npu_fusion.bench.table import Rows, update

MEMORY = (
    *("dequant_swiglu_quant", "dequant_swiglu_quant, static", "swiglu_quant", "dynamic_quant"),
    "add_rms_norm_dynamic_quant",
)
PROLOG = tuple(name for name in PROLOGS if "bfloat16" in name)
OPERATORS = (*MEMORY, *MATMULS, *PROLOG)
TOKENS, WIDTHS = (1, 16, 128, 2048, 4096, 16384), (1536, 4096, 9216)
PROLOG_TOKENS = (1, 8, 64, 1024)
SECONDS = 0.5
FEWEST_ROUNDS, MOST_ROUNDS = 7, 100
HOST_CALLS = 50
FLUSHED = 2**29
"""Bytes: ten times a large second-level cache, and more than 100 microseconds of any GPU's time."""

LARGE, OF_COPY = 4096, 0.85
"""From so many tokens on the memory-bound operators have this part of the speed of a copy."""

Calls = Mapping[str, Callable[[], object]]
Clock = Callable[[Callable[[], object]], Callable[[], float]]
"""Runs a call; what it returns gives the call's seconds, and may wait for them."""


class Events:
    """The clock of the device."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSHED, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object]) -> Callable[[], float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        call()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return seconds


def interleaved(
    calls: Calls, clock: Clock, seconds: float, rounds: tuple[int, int] = (FEWEST_ROUNDS, MOST_ROUNDS)
) -> dict[str, float]:
    """Median seconds of each call; they take turns for about ``seconds``, within these numbers of rounds."""
    for call in calls.values():
        clock(call)()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, ends = list(calls), time.perf_counter() + seconds
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() > ends:
            break
        pending = [(name, clock(calls[name])) for name in order]
        for name, elapsed in pending:
            taken[name].append(elapsed())
        order.append(order.pop(0))
    return {name: statistics.median(times) for name, times in taken.items()}


def host_seconds(call: Callable[[], object], wait: Callable[[], object]) -> float:
    """Wall time of a call whose result nobody waits for."""
    call()
    wait()
    began = time.perf_counter()
    for _ in range(HOST_CALLS):
        call()
    taken = time.perf_counter() - began
    wait()
    return taken / HOST_CALLS


@dataclass(frozen=True)
class Measured:
    """Median seconds of one operator at one size; None for what cannot run there."""

    operator: str
    tokens: int
    width: int | None
    fused: float
    fused_host: float
    eager: float | None
    inductor: float | None
    inductor_host: float | None
    bound: float | None

    @property
    def gain(self) -> float | None:
        return None if self.inductor is None else self.inductor / self.fused

    @property
    def of_bound(self) -> float | None:
        return None if self.bound is None else self.bound / self.fused


def measure(
    operator: str, tokens: int, width: int | None, clock: Clock, device: torch.device, seconds: float
) -> Measured:
    """Measure one operator; compilation and the choice of block sizes come before the clock."""
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    with torch.no_grad(), torch.device(device):
        made = make(operator, tokens, width, torch.Generator(device).manual_seed(0))
        torch._dynamo.reset()
        compiled = torch.compile(made.eager, dynamic=False, fullgraph=True)
        candidates: dict[str, Callable[[], object]] = {
            "fused": made.fused,
            "eager": lambda: made.eager(*made.args),
            "inductor": lambda: compiled(*made.args),
        }
        calls = {name: call for name, call in candidates.items() if name == "fused" or _runs(call)}
        bound = _bound(made, clock, seconds)
        if bound is not None:
            calls["bound"] = bound
        times = interleaved(calls, clock, seconds)
        hosts = {name: host_seconds(calls[name], wait) for name in ("fused", "inductor") if name in calls}
    return Measured(
        operator,
        tokens,
        width,
        fused=times["fused"],
        fused_host=hosts["fused"],
        eager=times.get("eager"),
        inductor=times.get("inductor"),
        inductor_host=hosts.get("inductor"),
        bound=times.get("bound"),
    )


def make(operator: str, tokens: int, width: int | None, random: torch.Generator) -> Call:
    """The calls of an operator, on the device of ``random`` (which has to be the default device)."""
    if operator in PROLOGS:
        return PROLOGS[operator](tokens, random)
    assert width is not None
    if operator in MATMULS:
        return MATMULS[operator](tokens, width, random)
    case = CASES[operator]
    inputs = case.inputs(tokens, width, random)
    return Call(lambda: case.fused(*inputs), case.eager, inputs, [])


def _nothing() -> None:
    """On the CPU nothing is pending when a call returns."""


def _runs(call: Callable[[], object]) -> bool:
    """Whether the libraries take these sizes."""
    try:
        call()
    except RuntimeError as error:
        if "_int_mm" in str(error) or "self.size(0)" in str(error):
            return False
        raise
    return True


def _bound(made: Call, clock: Clock, seconds: float) -> Callable[[], object] | None:
    if not made.products:
        tensors = [*made.args, *pytree.tree_leaves(made.fused())]
        return copy(made.args, sum(t.numel() * t.element_size() for t in tensors))
    chosen = []
    for layouts in made.products:
        able = {name: product for name, product in layouts.items() if _runs(product)}
        if not able:
            return None
        times = interleaved(able, clock, seconds / 4)
        chosen.append(able[min(times, key=lambda name: times[name])])

    def products() -> None:
        for product in chosen:
            product()

    return products


# -- tables -------------------------------------------------------------------------------------------


def tables(measured: Sequence[Measured], machine: Sequence[tuple[str, str]]) -> list[Rows]:
    """The machine, one table for what is bound by memory, one for what has products in it, and the goals."""
    memory = [m for m in measured if m.operator in MEMORY]
    products = [m for m in measured if m.operator not in MEMORY]
    shown = [
        Rows("machine", "Measured on", ("what", "value"), machine),
        _table("memory", "Bound by memory, microseconds", ("copy", "of copy"), memory),
        _table("products", "With matrix products, microseconds", ("products", "of products"), products),
        goals(measured),
    ]
    return [rows for rows in shown if rows.rows]


def _table(name: str, title: str, bound: tuple[str, str], measured: Sequence[Measured]) -> Rows:
    header = ("operator", "tokens", "width", "fused", "eager", "Inductor", bound[0], "x Inductor", bound[1])
    rows = []
    for m in measured:
        seconds = (m.fused, m.eager, m.inductor, m.bound, m.fused_host, m.inductor_host)
        *device, fused_host, inductor_host = (duration(s) for s in seconds)
        ratios = ("" if ratio is None else f"{ratio:.2f}" for ratio in (m.gain, m.of_bound))
        size = (str(m.tokens), str(m.width or ""))
        rows.append((m.operator, *size, *device, *ratios, fused_host, inductor_host))
    return Rows(name, title, (*header, "host", "host, Inductor"), rows)


def goals(measured: Sequence[Measured]) -> Rows:
    """The worst size of each operator against the goals."""
    rows = []
    for operator in dict.fromkeys(m.operator for m in measured):
        mine = [m for m in measured if m.operator == operator]
        gains = [(m.gain, m) for m in mine if m.gain is not None]
        shares = [(m.of_bound, m) for m in mine if operator in MEMORY and m.tokens >= LARGE]
        for what, goal, found in (
            ("times as fast as Inductor", 1.0, gains),
            ("of the speed of a copy", OF_COPY, [(share, m) for share, m in shares if share is not None]),
        ):
            if found:
                worst, m = min(found, key=lambda pair: pair[0])
                where = f"{worst:.2f} at {m.tokens}" + ("" if m.width is None else f" x {m.width}")
                rows.append((f"{operator}, {what}", f"{goal}", where, "yes" if worst >= goal else "no"))
    return Rows("goals", "Against the goals", ("what", "goal", "worst", "met"), rows)


# -- running it ---------------------------------------------------------------------------------------


def machine(device: torch.device, command: Sequence[str]) -> list[tuple[str, str]]:
    """What the numbers depend on."""
    properties = torch.cuda.get_device_properties(device)
    return [
        ("device", f"{properties.name}, {properties.multi_processor_count} multiprocessors"),
        ("versions", f"torch {torch.__version__}, triton {importlib.metadata.version('triton')}"),
        ("Python", platform.python_version()),
        ("command", f"`{' '.join(['python -m benchmarks.gpu', *command])}`"),
    ]


def sizes(operator: str, tokens: Sequence[int] | None, widths: Sequence[int]) -> list[tuple[int, int | None]]:
    """(tokens, width) of every row; ``tokens`` None: those of the operator."""
    if operator in PROLOGS:
        return [(count, None) for count in tokens or PROLOG_TOKENS]
    return [(count, width) for width in widths for count in tokens or TOKENS]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS, help="default: all")
    parser.add_argument(
        "--tokens", type=int, nargs="+", help=f"default: {TOKENS}, for prologs {PROLOG_TOKENS}"
    )
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help=f"default: {WIDTHS}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for a row; default: {SECONDS}")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--markdown", action="store_true", help="print Markdown")
    how.add_argument("--update", type=Path, metavar="FILE", help="replace the marked tables of this document")
    arguments = parser.parse_args(argv)
    for name in ("tokens", "widths"):
        for value in getattr(arguments, name) or ():
            if value < 1:
                parser.error(f"--{name} has {value}; accepted: 1 or more")
    if not torch.cuda.is_available():
        parser.error("there is no GPU: torch.cuda.is_available() is False; the CPU has benchmarks.kernels")
    device = torch.device("cuda", torch.cuda.current_device())
    clock, progress, measured = Events(device), Console(stderr=True), []
    for operator in arguments.operators:
        with progress.status(operator):
            for tokens, width in sizes(operator, arguments.tokens, arguments.widths):
                measured.append(measure(operator, tokens, width, clock, device, arguments.seconds))
    shown = tables(measured, machine(device, sys.argv[1:] if argv is None else argv))
    if arguments.update is not None:
        arguments.update.write_text(update(arguments.update.read_text(), "gpu", shown))
    elif arguments.markdown:
        print("\n\n".join(f"{rows.title}:\n\n{rows.markdown()}" for rows in shown))
    else:
        for rows in shown:
            rows.print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
