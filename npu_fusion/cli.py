"""The command line: ``npu-fusion demo`` and ``npu-fusion explain MODULE:FACTORY``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import npu_fusion
from npu_fusion.backend import HOSTS
from npu_fusion.config import TARGETS, Numerics
from npu_fusion.passes.pipeline import FusionExpectationError


class UsageError(Exception):
    """What the user gave cannot be used; the message says what is accepted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit status: 0 done, 1 an expectation was not met, 2 bad input."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except FusionExpectationError as error:
        print(f"npu-fusion: {error}", file=sys.stderr)
        return 1
    except UsageError as error:
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
    demo.add_argument("--bytes", type=_positive, default=160, help="length of the generated text")
    demo.set_defaults(run=_demo)

    explain = commands.add_parser(
        "explain",
        help="say what would fuse in a model and, for every near miss, why not",
        description="FACTORY is a function without arguments in MODULE (a module name or a .py file) that "
        "returns (model, args) or (model, args, kwargs). The model is traced, not run.",
    )
    explain.add_argument("factory", metavar="MODULE:FACTORY")
    explain.add_argument(
        "--expect",
        action="append",
        default=[],
        metavar="OPERATOR=COUNT",
        help="exit with 1 unless so many fuse",
    )
    explain.add_argument("--json", action="store_true", help="print the report as JSON")
    shapes = explain.add_mutually_exclusive_group()
    shapes.add_argument("--dynamic", action="store_true", default=None, help="symbolic shapes from the start")
    shapes.add_argument("--static", action="store_false", dest="dynamic", help="no symbolic shapes")
    explain.add_argument("--numerics", choices=[n.name.lower() for n in Numerics], help="default: accurate")
    explain.add_argument("--target", choices=TARGETS, help="apply the hardware limits of this SoC")
    explain.add_argument("--dump", metavar="DIR", help="write graphs, report.json and report.html there")
    explain.set_defaults(run=_explain)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


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
    expect = dict(_expectation(text) for text in arguments.expect)
    model, args, kwargs = _made(_factory(arguments.factory), arguments.factory)
    config: dict[str, Any] = {
        "expect": expect or None,
        "dump_dir": arguments.dump,
        "target": arguments.target,
    }
    if arguments.numerics:
        config["numerics"] = arguments.numerics
    unmet: FusionExpectationError | None = None
    try:
        report = npu_fusion.explain(model, *args, dynamic=arguments.dynamic, fusion_config=config, **kwargs)
    except FusionExpectationError as error:
        report, unmet = error.report, error
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        report.print()
    if unmet is not None:
        raise unmet
    return 0


def _expectation(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if not name or not count.isdigit():
        raise UsageError(f"--expect is {text!r}; accepted: OPERATOR=COUNT, e.g. npu_dequant_swiglu_quant=4")
    return name, int(count)


def _factory(spec: str) -> Callable[[], Any]:
    module_name, _, name = spec.rpartition(":")
    if not module_name or not name:
        raise UsageError(
            f"MODULE:FACTORY is {spec!r}; accepted: e.g. my_package.models:make or model.py:make"
        )
    path = Path(module_name)
    if path.suffix == ".py":
        if not path.is_file():
            raise UsageError(f"there is no file {module_name!r}")
        sys.path.insert(0, str(path.resolve().parent))
        module_name = path.stem
    else:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"cannot import {module_name!r}: {error}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise UsageError(f"{module_name!r} has no function {name!r}")
    return factory


def _made(factory: Callable[[], Any], spec: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    made = factory()
    if (
        isinstance(made, tuple)
        and len(made) in (2, 3)
        and callable(made[0])
        and isinstance(made[1], (tuple, list))
    ):
        kwargs = made[2] if len(made) == 3 else {}
        if isinstance(kwargs, dict):
            return made[0], tuple(made[1]), kwargs
    raise UsageError(
        f"{spec} returned {type(made).__name__}; accepted: (model, args) or (model, args, kwargs)"
    )


if __name__ == "__main__":
    sys.exit(main())
