"""Replacing the linear layers of a model in place: all or, if one cannot be, none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn


def patterns(who: str, name: str, given: Iterable[str]) -> tuple[str, ...]:
    """Raise ``TypeError`` for a single string, whose letters would be taken for names."""
    if isinstance(given, str):
        raise TypeError(f"{who}: {name} must be a sequence of names, got the string {given!r}")
    return tuple(given)


def matches(name: str, pattern: str) -> bool:
    """Is ``pattern`` the full name of a layer or its last parts? With the wildcards of file names."""
    return fnmatchcase(f".{name}", f"*.{pattern}")


def replace_linears(
    who: str,
    model: nn.Module,
    make: Callable[[list[str], nn.Linear], nn.Module],
    skip: Iterable[str],
    check: Callable[[], None] = lambda: None,
) -> list[str]:
    """Put ``make(names, linear)`` in the place of each ``torch.nn.Linear``; returns the replaced names.

    ``check`` is called when all are made and none is in its place, and may raise.

    Subclasses of Linear are left alone: their owners may use them in a way of their own. A layer under
    several names stays one layer, and is left alone if one of them is to be skipped.

    Raises:
        TypeError: ``skip`` is a single string.
        ValueError: ``model`` is itself a Linear; or what ``make`` raises, with the name in front of it.
    """
    skipped = patterns(who, "skip", skip)
    if isinstance(model, nn.Linear):
        raise ValueError(f"{who}: model is itself a Linear, which cannot be replaced in place")
    names: dict[nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            names.setdefault(module, []).append(name)
    made: dict[str, nn.Module] = {}
    for linear, called in names.items():
        if any(matches(name, pattern) for name in called for pattern in skipped):
            continue
        try:
            made |= dict.fromkeys(called, make(called, linear))
        except ValueError as error:
            raise ValueError(f"{who}: layer {called[0]}: {error}") from error
    check()
    replaced = [name for name, _ in model.named_modules(remove_duplicate=False) if name in made]
    for name in replaced:
        model.set_submodule(name, made[name])
    return replaced
