"""A progress bar for what takes minutes: rich's, where it is installed and someone is watching, else none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[..., None]
"""``advance()`` after one step; ``advance("what was done")`` shows that beside the bar."""


@contextmanager
def progress(total: int | None, description: str, enabled: bool | None = None) -> Iterator[Advance]:
    """A bar on stderr, gone at the end.

    Args:
        total: number of steps; None if it is not known.
        description: what is being done.
        enabled: False: no bar. None: only if stderr is a terminal and rich is installed. True: in any case.

    Yields:
        A function to be called after each step.

    Raises:
        ImportError: ``enabled`` is True and rich is not installed.
    """
    if enabled is False or (enabled is None and not sys.stderr.isatty()):
        yield _ignore
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        if enabled:
            raise ImportError("progress=True needs rich: pip install 'npu-fusion[cli]'") from None
        yield _ignore
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[done]}"),
    )
    with Progress(*columns, console=Console(stderr=True, force_terminal=enabled), transient=True) as bar:
        task = bar.add_task(description, total=total, done="")
        yield lambda done="": bar.update(task, advance=1, done=done)


def _ignore(done: str = "") -> None:
    """No bar is shown."""
