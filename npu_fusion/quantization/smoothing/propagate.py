"""Where the factors of a producer's channels go: tags (``factors.py``) carried through a recorded forward.

A tag is kept for each element of each storage that a factor reaches, so that views need nothing, and what is
written into a part of a tensor (a cache) is in the right place. Only steps that touch such a storage are
looked at.
"""

from __future__ import annotations

import heapq
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from npu_fusion.quantization.smoothing.dataflow import COPIES, Dataflow, Ref, Step
from npu_fusion.quantization.smoothing.factors import (
    ATTENTION,
    FILLS,
    METADATA,
    MIXED,
    ONE,
    RULES,
    ZERO,
    ZEROS,
    Rule,
    constant,
    uniform,
)


@dataclass(frozen=True)
class Source:
    """What is multiplied: the rows of ``linear``, or the parameters at ``parameters`` ([channels] each)."""

    channels: int
    linear: nn.Linear | None = None
    parameters: tuple[Ref, ...] = ()
    plus_one: tuple[frozenset[int], ...] = ()
    """For each parameter the steps that compute ``1 + parameter``. If there are any, it is this sum that is
    multiplied."""


@dataclass
class Spread:
    """Where the factors went."""

    inputs: dict[nn.Linear, list[Tensor | None]] = field(default_factory=dict)
    """Linear layer -> for each of its calls the source's channels in the channels of its input, or None."""
    reached: set[int] = field(default_factory=set)
    """Storages of computed tensors that have factors."""
    stopped: Step | None = None
    """The first step that no factor goes through, where ``sinks`` are given."""
    escaped: bool = False
    """A result of the module has factors."""


class _Stop(Exception):
    pass


class Propagation:
    def __init__(
        self,
        flow: Dataflow,
        source: Source,
        channels: Tensor | None = None,
        sinks: Iterable[nn.Linear] | None = None,
    ) -> None:
        """
        Args:
            channels: those that have a factor. None: all.
            sinks: the layers that take the factors out again. Any other step that no factor goes through ends
                it (:attr:`Spread.stopped`). None: a guess. Such steps count as if they had no factor in their
                inputs, to find out which channels get where, when not all of them do.
        """
        self.flow = flow
        self.source = source
        self.sinks = None if sinks is None else set(sinks)
        self.spread = Spread()
        self._tags: dict[int, Tensor] = {}
        self._dtypes: dict[int, torch.dtype] = {}
        self._heap: list[int] = []
        self._queued: set[int] = set()
        self._channels = torch.full((source.channels,), ONE, dtype=torch.int32)
        numbers = torch.arange(source.channels, dtype=torch.int32)
        if channels is None:
            self._channels = numbers
        else:
            self._channels[channels.long()] = numbers[channels.long()]

    def run(self) -> Spread:
        """Go through all steps that a factor gets to."""
        for ref in self.source.parameters:
            self._write(ref, self._channels.reshape(ref.size), -1)
        if self.source.linear is not None:
            for step in self.flow.calls_of(self.source.linear):
                self._queue(step.index)
        while self._heap:
            step = self.flow.steps[heapq.heappop(self._heap)]
            try:
                self._step(step)
            except _Stop:
                self.spread.stopped = step
                return self.spread
        own = {ref.storage for ref in self.source.parameters}
        self.spread.reached = set(self._tags) - own
        self.spread.escaped = any(self._has_factor(ref) for ref in self.flow.outputs)
        return self.spread

    def _queue(self, index: int) -> None:
        if index not in self._queued:
            self._queued.add(index)
            heapq.heappush(self._heap, index)

    def _step(self, step: Step) -> None:
        if step.linear is not None:
            self._linear(step)
            return
        if any(step.index in steps for steps in self.source.plus_one):
            (tensor,) = (arg for arg in step.args if isinstance(arg, Ref))
            self._results(step, [self.tags(tensor)])
            return
        read = () if step.name in METADATA else step.reads
        factors = any(self._has_factor(ref) for ref in read)
        if not step.writes and (not factors or _gives_views(step)):
            return
        arguments = self._arguments(step)
        rule = RULES.get(step.name)
        if rule is None or arguments is None or not _takes(rule, arguments):
            if factors:
                self._blocked()
            self._results(step, [torch.tensor(ONE)] * len(step.writes))
            return
        args, kwargs = arguments
        if self.sinks is None and step.name.startswith(ATTENTION):
            # The rows for queries and keys in one layer with those for values are not what is looked for.
            args[:2] = (torch.tensor(ONE, dtype=torch.int32).expand_as(tags) for tags in args[:2])
        tags = rule(*args, **kwargs)
        self._results(step, list(tags) if isinstance(tags, (list, tuple)) else [tags])

    def _linear(self, step: Step) -> None:
        linear, tags = step.linear, self.tags(step.reads[0])
        assert linear is not None
        factors = self._has_factor(step.reads[0])
        if factors:
            if self.sinks is not None and linear not in self.sinks:
                self._blocked()
            columns = uniform(tags, tuple(range(tags.dim() - 1))).flatten() if tags.dim() > 1 else tags
            good = bool((columns >= 0).all())
            if self.sinks is not None and not good:
                self._blocked()
            self.spread.inputs.setdefault(linear, []).append(columns if good else None)
        elif tags.numel():
            self.spread.inputs.setdefault(linear, []).append(None)
        self._results(step, [self._channels if linear is self.source.linear else torch.tensor(ONE)])

    def _blocked(self) -> None:
        """No factor goes through this step."""
        if self.sinks is not None:
            raise _Stop

    def _arguments(self, step: Step) -> tuple[list[Any], dict[str, Any]] | None:
        """The arguments with tags for tensors; None if an index is not known (any more)."""
        for ref in step.reads:
            if ref.tensor is None:
                continue
            if self._has_factor(ref) or self.flow.written_after(ref.storage, step.index):
                return None

        def swap(value: Any) -> Any:
            if isinstance(value, Ref):
                if value.tensor is not None:
                    kept = value.tensor.cpu()
                    return kept.long() if kept.dtype == torch.int32 else kept
                return self.tags(value, step.index)
            if isinstance(value, Mapping):
                return {key: swap(item) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [swap(item) for item in value]
            return value

        return [swap(arg) for arg in step.args], {key: swap(arg) for key, arg in step.kwargs.items()}

    def _results(self, step: Step, tags: Sequence[Tensor]) -> None:
        lost = len(tags) < len(step.writes) and any(_least(t) == MIXED for t in tags)
        for position, ref in enumerate(step.writes):
            own = tags[position] if position < len(tags) else torch.tensor(MIXED if lost else ONE)
            if (ref.tensor is not None or ref.dtype.itemsize < torch.float16.itemsize) and _has_factor(own):
                own = torch.tensor(MIXED)  # rounded to integers, or saturated in 8 bits
            if _least(own) == MIXED:
                self._blocked()
                own = torch.where(own == MIXED, ONE, own)
            self._write(ref, own, step.index)

    def _has_factor(self, ref: Ref) -> bool:
        return ref.storage in self._tags and _has_factor(self.tags(ref))

    def tags(self, ref: Ref, index: int = -1) -> Tensor:
        """Those of a tensor, int32 in its size, as it is now; ``index`` is the step that reads it."""
        held = self._tags.get(ref.storage)
        if held is None:
            return torch.tensor(self._before(ref.storage, index), dtype=torch.int32).expand(ref.size)
        if self._dtypes[ref.storage] != ref.dtype:
            return torch.tensor(MIXED, dtype=torch.int32).expand(ref.size)
        return held.as_strided(ref.size, ref.stride, ref.offset)

    def _before(self, storage: int, index: int) -> int:
        """The tag of everything in a storage that no factor has reached before step ``index``."""
        writers = self.flow.writers(storage, index)
        if not writers:
            return ZERO if storage in self.flow.zero else ONE
        made_here = all(ref.storage != storage for ref in writers[0].reads)
        return self._written(writers[0]) if made_here and len(writers) == 1 else ONE

    def _written(self, step: Step) -> int:
        """The tag of everything that a step without factors writes."""
        if step.name in ZEROS:
            return ZERO
        if step.name in FILLS and not isinstance(step.args[-1], Ref):
            return constant(step.args[-1])
        if step.name in COPIES:
            return self._before(step.args[0].storage, step.index)
        return ONE

    def _write(self, ref: Ref, tags: Tensor, index: int) -> None:
        if ref.storage not in self._tags:
            if not _has_factor(tags):
                return
            self._track(ref, index)
        if self._dtypes[ref.storage] != ref.dtype:
            self._tags[ref.storage].fill_(MIXED)
            return
        self._tags[ref.storage].as_strided(ref.size, ref.stride, ref.offset).copy_(tags)

    def _track(self, ref: Ref, index: int) -> None:
        """Give a storage tags: from now on every step that touches it is looked at."""
        touching = [self.flow.steps[i] for i in self.flow.touching.get(ref.storage, ())]
        refs = [r for step in touching for r in (*step.reads, *step.writes) if r.storage == ref.storage]
        extent = max(r.extent * r.dtype.itemsize for r in (*refs, *self.flow.outputs, ref))
        before = ZERO if ref.storage in self.flow.zero else ONE
        held = torch.full((-(-extent // ref.dtype.itemsize),), before, dtype=torch.int32)
        for step in self.flow.writers(ref.storage, index):
            for written in step.writes:
                if written.storage == ref.storage:
                    region = held.as_strided(written.size, written.stride, written.offset)
                    region.fill_(self._written(step))
        self._tags[ref.storage] = held
        self._dtypes[ref.storage] = ref.dtype
        for step in touching:
            if step.index > index:
                self._queue(step.index)


def _takes(rule: Rule, arguments: tuple[list[Any], dict[str, Any]]) -> bool:
    """The rule is for this form of the operator; with ``out=`` it is none."""
    try:
        inspect.signature(rule).bind(*arguments[0], **arguments[1])
    except TypeError:
        return False
    return "out" not in arguments[1]


def _gives_views(step: Step) -> bool:
    """It gives tensors and computes none: they are views."""
    schema = getattr(step.func, "_schema", None)
    return schema is not None and any("Tensor" in str(result.type) for result in schema.returns)


def _has_factor(tags: Tensor) -> bool:
    """Whether some element does change with the factors."""
    if not tags.numel():
        return False
    low, high = torch.aminmax(tags)
    return int(low) == MIXED or int(high) >= 0


def _least(tags: Tensor) -> int:
    return int(tags.min()) if tags.numel() else ZERO
