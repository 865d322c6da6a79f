"""What the fused operators cost on the CPU, beside eager, Inductor and the machine's limits.

::

    python -m benchmarks.kernels                                  all operators and sizes, 1 and 2 threads
    python -m benchmarks.kernels --operators dynamic_quant        some operators
    python -m benchmarks.kernels --tokens 1 2048 --widths 4096    some sizes
    python -m benchmarks.kernels --reference                      with the reference kernels beside
    python -m benchmarks.kernels --update docs/performance.md     put the tables into the document

What is compared and how it is timed: :mod:`npu_fusion.bench.measure` and :mod:`npu_fusion.bench.timing`;
``npu-fusion bench`` is the short form.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from npu_fusion.bench.cases import CASES
from npu_fusion.bench.measure import Measured, measure
from npu_fusion.bench.products import MATMULS, PROLOGS
from npu_fusion.bench.show import disturbance, tables
from npu_fusion.bench.table import Rows, update

OPERATORS = (*CASES, *MATMULS, *PROLOGS)
TOKENS, WIDTHS, THREADS = (1, 16, 128, 2048), (1536, 4096, 9216), (1, 2)
PROLOG_TOKENS = (1, 8, 64)
SECONDS = 1.0


def sizes(operator: str, tokens: Sequence[int] | None, widths: Sequence[int]) -> list[tuple[int, int | None]]:
    """(tokens, width) of every row; ``tokens`` None: those of the operator."""
    if operator in PROLOGS:
        return [(count, None) for count in tokens or PROLOG_TOKENS]
    return [(count, width) for width in widths for count in tokens or TOKENS]


def measure_all(
    operators: Sequence[str],
    tokens: Sequence[int] | None,
    widths: Sequence[int],
    threads: Sequence[int],
    seconds: float,
    reference: bool,
) -> list[Measured]:
    found = []
    before = torch.get_num_threads()
    progress = Console(stderr=True)
    try:
        for count in threads:
            torch.set_num_threads(count)
            for operator in operators:
                with progress.status(f"{operator}, {count} threads"):
                    for rows, width in sizes(operator, tokens, widths):
                        found.append(measure(operator, rows, width, seconds, reference=reference))
    finally:
        torch.set_num_threads(before)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS, help="default: all")
    parser.add_argument(
        "--tokens", type=int, nargs="+", help=f"default: {TOKENS}, for prologs {PROLOG_TOKENS}"
    )
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help=f"default: {WIDTHS}")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS, help=f"default: {THREADS}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for a row; default: {SECONDS}")
    parser.add_argument("--reference", action="store_true", help="measure the reference kernels, too")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--markdown", action="store_true", help="print Markdown")
    how.add_argument("--update", type=Path, metavar="FILE", help="replace the marked tables of this document")
    arguments = parser.parse_args(argv)
    for name in ("tokens", "widths", "threads"):
        for value in getattr(arguments, name) or ():
            if value < 1:
                parser.error(f"--{name} has {value}; accepted: 1 or more")
    for width in arguments.widths:
        if width % 128:
            parser.error(f"--widths has {width}; accepted: multiples of 128")
    measured = measure_all(
        arguments.operators,
        arguments.tokens,
        arguments.widths,
        arguments.threads,
        arguments.seconds,
        arguments.reference,
    )
    show(tables(measured), arguments.update, arguments.markdown)
    Console(stderr=True).print(disturbance(measured))
    return 0


def show(shown: Sequence[Rows], document: Path | None, markdown: bool) -> None:
    if document is not None:
        document.write_text(update(document.read_text(), "kernels", shown))
    elif markdown:
        print("\n\n".join(f"{rows.title}:\n\n{rows.markdown()}" for rows in shown))
    else:
        for rows in shown:
            rows.print()


if __name__ == "__main__":
    sys.exit(main())
