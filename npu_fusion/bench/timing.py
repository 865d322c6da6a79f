"""Times of several calls beside each other, in one process.

Calls take turns, one block each per round, in an order that shifts from round to round: what disturbs the
machine for a while disturbs all of them, and none always finds the caches as the same other call left them. A
block repeats a short call until it is long enough for the clock. Of a call's blocks the median counts; blocks
during which the system took the processor away from one of the threads are left out of it as long as enough
others remain.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)

BLOCK = 0.001
"""Seconds: a call that takes less is repeated."""
MOST_REPEATS = 1000
FEWEST_ROUNDS, MOST_ROUNDS = 5, 60


@dataclass(frozen=True)
class Times:
    """Seconds per call, one number for each block."""

    undisturbed: tuple[float, ...]
    disturbed: tuple[float, ...] = ()

    @property
    def counted(self) -> tuple[float, ...]:
        """The undisturbed blocks; all of them if there are too few."""
        if len(self.undisturbed) >= FEWEST_ROUNDS:
            return self.undisturbed
        return self.undisturbed + self.disturbed

    @property
    def median(self) -> float:
        return statistics.median(self.counted)

    @property
    def least(self) -> float:
        return min(self.counted)


def interleaved(
    calls: Mapping[Name, Callable[[], object]],
    seconds: float = 1.0,
    *,
    rounds: tuple[int, int] = (FEWEST_ROUNDS, MOST_ROUNDS),
    block: float = BLOCK,
) -> dict[Name, Times]:
    """Time all ``calls``, taking turns, for about ``seconds`` together, but within these numbers of rounds.

    Each is called a few times beforehand, untimed. What a call returns is dropped before the next one. With
    ``block`` 0 nothing is repeated: no call finds in the caches what it has just used itself.
    """
    repeats = {name: _repeats(call, block) for name, call in calls.items()}
    undisturbed: dict[Name, list[float]] = {name: [] for name in calls}
    disturbed: dict[Name, list[float]] = {name: [] for name in calls}
    order = list(calls)
    fewest, most = rounds
    ends = time.perf_counter() + seconds
    for done in range(most):
        if done >= fewest and time.perf_counter() > ends:
            break
        for name in order:
            switches = _preemptions()
            each = _block(calls[name], repeats[name])
            kept = undisturbed if _preemptions() == switches else disturbed
            kept[name].append(each)
        order.append(order.pop(0))
    return {name: Times(tuple(undisturbed[name]), tuple(disturbed[name])) for name in calls}


def _repeats(call: Callable[[], object], block: float) -> int:
    call()
    least = min(_block(call, 1) for _ in range(3))
    return max(1, min(MOST_REPEATS, round(block / max(least, 1e-9))))


def _block(call: Callable[[], object], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def _preemptions() -> int:
    """How often the system has taken the processor from a thread of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
