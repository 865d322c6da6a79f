"""What :func:`npu_fusion.prepare` did to a model and what it did not, as data and as text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload


@dataclass(frozen=True)
class Preparation:
    """One module whose weights are laid out anew."""

    module: str
    """Name of the module in the model; empty for the model itself."""


@dataclass(frozen=True)
class Merged(Preparation):
    """Two layers of one module that are one layer now."""

    gate: str
    up: str
    merged: str

    def __str__(self) -> str:
        return f"{self.gate} and {self.up} merged into {self.merged}"


@dataclass(frozen=True)
class Rearranged(Preparation):
    """A multi-head latent attention whose layers keep their names and have their weights in another form."""

    layers: tuple[str, ...]
    """Names of the layers in the module."""
    what: tuple[str, ...]
    """What was done to them, and what could not be done."""

    def __str__(self) -> str:
        return "; ".join(self.what)


@dataclass(frozen=True)
class Skipped:
    """A module that looks like a SwiGLU or a latent attention and was left as it is."""

    module: str
    reason: str

    def __str__(self) -> str:
        return f"left as it is: {self.reason}"


@dataclass(frozen=True)
class Prepared(Sequence[Preparation]):
    """What :func:`npu_fusion.prepare` did, as a sequence of all it did, and what it did not."""

    merged: tuple[Merged, ...]
    skipped: tuple[Skipped, ...]
    dry_run: bool = False
    """Nothing was changed; ``merged`` and ``rearranged`` are what would have been."""
    rearranged: tuple[Rearranged, ...] = ()

    @property
    def done(self) -> tuple[Preparation, ...]:
        return (*self.merged, *self.rearranged)

    @overload
    def __getitem__(self, index: int) -> Preparation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Preparation]: ...
    def __getitem__(self, index: int | slice) -> Preparation | Sequence[Preparation]:
        return self.done[index]

    def __len__(self) -> int:
        return len(self.done)

    def __str__(self) -> str:
        would = " (dry run: nothing was changed)" if self.dry_run else ""
        attentions = f"{len(self.rearranged)} latent attentions rearranged, " if self.rearranged else ""
        left = f"{len(self.skipped)} left as they are"
        lines = [f"prepare: {len(self.merged)} SwiGLU merged, {attentions}{left}{would}"]
        groups: defaultdict[str, list[str]] = defaultdict(list)
        entries: Sequence[Preparation | Skipped] = (*self.done, *self.skipped)
        for entry in entries:
            groups[str(entry)].append(entry.module or "(the model)")
        for what, modules in groups.items():
            first, *rest = modules
            where = f"{first} ... {rest[-1]} ({len(modules)} modules)" if rest else first
            lines.append(f"  {where}: {what}")
        return "\n".join(lines)
