"""JSON files of checkpoints, read without trusting them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LARGEST = 100 << 20
"""Bytes. The index of a model with a million tensors has about a tenth of that."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises ``ValueError`` that names the file if there is none: too large, not UTF-8, no JSON, a key twice, a
    number that JSON has not (NaN), or another value than an object.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has {path.stat().st_size:,} bytes; accepted: {LARGEST:,}")
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error


def parse_json(text: bytes) -> dict[str, Any]:
    """As :func:`read_json`, without the name of a file."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}; accepted: an object")
    return value


def _no_key_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {twice!r} twice")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"it has the number {name}, which JSON has not")


def entry(
    config: dict[str, Any], name: str, kind: type | tuple[type, ...], where: str, default: Any = ...
) -> Any:
    """An entry of a configuration; ``default`` where it is absent or null.

    Raises ``ValueError`` if it has another type, or is absent and there is no default.
    """
    value = config.get(name)
    if value is None:
        if default is ...:
            raise ValueError(f"{where}: {name} is missing")
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    # True is an int to Python, not here.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        accepted = ", ".join(k.__name__ for k in kinds)
        raise ValueError(f"{where}: {name} is {value!r}; accepted: {accepted}")
    return value
