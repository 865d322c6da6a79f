"""What lowering to GE costs, and what it gives, with the fusions and without; offline, by the real torchair.

::

    npu-fusion offline-setup
    python -m npu_fusion.hosts.offline -- python -m benchmarks.lowering                     8 and 61 layers

The Llamas of :mod:`benchmarks.graphs` (``npu``: written with torch_npu's operators; ``plain``: quantized by
this package) are compiled with every fusion off and on, one after the other, ``REPEATS`` times; medians, in
seconds. *torchair* is the time from the pipeline's end to that of the lowering: torchair's own passes and the
conversion of every node. *GE operators* are those of the lowered graph but constants and inputs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchair

import npu_fusion
from benchmarks.graphs import build
from npu_fusion.config import fusion_flags
from npu_fusion.hosts.offline._child import ge_operators

FORMS, LAYERS, REPEATS = ("npu", "plain"), (8, 61), 3
_UNCOUNTED = ("Const", "Data", "NetOutput")


@dataclass(frozen=True)
class Lowered:
    """One compilation; seconds."""

    passes: float
    torchair: float
    operators: int


def lowered(model: torch.nn.Module, args: tuple[Any, ...], fused: bool) -> Lowered | str:
    """Compile once; the last line of the error if that is not possible."""
    torch._dynamo.reset()
    flags = {} if fused else dict.fromkeys(fusion_flags(), False)
    ended: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = torchair.CompilerConfig()
        settings.debug.graph_dump.type = "pbtxt"
        settings.debug.graph_dump.path = folder
        backend = npu_fusion.get_npu_backend(settings, flags)

        def timed(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            compiled = backend(gm, inputs)
            ended.append(time.perf_counter())
            return compiled

        try:
            with torch.no_grad():
                torch.compile(model, backend=timed)(*args)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            return next(line for line in str(error.inner_exception).splitlines() if "Error: " in line)
        (report,) = backend.reports
        (graph,) = Path(folder).glob("*.pbtxt")
        kinds = ge_operators(graph)
    torchair_seconds = ended[0] - report.began - report.seconds
    return Lowered(report.seconds, torchair_seconds, sum(kind not in _UNCOUNTED for kind in kinds))


def row(form: str, layers: int) -> str:
    """One row of the table."""
    model, args = build(form, layers)
    runs: dict[bool, list[Lowered]] = {False: [], True: []}
    failed: dict[bool, str] = {}
    for _ in range(REPEATS):
        for fused, found in runs.items():
            result = lowered(model, args, fused)
            if isinstance(result, str):
                failed[fused] = result
            else:
                found.append(result)
    cells = [form, str(layers)]
    for fused, found in runs.items():
        if fused in failed:
            cells += ["does not lower: " + failed[fused], ""]
        else:
            seconds = statistics.median(run.torchair for run in found)
            cells += [f"{found[0].operators:,}", f"{seconds:.1f}"]
    passes = statistics.median(run.passes for run in runs[True]) if runs[True] else float("nan")
    return " | ".join(["", *cells, f"{passes:.2f}", ""]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--layers", nargs="+", type=int, default=list(LAYERS))
    given = parser.parse_args()
    print("| graph | layers | GE operators, unfused | torchair | GE operators, fused | torchair | passes |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for form in given.forms:
        for layers in given.layers:
            print(row(form, layers), flush=True)


if __name__ == "__main__":
    main()
