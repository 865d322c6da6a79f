"""Importing every public module of a room, so that a new file registers itself by being there."""

from __future__ import annotations

import importlib
import pkgutil
import sys


def import_modules(package: str) -> None:
    """Import each direct submodule of ``package`` whose name has no leading underscore, in name order."""
    for module in pkgutil.iter_modules(sys.modules[package].__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package}.{module.name}")
