"""A table, however it is shown, and documents that hold such tables between marks."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 160
"""Where the output is not a terminal."""


@dataclass(frozen=True)
class Rows:
    """A table; ``name`` is what its marks call it. All columns but the first are numbers."""

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        shown = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD)
        for index, head in enumerate(self.header):
            shown.add_column(head, justify="right" if index else "left")
        for row in self.rows:
            shown.add_row(*row)
        return shown

    def markdown(self) -> str:
        align = ["---", *("---:" for _ in self.header[1:])]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (self.header, align, *self.rows))

    def print(self) -> None:
        """By rich; where it is not installed, as Markdown."""
        try:
            from rich.console import Console
        except ImportError:
            print(f"{self.title}\n\n{self.markdown()}\n")
        else:
            Console(width=None if sys.stdout.isatty() else WIDTH).print(self.rich())


def update(document: str, benchmark: str, shown: Sequence[Rows]) -> str:
    """``document`` with these tables of ``benchmark`` between their marks.

    ::

        <!-- benchmark: name -->
        <!-- end -->

    Raises:
        ValueError: a mark is missing.
    """
    for rows in shown:
        begin, end = f"<!-- {benchmark}: {rows.name} -->", "<!-- end -->"
        marked = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if marked.search(document) is None:
            raise ValueError(f"the document has no {begin!r} ... {end!r}")
        content = f"{begin}\n{rows.markdown()}\n{end}"
        document = marked.sub(functools.partial(_literally, content), document)
    return document


def _literally(content: str, _: re.Match[str]) -> str:
    return content
