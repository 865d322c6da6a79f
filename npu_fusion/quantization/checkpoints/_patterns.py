"""Which layers a configuration of compressed-tensors means: by name, by a regular expression, or by class.

::

    "model.layers.0.mlp.up_proj"     this layer
    "re:.*self_attn.*"               every layer with a name that begins so
    "Linear"                         every layer of the class, or of one derived from it
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

_PREFIX = "re:"
_LONGEST, _MOST_REPEATS = 500, 6


class Patterns:
    """Patterns of one list, checked."""

    def __init__(self, given: object, where: str) -> None:
        """Raises ``ValueError`` if it is no list of patterns, or has an expression that could take forever.

        Matching takes a time that is exponential where repetitions are nested, and grows with the power of
        their number otherwise: neither is wanted of a file.
        """
        if not isinstance(given, list) or not all(isinstance(pattern, str) for pattern in given):
            raise ValueError(f"{where} is {given!r}; accepted: a list of names and patterns")
        self._names: set[str] = {pattern for pattern in given if not pattern.startswith(_PREFIX)}
        self._expressions: dict[str, re.Pattern[str]] = {}
        for pattern in given:
            if pattern.startswith(_PREFIX):
                self._expressions[pattern] = _compiled(pattern.removeprefix(_PREFIX), where)

    def match(self, name: str, classes: Iterable[str]) -> tuple[int, str] | None:
        """How a layer is meant (0: by name, 1: by expression, 2: by class), and by what; None: not at all."""
        if name in self._names:
            return 0, name
        for pattern in sorted(self._expressions):
            if self._expressions[pattern].match(name):
                return 1, pattern
        found = sorted(self._names.intersection(classes))
        return (2, found[0]) if found else None


def _compiled(expression: str, where: str) -> re.Pattern[str]:
    repeats = sum(expression.count(sign) for sign in "*+{")
    if len(expression) > _LONGEST or repeats > _MOST_REPEATS or re.search(r"\)[*+{]", expression):
        raise ValueError(
            f"{where} has {expression[:80]!r}, which could take forever to match; accepted: at most "
            f"{_LONGEST} characters and {_MOST_REPEATS} repetitions, and none of a group"
        )
    try:
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where} has {expression!r}, which is no regular expression: {error}") from error


def class_names(module: nn.Module | None) -> Sequence[str]:
    """Of a layer and what it is derived from. A layer that the model has in another form is a Linear."""
    if module is None:
        return ("Linear",)
    return [cls.__name__ for cls in type(module).__mro__ if issubclass(cls, nn.Module)]
