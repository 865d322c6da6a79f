"""The command line: ``npu-fusion demo``, ``explain``, ``quantize``, ``lower`` and others."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import cast

import npu_fusion
from npu_fusion import _cli_bench, _cli_offline, _cli_quantize
from npu_fusion._cli_model import FACTORY, UsageError, add_options, fusion_config, make_model, positive
from npu_fusion.backend import HOSTS
from npu_fusion.hosts.offline import OfflineError
from npu_fusion.passes.pipeline import FusionExpectationError
from npu_fusion.report import FusionReport


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit status: 0 done, 1 an expectation was not met, 2 bad input."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except FusionExpectationError as error:
        print(f"npu-fusion: {error}", file=sys.stderr)
        return 1
    except (UsageError, OfflineError) as error:
        print(f"npu-fusion: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="npu-fusion", description="Plain PyTorch models on the fused operators of Ascend NPUs."
    )
    parser.add_argument("--version", action="version", version=f"npu-fusion {npu_fusion.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="compile and run a small trained model, and show what was fused")
    demo.add_argument(
        "--model",
        choices=("llama", "mla"),
        default="llama",
        help="llama: in W8A8; mla: in float32, with latent attention as DeepSeek-V3",
    )
    demo.add_argument("--host", choices=HOSTS, default="auto", help="compiler for the rest of the graph")
    demo.add_argument("--dump", default="npu_fusion_dump", metavar="DIR", help="where graphs and reports go")
    demo.add_argument("--bytes", type=positive, default=160, help="length of the generated text")
    demo.set_defaults(run=_demo)

    explain = commands.add_parser(
        "explain",
        help="say what would fuse in a model and, for every near miss, why not",
        description=FACTORY + "The model is traced, not run.",
    )
    add_options(explain)
    explain.add_argument("--json", action="store_true", help="print the report as JSON")
    explain.add_argument("--dump", metavar="DIR", help="write graphs, report.json and report.html there")
    explain.set_defaults(run=_explain)

    _cli_quantize.add_command(commands)
    _cli_offline.add_commands(commands)
    _cli_bench.add_command(commands)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from npu_fusion.demo import mla_run, run

        demo, most = (mla_run.run, mla_run.longest()) if arguments.model == "mla" else (run.run, None)
        if most is not None and arguments.bytes > most:
            given = f"--bytes is {arguments.bytes} with --model {arguments.model}"
            raise UsageError(f"{given}; accepted: up to {most}")
        demo(host=arguments.host, dump_dir=arguments.dump, length=arguments.bytes)
    except ImportError as error:
        raise UsageError(f"the demo needs more packages ({error}): pip install npu-fusion[demo]") from error
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    model, args, kwargs = make_model(arguments.factory)
    config = fusion_config(arguments) | {"dump_dir": arguments.dump}
    unmet: FusionExpectationError | None = None
    try:
        report = npu_fusion.explain(model, *args, dynamic=arguments.dynamic, fusion_config=config, **kwargs)
    except FusionExpectationError as error:
        report, unmet = cast(FusionReport, error.report), error
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        report.print()
    if unmet is not None:
        raise unmet
    return 0


if __name__ == "__main__":
    sys.exit(main())
