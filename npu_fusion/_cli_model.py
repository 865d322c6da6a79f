"""What commands have in common: options, their errors, and the model that a FACTORY makes."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from npu_fusion.config import TARGETS, Numerics

FACTORY = (
    "FACTORY is a function without arguments in MODULE (a module name or a .py file) that returns "
    "(model, args) or (model, args, kwargs). "
)


class UsageError(Exception):
    """What the user gave cannot be used; the message says what is accepted."""


def positive(text: str) -> int:
    """The type of an option that is a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    """The model and what is asked of its fusions."""
    parser.add_argument("factory", metavar="MODULE:FACTORY")
    parser.add_argument(
        "--expect",
        action="append",
        default=[],
        metavar="OPERATOR=COUNT",
        help="exit with 1 unless so many fuse",
    )
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument("--dynamic", action="store_true", default=None, help="symbolic shapes from the start")
    shapes.add_argument("--static", action="store_false", dest="dynamic", help="no symbolic shapes")
    parser.add_argument("--numerics", choices=[n.name.lower() for n in Numerics], help="default: accurate")
    parser.add_argument("--target", choices=TARGETS, help="apply the hardware limits of this SoC")


def fusion_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of ``FusionConfig`` from the options of :func:`add_options`."""
    config: dict[str, Any] = {
        "expect": dict(_expectation(text) for text in arguments.expect) or None,
        "target": arguments.target,
    }
    if arguments.numerics:
        config["numerics"] = arguments.numerics
    return config


def _expectation(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if not name or not count.isdigit():
        raise UsageError(f"--expect is {text!r}; accepted: OPERATOR=COUNT, e.g. npu_dequant_swiglu_quant=4")
    return name, int(count)


def make_model(spec: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """What the factory at ``MODULE:FACTORY`` makes. Raises :class:`UsageError`."""
    made = _factory(spec)()
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
