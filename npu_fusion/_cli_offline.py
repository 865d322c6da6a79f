"""``npu-fusion offline-setup`` and ``npu-fusion lower``: Ascend without an NPU."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from npu_fusion._cli_model import FACTORY, add_options, fusion_config
from npu_fusion.hosts import offline
from npu_fusion.passes.pipeline import FusionExpectationError


def add_commands(commands: Any) -> None:
    """Add them to the subparsers of the command line."""
    setup = commands.add_parser(
        "offline-setup",
        help="get torch_npu for the installed torch, to lower models without an NPU",
        description="Puts torch_npu's wheel into a folder of its own, which only `npu-fusion lower` and "
        "`python -m npu_fusion.hosts.offline` see, and compiles what stands in for CANN. Needs pip and a C++ "
        "compiler.",
    )
    setup.add_argument("--dir", type=Path, help="default: $NPU_FUSION_CACHE or ~/.cache/npu_fusion")
    setup.add_argument("--wheel", type=Path, help="torch_npu's wheel, for machines without network")
    setup.set_defaults(run=_setup)

    lower = commands.add_parser(
        "lower",
        help="compile a model with the real torchair, without an NPU, and show what it becomes",
        description=FACTORY + "Tensors are on the CPU. Needs `npu-fusion offline-setup`, once. The fused "
        "graph is also run on the CPU and compared with the model.",
    )
    add_options(lower)
    lower.add_argument(
        "--out", required=True, metavar="DIR", help="where the FX and GE graphs and reports go"
    )
    lower.add_argument("--mode", choices=offline.MODES, default="max-autotune", help="default: max-autotune")
    lower.add_argument("--soc", help="name of the chip, e.g. Ascend910B3; default: one of the target's")
    lower.add_argument("--cann", help="the release that CANN claims to be, e.g. 8.5.0; default: 9.1.0")
    lower.set_defaults(run=_lower)


def _setup(arguments: argparse.Namespace) -> int:
    print(f"torch_npu is set up in {offline.setup(arguments.wheel, arguments.dir)}")
    if arguments.dir is not None and os.environ.get("NPU_FUSION_CACHE") != str(arguments.dir.absolute()):
        print(f"to use it: export NPU_FUSION_CACHE={arguments.dir.absolute()}")
    return 0


def _lower(arguments: argparse.Namespace) -> int:
    try:
        lowering = offline.lower(
            arguments.factory,
            arguments.out,
            mode=arguments.mode,
            dynamic=arguments.dynamic,
            fusion_config=fusion_config(arguments),
            soc=arguments.soc,
            cann=arguments.cann,
        )
    except FusionExpectationError as error:
        if error.report is not None:
            error.report.print()
        raise
    except offline.LoweringError as error:
        print(f"npu-fusion: {error}", file=sys.stderr)
        return 1
    lowering.report.print()
    if lowering.operators:
        print("\noperators of the GE graph")
        for name, count in lowering.operators.items():
            print(f"  {count:>6}  {name}")
    apart = f"{lowering.difference:.3g} (largest value {lowering.largest:.3g})"
    print(f"\nlargest difference from eager on the CPU: {apart}")
    print(f"lowered by torch_npu {lowering.torch_npu} for {lowering.soc}; written to {arguments.out}")
    return 0
