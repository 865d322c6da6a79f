"""``npu-fusion bench``: what the kernels cost on this machine, in less than a minute."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

import torch

from npu_fusion import _compat
from npu_fusion._cli_model import UsageError

TOKENS, WIDTH, SECONDS = (1, 128, 2048), 4096, 0.4


def add_command(commands: Any) -> None:
    """Add it to the subparsers of the command line."""
    bench = commands.add_parser(
        "bench",
        help="time the CPU kernels of the fused operators beside eager, Inductor and the machine's limits",
        description="Times some fused operators on this machine's CPU. Beside each: the same formula in "
        "plain PyTorch, eager and compiled by Inductor, and what bounds it: a copy of as much memory, or its "
        "matrix product alone. Takes less than a minute; the long form is python -m benchmarks.kernels, in a "
        "checkout.",
    )
    bench.add_argument("--threads", type=int, help="default: as many as torch uses")
    bench.add_argument("--json", action="store_true", help="print the numbers as JSON, in seconds")
    bench.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from npu_fusion.bench.measure import measure
    from npu_fusion.bench.products import K_N, MATMULS
    from npu_fusion.bench.show import disturbance, tables

    threads = arguments.threads if arguments.threads is not None else torch.get_num_threads()
    if threads < 1:
        raise UsageError(f"--threads is {threads}; accepted: 1 or more")
    matmul = next(name for name in MATMULS if name.endswith(K_N))
    operators = ("dequant_swiglu_quant", "dynamic_quant", "add_rms_norm_dynamic_quant", matmul)
    missing = _compat.why_no_inductor()
    if missing is not None:
        print(f"npu-fusion bench: the column of Inductor is empty: {missing}", file=sys.stderr)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        measured = [measure(name, tokens, WIDTH, SECONDS) for name in operators for tokens in TOKENS]
    finally:
        torch.set_num_threads(before)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(m) for m in measured], indent=2))
    else:
        for rows in tables(measured):
            rows.print()
        print(disturbance(measured))
    return 0
