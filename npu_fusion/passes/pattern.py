"""The gate that every rewrite goes through, in the base class so that no author can forget a part of it.

::

    match ─▶ constraints ─▶ numerics ─▶ kernel ─▶ region ─▶ mutation ─▶ streams ─▶ memory ─▶ replace ─▶ record

A fusion says *what* it recognizes (:meth:`Fusion.match`: a :class:`Match`, a :class:`Refused` near miss, or
None) and *how* the replacement is built (:attr:`Match.build`). The gate decides *whether*:

* constraints: conditions on sizes and dtypes, three-valued (:class:`npu_fusion.passes.checks.Truth`);
* numerics: the highest level among everything the match steps over must be allowed by the config;
* region: the FX nodes between the match's inputs and outputs. Every one of them must be used inside only (a
  second user is a refusal that names it), and every edge into the region must be one of the match's inputs,
  so nothing that the source reads can get lost;
* mutation: nothing in or around the region may write what the region reads;
* streams and scopes: no region crosses stream labels or the markers of a scope;
* host and target: every call that the replacement makes must exist there (asked while it is built);
* memory: an int32 product that the source did not have is limited by the config.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from npu_fusion.config import FusionConfig, Numerics
from npu_fusion.passes import scopes
from npu_fusion.passes.checks import Sizes, Truth, product, row_major
from npu_fusion.passes.memory import storage_root, written_by
from npu_fusion.passes.rewrite import Emitter, RewriteError, Rewriter
from npu_fusion.passes.scopes import SCOPE
from npu_fusion.passes.terms import Drift, Size, Term, TermGraph, sizes_of
from npu_fusion.passes.verify import verify
from npu_fusion.report import Fused, FusionReport, Refusal


@dataclass(frozen=True)
class Refused:
    """A near miss: the same ``reason`` for every instance of a cause; ``detail`` has this one's values."""

    reason: str
    detail: str = ""
    terms: tuple[Term, ...] = ()


@dataclass(frozen=True)
class Constraint:
    """A condition on sizes. ``relation`` is the sympy relation to guard on, where there is one."""

    truth: Truth
    reason: str
    detail: str = ""
    relation: Any = None


@dataclass
class Match:
    """A place where a fusion applies, if the gate agrees.

    ``inputs``: the terms that the replacement reads. ``outputs``: for each output of ``build``, the terms it
    replaces (all nodes that hold one of them). ``build(emitter)`` returns one node per entry of ``outputs``;
    the gate casts and views each to what it replaces.
    """

    inputs: Sequence[Term | None]
    outputs: Sequence[Sequence[Term]]
    build: Callable[[Emitter], Sequence[fx.Node]]
    drift: Sequence[Drift] = ()
    constraints: Sequence[Constraint] = ()
    operator: str | None = None
    """The operator that this match emits, where the fusion has a choice of them."""
    otherwise: Match | None = None
    """A smaller match to try where values inside this one are needed outside."""
    int32_product: tuple[Size, ...] | None = None
    """Shape of an int32 product that the replacement creates and the source did not have."""


def _live(match: Match, context: Context) -> list[list[fx.Node]]:
    """The nodes that each output of a match would replace."""
    gone, made = context.rewriter.dead, context.rewriter.made
    return [[n for t in terms for n in t.nodes if n not in gone and n not in made] for terms in match.outputs]


@dataclass
class Context:
    """What a fusion may look at while it matches."""

    view: TermGraph
    sizes: Sizes
    config: FusionConfig
    rewriter: Rewriter
    report: FusionReport
    hazards: Hazards
    memo: dict[Any, Any] = field(default_factory=dict)
    """Shared results of recognizers, keyed by (recognizer, term)."""


FUSIONS: dict[str, Fusion] = {}
"""Name -> fusion, filled when the modules of passes/lift and passes/compose are imported."""


class _OtherSize(Exception):
    """A replacement has another number of elements than what it replaces."""

    reason = "the source broadcasts where the operator does not"


class Fusion(ABC):
    """One fused operator: what it looks like in a graph and how it is put there."""

    name: ClassVar[str]
    """Also the name of its flag in FusionConfig and of its file."""
    operator: ClassVar[str | None]
    """The operator that it emits; None: plain ATen operators, and the report counts it under its name."""
    anchors: ClassVar[tuple[str, ...]]
    """Canonical operators at which :meth:`match` is tried."""
    priority: ClassVar[int]
    """Larger fusions come first; what they take is not there for the smaller ones."""
    stage: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not getattr(cls, "__abstractmethods__", None) and "name" in cls.__dict__:
            if cls.name in FUSIONS:
                raise ValueError(f"two fusions are named {cls.name!r}")
            FUSIONS[cls.name] = cls()

    @abstractmethod
    def match(self, term: Term, context: Context) -> Match | Refused | None:
        """Recognize the fusion whose last value is ``term``."""

    def apply(self, term: Term, context: Context) -> bool:
        """Match at ``term``, pass the gate, rewrite and record. True if the fusion was made."""
        found = self.match(term, context)
        if found is None:
            return False
        if isinstance(found, Refused):
            self._refuse(term, found, context)
            return False
        outputs = _live(found, context)
        if not outputs[0]:
            return False
        region = Region.between(found, [n for nodes in outputs for n in nodes], context)
        if isinstance(region, Refused) and found.otherwise is not None:
            found = found.otherwise
            outputs = _live(found, context)
            region = Region.between(found, [n for nodes in outputs for n in nodes], context)
        replaced = [n for nodes in outputs for n in nodes]
        operator = found.operator or self.operator
        refusal = (
            _constraints(found, context)
            or _numerics(found, context)
            or _kernel(operator, replaced[0])
            or _layout(replaced, context)
            or (region if isinstance(region, Refused) else None)
        )
        if refusal is None:
            assert isinstance(region, Region)
            refusal = region.hazard(context) or _memory(found, context)
        if refusal is not None:
            self._refuse(term, refusal, context)
            return False
        assert isinstance(region, Region)
        try:
            emitted = self._replace(found, outputs, region, context)
        except (_OtherSize, RewriteError) as error:
            self._refuse(term, Refused(error.reason, str(error)), context)
            return False
        context.report.fusions.append(
            Fused(
                self.name,
                operator or self.name,
                _level(found.drift).name.lower(),
                tuple(dict.fromkeys(d.what for d in found.drift)),
                tuple(n.name for n in sorted(region.nodes)),
                emitted,
                source_of(replaced[0]),
            )
        )
        return True

    def _replace(
        self, found: Match, outputs: list[list[fx.Node]], region: Region, context: Context
    ) -> tuple[str, ...]:
        rewriter = context.rewriter
        mark = rewriter.mark()
        try:
            emitter = rewriter.emitter(region.inputs, sorted(n for nodes in outputs for n in nodes))
            results = found.build(emitter)
            new: list[tuple[fx.Node, fx.Node]] = []
            for nodes, result in zip(outputs, results, strict=True):
                shaped: dict[Any, fx.Node] = {}
                for node in nodes:
                    if all(u in region.nodes for u in rewriter.live_users(node)):
                        continue
                    value = node.meta["val"]
                    form = (value.dtype, sizes_of(value.shape))
                    # Undecided is no refusal: two symbols may be one size, which the reshape then checks.
                    have = product(sizes_of(result.meta["val"].shape))
                    if context.sizes.equal(have, product(form[1])) is Truth.NO:
                        raise _OtherSize(f"{node.name} has shape {list(form[1])}")
                    if form not in shaped:
                        shaped[form] = emitter.view(emitter.cast(result, form[0]), form[1])
                    new.append((node, _as_returned(node, shaped[form], emitter)))
            if context.config.dry_run:  # built only to see that it can be
                rewriter.rollback(mark)
                rewriter.pretend(region.nodes, [old for old, _ in new])
                return ()
            if context.config.verify:
                verify(self.name, region, new, emitter, _level(found.drift))
            for old, replacement in new:
                rewriter.redirect(old, replacement, region.nodes)
                rewriter.note_layout(old, replacement)
            rewriter.retire(region.nodes)
            rewriter.retire(u for n in region.nodes for u in n.users if _ignores_value(u))
        except BaseException:
            rewriter.rollback(mark)
            raise
        for old, replacement in new:
            term = context.view.of[old]
            context.view.of[replacement] = term
            term.nodes = [replacement if n is old else n for n in term.nodes]
            rewriter.made.add(replacement)
        return tuple(n.name for n in emitter.nodes)

    def _refuse(self, term: Term, refusal: Refused, context: Context) -> None:
        nodes = [n for t in (refusal.terms or (term,)) for n in t.nodes]
        if not nodes:
            nodes = term.nodes
        context.report.refused.append(
            Refusal(
                self.name,
                refusal.reason,
                refusal.detail,
                tuple(n.name for n in nodes),
                source_of(nodes[0]) if nodes else None,
            )
        )


def _as_returned(old: fx.Node, new: fx.Node, e: Emitter) -> fx.Node:
    """``new``, contiguous where ``old`` is and leaves the graph: what comes after may view it."""
    if row_major(new.meta["val"]) or not row_major(old.meta["val"]):
        return new
    pending = [old]
    while pending:
        for user in e.rewriter.live_users(pending.pop()):
            if user.op == "output":
                return e.call(torch.ops.aten.clone.default, new, memory_format=torch.contiguous_format)
            if getattr(user.target, "is_view", False) or user.target in _VIEWS:
                pending.append(user)
    return new


_VIEWS = frozenset({torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default})


@dataclass
class Region:
    """The FX nodes that a match replaces: everything between its inputs and its outputs."""

    nodes: frozenset[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]

    @classmethod
    def between(cls, match: Match, outputs: list[fx.Node], context: Context) -> Region | Refused:
        dead = context.rewriter.dead
        stops = {n for t in match.inputs if t is not None for n in held_by(t) if n not in dead}
        inside: dict[fx.Node, None] = {}
        used: dict[fx.Node, None] = {}
        pending = list(outputs)
        while pending:
            node = pending.pop()
            if node in inside:
                continue
            if node in stops and node not in outputs:
                used[node] = None
                continue
            if node.op != "call_function":
                if _is_size_or_constant(node, context):
                    continue
                return Refused(
                    "the source reads a value that the fused operator has no argument for",
                    f"it reads {node.name}",
                )
            if _holds_size(node) or (_is_empty(node) and not _is_empty(outputs[0])):
                continue
            inside[node] = None
            pending.extend(_read_by(node))
        ends = set(outputs)
        # Nodes before the first output cannot depend on it, nodes before the region not on any of it, unless
        # insertions behind their users wait for the final sort.
        late, start = context.rewriter.late, min(inside)
        first = min(outputs) if late is None else start if not start < late else None
        late_input = _depending(used, inside, first)
        if late_input is not None:
            shown = f"{late_input.name} is computed from what is replaced"
            return Refused("an input depends on an output", shown)
        for node in inside:
            if node in ends:
                continue
            for user in node.users:
                if user not in inside and user not in dead and not _ignores_value(user):
                    what = (
                        node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
                    )
                    return Refused(
                        "an intermediate value that the fused operator does not return has a second user",
                        f"{node.name} ({what}) is also used by {user.name}",
                        (context.view.of[node],) if isinstance(context.view.of.get(node), Term) else (),
                    )
        return cls(frozenset(inside), list(used), list(outputs))

    def hazard(self, context: Context) -> Refused | None:
        """Mutation of what the region reads, or stream labels that it crosses."""
        labels = {scopes.stream_of(n) for n in self.nodes}
        if len(labels) > 1:
            shown = ", ".join(sorted(repr(label) for label in labels))
            return Refused("the nodes run on different streams", f"stream labels {shown}")
        within = {n.meta.get(SCOPE, ()) for n in self.nodes}
        if len(within) > 1:
            shown = "; ".join(sorted("in " + (", ".join(names) or "none") for names in within))
            return Refused("the nodes are in different scopes", shown)
        return context.hazards.between(self, max(self.nodes))


def _read_by(node: fx.Node) -> list[fx.Node]:
    """The inputs whose entries a node reads.

    Not the graph's input that ``copy(input, x)`` takes shape and dtype from, to be written to it at the end.
    """
    sources = node.all_input_nodes
    if node.target is torch.ops.aten.copy.default:
        into, copied = sources[0], sources[-1]
        if into is not copied and storage_root(into).op == "placeholder":
            return [copied]
    return sources


def _depending(nodes: Iterable[fx.Node], region: Container[fx.Node], first: fx.Node | None) -> fx.Node | None:
    """One of ``nodes`` that is computed from a node of the region. Only nodes after ``first`` (if given) can
    be."""
    seen: set[fx.Node] = set()
    for node in nodes:
        pending = [node] if first is None or node > first else []
        while pending:
            for source in pending.pop().all_input_nodes:
                if source in region:
                    return node
                if source not in seen and (first is None or source > first):
                    seen.add(source)
                    pending.append(source)
    return None


def held_by(term: Term) -> list[fx.Node]:
    """The nodes that hold ``term``, or for a value inside a node, what it is made of."""
    if term.nodes:
        return term.nodes
    return [n for arg in term.args if isinstance(arg, Term) for n in held_by(arg)]


def _holds_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, int))


def _is_size_or_constant(node: fx.Node, context: Context) -> bool:
    term = context.view.of.get(node)
    return _holds_size(node) or (isinstance(term, Term) and term.op == "const")


def _is_empty(node: fx.Node) -> bool:
    """A tensor without entries, such as the rotary part of a key that has none."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and any(type(s) is int and s == 0 for s in value.shape)


def _ignores_value(user: fx.Node) -> bool:
    """Users that check metadata only, or take no entries, and go with what they read."""
    return user.target is torch.ops.aten._assert_tensor_metadata.default or _is_empty(user)


class Hazards:
    """Nodes that write to memory, begin and end scopes, or order streams; found once per graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.markers, self.events = scopes.label(graph)
        self.writers: list[tuple[fx.Node, set[fx.Node]]] = []
        for node in graph.nodes:
            written = written_by(node)
            if written:
                self.writers.append((node, written))

    def between(self, region: Region, end: fx.Node) -> Refused | None:
        """Does a node up to the region's end write what the region reads, after the region began?"""
        if not self.writers and not self.markers and not self.events:
            return None
        start, first = min(region.nodes), min(region.outputs)
        event = next((event for event in self.events if start < event < end), None)
        if event is not None:
            return Refused("a stream records or waits for an event in between", event.name)
        last = max(region.inputs, default=start)
        if last > first and any(first < node < last for node in self.markers):
            return Refused(
                "the graph would have to be reordered over the border of a scope",
                f"the last input comes after {first.name}",
            )
        if last > first and any(first < node < last for node, _ in self.writers):
            return Refused(
                "the graph would have to be reordered, and it writes to memory",
                f"the last input comes after {first.name}",
            )
        read = {storage_root(n) for n in region.inputs}
        for node, written in self.writers:
            if start < node < end and written & read:
                names = ", ".join(sorted(n.name for n in written & read))
                return Refused("an input is written in between", f"{node.name} writes {names}")
        return None


def _constraints(match: Match, context: Context) -> Refused | None:
    for constraint in match.constraints:
        truth = constraint.truth
        if truth is Truth.UNKNOWN and constraint.relation is not None and context.config.symbolic == "guard":
            truth = Truth.YES if context.sizes.guard(constraint.relation) else Truth.NO
        if truth is Truth.YES:
            continue
        detail = constraint.detail
        if truth is Truth.UNKNOWN:
            detail = f"{detail}; symbolic sizes leave it open (symbolic='guard' would decide)".lstrip("; ")
        return Refused(constraint.reason, detail)
    return None


def _level(drift: Sequence[Drift]) -> Numerics:
    return max((d.level for d in drift), default=Numerics.STRICT)


def _numerics(match: Match, context: Context) -> Refused | None:
    allowed = context.config.level
    for drift in match.drift:
        if drift.level > allowed:
            return Refused(
                f"numerics={context.config.numerics!r} does not allow the difference",
                f"{drift.what} (needs {drift.level.name.lower()!r})",
            )
    return None


_READS_LAYOUT = frozenset(
    {
        torch.ops.aten.as_strided.default,
        torch.ops.aten.view_as_complex.default,
        torch.ops.aten.view.dtype,
    }
)
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "npu": "PrivateUse1"}


def _layout(replaced: Sequence[fx.Node], context: Context) -> Refused | None:
    """A reader of strides or of the storage behind a value would see those of the operator's own output."""
    for node in replaced:
        pending = [node]
        while pending:
            for user in context.rewriter.live_users(pending.pop()):
                if user.target in _READS_LAYOUT:
                    return Refused(
                        "the result is read by its memory layout", f"{user.name} reads {node.name}"
                    )
                if getattr(user.target, "is_view", False):
                    pending.append(user)
    return None


def _kernel(operator: str | None, replaced: fx.Node) -> Refused | None:
    """Is there something to run on the device of the graph?"""
    if operator is None:
        return None
    device = replaced.meta["val"].device.type
    key = _DISPATCH_KEYS.get(device)
    if device == "meta" or (
        key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{operator}", key)
    ):
        return None
    return Refused("the operator has no kernel for this device", device)


def _memory(match: Match, context: Context) -> Refused | None:
    shape, config = match.int32_product, context.config
    if shape is None:
        return None
    row = shape[-1]
    per_token = config.int32_bytes_per_token
    if per_token is not None:
        bound = context.sizes.upper_bound(row)
        if bound is None or 4 * bound > per_token:
            return Refused(
                "the int32 product needs more bytes per token than int32_bytes_per_token allows",
                f"4 x {row} bytes, limit {per_token}",
            )
    if config.int32_product_bytes is not None:
        bound = context.sizes.upper_bound(product(shape))
        if bound is None or 4 * bound > config.int32_product_bytes:
            most = "unbounded" if bound is None else str(4 * bound)
            return Refused(
                "the int32 product needs more bytes than int32_product_bytes allows",
                f"up to {most} bytes for shape {list(shape)}, limit {config.int32_product_bytes}",
            )
    return None


_PACKAGE = str(Path(__file__).resolve().parents[1])


def source_of(node: fx.Node) -> str | None:
    """``file:line`` of the innermost frame of the user's code that the node came from.

    Frames of this package (a quantized linear, say) say nothing to the user and are passed over, unless there
    is no other.
    """
    return users_line(node.meta.get("stack_trace") or "")


@functools.lru_cache(maxsize=1024)  # the layers of a model share their lines
def users_line(stack_trace: str) -> str | None:
    """:func:`source_of` for the text of a stack trace."""
    frames = []
    for line in stack_trace.splitlines():
        line = line.strip()
        if line.startswith('File "'):
            path, _, rest = line[len('File "') :].partition('", line ')
            frames.append((path, rest.split(",")[0].strip()))
    outside = [frame for frame in frames if not frame[0].startswith(_PACKAGE)]
    for path, line in reversed(outside or frames):
        return f"{path}:{line}"
    return None
