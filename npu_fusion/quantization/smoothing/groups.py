"""Which linear layers read one tensor, and what can absorb a factor for each of its channels.

::

    norm ──┬── q_proj           norm            -> q, k, v; gate, up
           ├── k_proj           v_proj          -> o_proj       through attention, whatever the layout of its
           heads └── v_proj           up_proj         -> down_proj    through (anything) * up
                                kv_b_proj, qkv_proj, gate_up_proj: only the rows that get there

SmoothQuant (arXiv:2211.10438, equation 4) divides activations by s and multiplies weights by it. The division
costs nothing if what computes the activations takes it over: that is a producer. A producer is found by going
back from the tensor, and tested by carrying the factors forward through everything that was recorded
(``propagate.py``): each must arrive at the group's layers, each of their channels with the factor of one
channel of the producer, and nowhere else. So it is not names or classes that count. A residual connection
that takes the norm's output, a router, or a gelu between the two each end it, and the reason says so.

What one forward cannot show is refused: a layer that was not called and could have read the tensor (an expert
that no token chose), and parameters that are not the module's alone (``ownership.py``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from npu_fusion.quantization.smoothing.dataflow import COPIES, Dataflow, Ref, Step, is_plain_linear, place
from npu_fusion.quantization.smoothing.factors import ATTENTION, METADATA, RULES
from npu_fusion.quantization.smoothing.ownership import Ownership, unused_matrices
from npu_fusion.quantization.smoothing.producer import Producer
from npu_fusion.quantization.smoothing.propagate import Propagation, Source


@dataclass(frozen=True)
class Group:
    """Linear layers that read one tensor."""

    consumers: tuple[str, ...]
    """Names, in the order of their first calls."""
    producer: Producer | None
    """What takes over a factor for each channel of the tensor; None if nothing can."""
    reason: str
    """Why nothing can; empty if ``producer`` is there."""


def find_groups(
    module: nn.Module,
    dataflow: Dataflow,
    linears: Mapping[str, nn.Linear],
    *,
    model: nn.Module | None = None,
) -> list[Group]:
    """All ``linears`` in groups, each layer in exactly one, in the order in which they were first called.

    Layers that were not called come last, each in a group of its own.

    Args:
        module: what was traced.
        dataflow: of a forward of ``module`` (:func:`~npu_fusion.quantization.smoothing.trace`).
        linears: the layers to be smoothed, under the names that groups shall have. Others that read the same
            tensor make folding illegal: their weights would have to change, too.
        model: what ``module`` is a part of. Producers are named by their place in it, and parameters that its
            other parts share are not touched. Default: ``module``.

    Raises:
        TypeError: a layer is not an ``nn.Linear``.
        ValueError: ``dataflow`` is of another module.
    """
    for name, linear in linears.items():
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"find_groups: linears[{name!r}] is a {type(linear).__name__}; accepted: nn.Linear"
            )
    if dataflow.module is not module:
        raise ValueError(
            "find_groups: dataflow is of another module; accepted: what trace(module, ...) returned"
        )
    return list(_Search(dataflow, linears, module if model is None else model).groups())


@dataclass
class _Candidate:
    """A source of factors, and its channel in each channel of the consumers."""

    source: Source
    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    last: int
    """The last step on the way back to the consumers that it was found at."""
    channel: Tensor


class _Search:
    def __init__(self, flow: Dataflow, linears: Mapping[str, nn.Linear], model: nn.Module) -> None:
        self.flow = flow
        self.names: dict[nn.Linear, list[str]] = defaultdict(list)
        for name, linear in linears.items():
            self.names[linear].append(name)
        self.owners = Ownership(flow, model)
        self.unused = list(unused_matrices(flow))
        self.guesses: dict[tuple[int, ...], Mapping[nn.Linear, Sequence[Tensor | None]]] = {}
        """Parameters (by ``id``) -> where a guess says that their channels get to."""

    def groups(self) -> Iterator[Group]:
        done: set[nn.Linear] = set()
        for members in self.flow.groups():
            consumers = [linear for linear in members if linear in self.names]
            done.update(consumers)
            if consumers:
                names = tuple(name for linear in consumers for name in self.names[linear])
                found = self._producer(consumers)
                yield Group(names, None, found) if isinstance(found, str) else Group(names, found, "")
        for linear, own in self.names.items():
            if linear not in done:
                plain = is_plain_linear(linear)
                why = "it was not called" if plain else "its forward is not that of nn.Linear"
                yield Group(tuple(own), None, why)

    def _producer(self, consumers: Sequence[nn.Linear]) -> Producer | str:
        """The producer, or the reason why there is none."""
        for linear in consumers:
            if refusal := self.owners.refusal(linear, linear.weight):
                return refusal
        candidates = list(self._candidates(consumers))
        if not candidates:
            source = self.flow.source(consumers[0])
            return f"nothing multiplies its input by a parameter for each channel; it comes from {source}"
        candidates.sort(key=lambda one: (-one.channel.unique().numel(), -one.last))
        refusals = []
        for one in candidates:
            refusals.append(self._refusal(one, consumers))
            if not refusals[-1]:
                name = self.owners.name(one.module)
                plus_one = tuple(bool(steps) for steps in one.source.plus_one)
                return Producer(name, one.module, one.parameters, plus_one, one.channel)
        return refusals[0]

    def _candidates(self, consumers: Sequence[nn.Linear]) -> Iterator[_Candidate]:
        """All sources whose channels arrive, each alone, in the channels of the consumers."""
        for source, module, own, last in self._sources(self.flow.calls_of(consumers[0])[0]):
            key = tuple(id(parameter) for parameter in own)
            if key not in self.guesses:
                self.guesses[key] = Propagation(self.flow, source).run().inputs
            channel = self._agreed(consumers, self.guesses[key])
            # One channel for all would make all factors equal: of no use.
            if channel is not None and (channel != channel[0]).any():
                yield _Candidate(source, module, own, last, channel)

    def _agreed(
        self, consumers: Sequence[nn.Linear], inputs: Mapping[nn.Linear, Sequence[Tensor | None]]
    ) -> Tensor | None:
        """The one map of channels in all calls of the consumers."""
        maps = [channel for linear in consumers for channel in inputs.get(linear, ())]
        calls = sum(len(self.flow.calls_of(linear)) for linear in consumers)
        if len(maps) != calls or maps[0] is None:
            return None
        same = all(channel is not None and torch.equal(channel, maps[0]) for channel in maps)
        return maps[0].to(torch.int64) if same else None

    def _sources(self, read: Step) -> Iterator[tuple[Source, nn.Module, tuple[nn.Parameter, ...], int]]:
        """What may multiply the tensor that is read, with the last step at which it was met."""
        linears, vectors = self._backwards(read)
        for linear, last in linears.items():
            own = tuple(p for p in (linear.weight, linear.bias) if isinstance(p, nn.Parameter))
            source = Source(linear.out_features, linear, plus_one=(frozenset(),) * len(own))
            yield source, linear, own, last
        for module, (found, last) in vectors.items():
            own = tuple(p for p in module._parameters.values() if p is not None and id(p) in found)
            refs = tuple(place(parameter) for parameter in own)
            if len({ref.numel for ref in refs}) == 1:
                plus_one = tuple(frozenset(self._plus_one(ref.storage)) for ref in refs)
                yield Source(refs[0].numel, None, refs, plus_one), module, own, last

    def _backwards(self, read: Step) -> tuple[dict[nn.Linear, int], dict[nn.Module, tuple[set[int], int]]]:
        """Linear layers, and modules with vectors among their parameters (by ``id``), on the way back.

        Sums are not crossed, but those with a bias: what is behind a residual connection has other readers.
        """
        linears: dict[nn.Linear, int] = {}
        vectors: dict[nn.Module, tuple[set[int], int]] = {}
        todo, visited = [(read.reads[0].storage, read.index)], set()
        while todo:
            storage, index = todo.pop()
            for module, parameter in self.owners.of(storage):
                if max(parameter.shape, default=1) == parameter.numel():
                    found, last = vectors.get(module, (set(), index))
                    vectors[module] = (found | {id(parameter)}, max(last, index))
            for step in self.flow.writers(storage, index):
                if step.index in visited:
                    continue
                visited.add(step.index)
                if step.linear is not None:
                    linears[step.linear] = max(step.index, linears.get(step.linear, 0))
                elif step.name in RULES and step.name not in METADATA and self._crosses(step):
                    todo += [(ref.storage, step.index) for ref in _data(step) if ref.tensor is None]
        return linears, vectors

    def _crosses(self, step: Step) -> bool:
        return step.name not in ("add", "sub", "rsub", "addcmul") or any(
            self.owners.of(self.flow.tensor(step.index, ref)[0]) for ref in step.reads
        )

    def _plus_one(self, storage: int) -> list[int]:
        """The steps that add 1 to a parameter, if nothing else is done with it; else none."""
        found: list[int] = []
        todo = [storage]
        while todo:
            storage = todo.pop()
            for index in self.flow.touching.get(storage, ()):
                step = self.flow.steps[index]
                if not step.writes or all(ref.storage != storage for ref in step.reads):
                    continue
                if step.name in COPIES:
                    todo += [ref.storage for ref in step.writes]
                elif _adds_one(step):
                    found.append(index)
                else:
                    return []
        return found

    def _refusal(self, one: _Candidate, consumers: Sequence[nn.Linear]) -> str:
        """Why the candidate cannot be the producer; empty if it can."""
        name = self.owners.name(one.module)
        if refusal := self.owners.refusal(one.module, *one.parameters):
            return refusal
        spread = Propagation(self.flow, one.source, one.channel.unique(), consumers).run()
        if spread.stopped is not None:
            return f"the output of {name} also goes into {self.flow.describe(spread.stopped)}"
        if spread.escaped:
            return f"the output of {name} is a result of the traced module"
        channel = self._agreed(consumers, spread.inputs)
        if channel is None or not torch.equal(channel, one.channel):
            return f"the layers do not all read the channels of {name} alike"
        places = set().union(*(self.flow.seen[storage] for storage in spread.reached))
        for unused, sizes, around in self.unused:
            if consumers[0].in_features in sizes and around & places:
                return f"{unused} was not used, and could read the output of {name}"
        return ""


def _data(step: Step) -> Sequence[Ref]:
    """What an operator's result may be proportional to: of attention only the values."""
    if step.name.startswith(ATTENTION):
        return [step.args[2]]
    return step.reads


def _adds_one(step: Step) -> bool:
    numbers = [arg for arg in step.args if not isinstance(arg, Ref)]
    return step.name == "add" and not step.kwargs and len(step.args) == 2 and numbers == [1]
