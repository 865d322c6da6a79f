"""Which line of a listing belongs to which fusion or near miss of a report."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from npu_fusion.report import Fused, FusionReport


@dataclass(frozen=True)
class Region:
    """One fusion, told in nodes of the graph before and after the whole pipeline."""

    number: int
    """1, 2, ... in the order of the report."""
    fused: Fused
    before: tuple[str, ...]
    after: tuple[str, ...]
    """What was emitted and is still there; in a dry run the same nodes as before."""
    into: int | None
    """Number of the larger fusion that has taken this one in, if any."""


@dataclass(frozen=True)
class Marks:
    """Node name -> what it belongs to, for both listings. Near misses go by their index in the report."""

    regions: tuple[Region, ...]
    before: dict[str, Region]
    after: dict[str, Region]
    near_before: dict[str, list[int]]
    near_after: dict[str, list[int]]


def mark(report: FusionReport, before: Collection[str], after: Collection[str]) -> Marks:
    """Trace every fusion back to nodes of ``before`` and forward to nodes of ``after``.

    A later fusion may replace what an earlier one emitted (a lifted ``npu_swiglu`` becomes part of an
    ``npu_dequant_swiglu_quant``): its region then is everything that the two replaced together.
    """
    origin: dict[str, tuple[str, ...]] = {}
    maker: dict[str, int] = {}
    into: dict[int, int] = {}
    traced: list[tuple[str, ...]] = []
    for index, fused in enumerate(report.fusions):
        into.update((maker[name], index) for name in fused.nodes if name in maker)
        nodes = _trace(fused.nodes, origin)
        traced.append(nodes)
        for name in fused.emitted:
            origin[name], maker[name] = nodes, index
    regions = tuple(
        Region(
            index + 1,
            fused,
            tuple(name for name in traced[index] if name in before),
            tuple(name for name in fused.emitted or traced[index] if name in after),
            into[index] + 1 if index in into else None,
        )
        for index, fused in enumerate(report.fusions)
    )
    near_before: dict[str, list[int]] = {}
    near_after: dict[str, list[int]] = {}
    for index, refusal in enumerate(report.refused):
        for name in _trace(refusal.nodes, origin):
            near_before.setdefault(name, []).append(index)
        for name in refusal.nodes:
            near_after.setdefault(name, []).append(index)
    return Marks(
        regions,
        {name: region for region in regions for name in region.before},
        {name: region for region in regions for name in region.after},
        near_before,
        near_after,
    )


def _trace(names: Iterable[str], origin: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(node for name in names for node in origin.get(name, (name,))))
