"""Changing an FX graph so that every change can be taken back.

New nodes are inserted and uses are redirected; the nodes that fell out of use stay in place until
:meth:`Rewriter.commit` removes them. Until then :meth:`Rewriter.rollback` restores the graph exactly.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.passes.shape_prop import TensorMetadata

from npu_fusion import _compat
from npu_fusion.meta_impls._registry import NAMESPACE, OPERATORS
from npu_fusion.passes.checks import row_major
from npu_fusion.passes.scopes import SCOPE, place_of
from npu_fusion.passes.terms import Size, Term, TermGraph, size_of, sizes_of

aten = torch.ops.aten

_OWN_LAYOUT = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten._int_mm.default})
"""Operators whose result is contiguous whatever the layout of their operands."""

_ROW_MAJOR: dict[str, Any] = {"memory_format": torch.contiguous_format}

_RESHAPES = frozenset({aten.view.default, aten.reshape.default})

_LABELS = (
    "stream_label",
    "deterministic_scope_level",
    "core_limit_scope",
    "custom",
    "nn_module_stack",
    SCOPE,
)

Admission = Callable[[Any, Sequence[Any], Mapping[str, Any]], "str | None"]
"""Asked for every call that a replacement needs: None, or why host or target do not take it."""


class RewriteError(RuntimeError):
    """A replacement that cannot be put into the graph as built."""

    reason = "the replacement cannot be written down in this graph"


class NotAdmitted(RewriteError):
    """A replacement that needs a call which host or target do not take."""

    reason = "the host or the target does not take the replacement"


def order(graph: fx.Graph) -> None:
    """Put every node after its inputs: one that comes too late moves before its first user, the rest stay."""
    placed: set[fx.Node] = set()
    for node in list(graph.nodes):
        pending, begun = [node], set()
        while pending:
            top = pending[-1]
            late = [n for n in top.all_input_nodes if n not in placed]
            if not late:
                pending.pop()
                if top is not node and top not in placed:
                    node.prepend(top)
                placed.add(top)
            elif top not in begun:
                begun.add(top)
                pending.extend(late)
            else:
                raise RewriteError(f"{top.name} depends on itself")


class Rewriter:
    """All changes that one pipeline run makes to one graph."""

    def __init__(self, view: TermGraph, decomposed: bool, admission: Admission | None = None) -> None:
        self.view = view
        self.graph = view.graph
        self.decomposed = decomposed
        """Whether new nodes must be in Inductor's decomposed dialect."""
        self.admission = admission
        self.fake_mode = _compat.find_fake_mode(self.graph)
        self.dead: dict[fx.Node, None] = {}
        self.made: set[fx.Node] = set()
        """Nodes that stand for a replaced value; they are not matched again."""
        self.needs_sort = False
        self.late: fx.Node | None = None
        """Before this node stand all nodes that come after one of their users, until the graph is sorted."""
        self._journal: list[tuple[fx.Node, tuple[Any, ...], dict[str, Any]]] = []
        self._added: list[fx.Node] = []
        self._fakes: dict[Any, Any] = {}
        self.shared_nodes: dict[Any, fx.Node] = {}
        self._size_nodes: dict[Any, fx.Node] | None = None
        self._moved: set[fx.Node] = set()

    # -- redirecting uses -----------------------------------------------------------------------------

    def live_users(self, node: fx.Node) -> list[fx.Node]:
        return [u for u in node.users if u not in self.dead]

    def redirect(self, old: fx.Node, new: fx.Node, keep: frozenset[fx.Node] = frozenset()) -> None:
        """Make every live user of ``old`` (but those in ``keep``) use ``new``."""
        for user in list(old.users):
            if user is new or user in keep or user in self.dead:
                continue
            self._journal.append((user, user.args, dict(user.kwargs)))
            user.replace_input_with(old, new)

    def note_layout(self, old: fx.Node, new: fx.Node) -> None:
        """Remember a replacement that lies otherwise in memory than what it replaces."""
        if _form(old)[1] != _form(new)[1]:
            self._moved.add(new)

    def retire(self, nodes: Iterable[fx.Node]) -> None:
        """These nodes have been replaced: their uses no longer count."""
        self.dead.update(dict.fromkeys(nodes))

    def pretend(self, nodes: frozenset[fx.Node], outputs: Iterable[fx.Node]) -> None:
        """For a dry run: account for a replacement of ``nodes`` whose ``outputs`` stay and stand for it."""
        read = {n for n in outputs if any(u not in nodes for u in self.live_users(n))}
        self.made.update(read)
        self.retire(nodes - read)

    def look_again(self) -> TermGraph:
        """The canonical view of the graph as rewritten so far; what was made may be matched and replaced."""
        self.sort()
        gone: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if (node.users or node in self.dead) and all(u in gone for u in node.users):
                gone.add(node)
        self.view = TermGraph(self.graph, gone)
        self.made.clear()
        return self.view

    def sort(self) -> None:
        """Put what was inserted behind its users in front of them."""
        if self.needs_sort:
            order(self.graph)
            self.needs_sort, self.late = False, None

    def mark(self) -> tuple[int, int, int]:
        return len(self._journal), len(self._added), len(self.dead)

    def rollback(self, mark: tuple[int, int, int] = (0, 0, 0)) -> None:
        """Undo everything since ``mark`` (or everything)."""
        journal, added, dead = mark
        for user, args, kwargs in reversed(self._journal[journal:]):
            user.args, user.kwargs = args, kwargs
        del self._journal[journal:]
        gone = set(self._added[added:])
        self.shared_nodes = {key: node for key, node in self.shared_nodes.items() if node not in gone}
        for node in reversed(self._added[added:]):
            self.graph.erase_node(node)
        del self._added[added:]
        for node in list(self.dead)[dead:]:
            del self.dead[node]
        self._size_nodes = None

    def commit(self) -> None:
        """Order the graph, drop what is no longer used, and check the result."""
        self.sort()
        self.graph.lint()  # while everything can still be taken back
        for node in sorted([*self.dead, *self._added], reverse=True):
            self._erase_unused(node)
        self._relax_views()
        self._skip_round_trips()
        self._journal.clear()
        self._added.clear()

    def _relax_views(self) -> None:
        """Let every view of a value whose layout may have changed copy it, which it may have to do now.

        A rotated query, say, is contiguous where the source had the transposed layout of its input; attention
        gives its result the layout of the query, and the model views that. Inductor's dialect has ``reshape``
        for this, the other one a copy in front of the view: see :meth:`Emitter.view`.
        """
        if not self._moved:
            return
        exact = frozenset(self._moved)  # of the values behind these only the old layout is noted
        for node in self.graph.nodes:
            if node not in self._moved:
                if node.target in _OWN_LAYOUT or not any(n in self._moved for n in node.all_input_nodes):
                    continue
                self._moved.add(node)
            if node.target not in _RESHAPES:
                continue
            source = node.all_input_nodes[0]
            if self.decomposed:
                node.target = aten.reshape.default
                continue
            if source in self._moved and not (source in exact and row_major(source.meta["val"])):
                value = source.meta["val"]
                with self.graph.inserting_before(node):
                    whole = self.graph.call_function(aten.clone.default, (source,), _ROW_MAJOR)
                whole.meta = {label: node.meta[label] for label in _LABELS if label in node.meta}
                whole.meta["val"] = value.new_empty(value.shape)
                node.replace_input_with(source, whole)
            if row_major(node.meta["val"]):
                self._moved.discard(node)

    def _skip_round_trips(self) -> None:
        """Read a value itself where a new view and one that was there before lead from it and back.

        A cache that comes out of a fused operator as rows, and is viewed as the model's pages again, then is
        the operator's own output, and torchair sees that it can be written in place.
        """
        added = set(self._added)
        for node in list(self.graph.nodes):
            if node.target not in _RESHAPES or any(user.op == "output" for user in node.users):
                continue
            chain = [node]
            while chain[-1].target in _RESHAPES:
                chain.append(chain[-1].args[0])
            if added.isdisjoint(chain[:-1]):
                continue
            form = _form(node)
            same = next((source for source in chain[1:] if _form(source) == form), None)
            if same is not None:
                node.replace_all_uses_with(same)
                self._erase_unused(node)

    def _erase_unused(self, node: fx.Node) -> None:
        """Erase a node without users, and what that leaves without users."""
        pending = [node]
        while pending:
            node = pending.pop()
            if node.users or node._erased or node.op != "call_function":
                continue
            if node not in self.dead and node.is_impure():  # a retired one only checks what is gone
                continue
            inputs = node.all_input_nodes
            self.graph.erase_node(node)
            pending.extend(inputs)

    # -- building -------------------------------------------------------------------------------------

    def emitter(self, inputs: Iterable[fx.Node], outputs: Sequence[fx.Node]) -> Emitter:
        """Where a replacement goes: before the first output, or after the last input where that is later."""
        inputs, first = list(inputs), min(outputs)
        latest = max(inputs, default=None)
        emitter = Emitter(self, outputs[0], frozenset(inputs))
        if latest is None or latest < first:
            emitter.before = first
        else:
            emitter.before = latest.next
            self.has_late(emitter.before)
        return emitter

    def has_late(self, before: fx.Node) -> None:
        """A node in front of ``before`` has users in front of itself."""
        self.needs_sort = True
        if self.late is None or before > self.late:
            self.late = before

    def added_nodes(self) -> list[fx.Node]:
        return list(self._added)

    def added(self, node: fx.Node) -> None:
        self._added.append(node)

    def fake(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``target`` returns by its fake implementation.

        The layers of a model repeat the same shapes, and with symbolic sizes a fake tensor takes longer to
        make than a match to find: equal calls share their result. (Sharing can only make a reader of
        storages see an alias too many, never one too few.)
        """
        key = (target, _signature_of(args), _signature_of(tuple(kwargs.items())))
        if key not in self._fakes:
            fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            with self.fake_mode or contextlib.nullcontext():
                result = target(*fake_args, **fake_kwargs)
                _require_same_types(target, fake_args, fake_kwargs, result)
            self._fakes[key] = result
        return self._fakes[key]

    def size_node(self, size: sympy.Expr, before: fx.Node) -> fx.Node | None:
        """A node of the graph that holds this symbolic size."""
        if self._size_nodes is None:
            self._size_nodes = {}
            for node in self.graph.nodes:
                value = node.meta.get("val")
                if isinstance(value, torch.SymInt):
                    self._size_nodes.setdefault(size_of(value), node)
        found = self._size_nodes.get(size)
        return found if found is not None and found < before else None


def _require_same_types(target: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Refuse a call of torch_npu's operator whose Meta kernel says other dtypes than ours.

    npu_mla_prolog always gives bfloat16 there; a compiler for the CPU would take the float32 of our kernel
    for that.
    """
    declared = None
    if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
        declared = OPERATORS.get(target.name().partition("::")[2])
    if declared is None or not declared.beside:
        return
    theirs, ours = ([t.dtype for t in _tensors(r)] for r in (result, declared.fake(*args, **kwargs)))
    if theirs != ours:
        raise RewriteError(
            f"{declared.name} of torch_npu returns {theirs}, for these inputs it should be {ours}"
        )


def _tensors(result: Any) -> list[torch.Tensor]:
    values = result if isinstance(result, (tuple, list)) else [result]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _form(node: fx.Node) -> Any:
    """Sizes and strides of a node's value."""
    value = node.meta["val"]
    return sizes_of(value.shape), sizes_of(value.stride())


def _signature_of(value: Any) -> Any:
    """What of an argument a fake implementation can depend on, hashable."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.device, sizes_of(value.shape), sizes_of(value.stride()))
    if isinstance(value, torch.SymInt):
        return size_of(value)
    if isinstance(value, (list, tuple)):
        return tuple(_signature_of(v) for v in value)
    return (type(value), value)


def _without_defaults(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call as a traced one looks: without arguments that are at their default. Patterns of others compare
    with that."""
    defaults = _defaults(target)
    if not defaults:
        return args, kwargs
    names = list(defaults)
    given = len(args)
    while given and _is_default(defaults[names[given - 1]], args[given - 1]):
        given -= 1
    return args[:given], {
        name: value
        for name, value in kwargs.items()
        if name not in defaults or not _is_default(defaults[name], value)
    }


_NO_DEFAULT = object()


@functools.cache  # a schema makes its arguments anew at every look
def _defaults(target: Any) -> dict[str, Any]:
    """Name of each argument of an operator, in order -> its default."""
    schema = getattr(target, "_schema", None)
    arguments = () if schema is None else schema.arguments
    return {a.name: a.default_value if a.has_default_value() else _NO_DEFAULT for a in arguments}


def _is_default(default: Any, value: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


def _tensor_meta(value: torch.Tensor) -> TensorMetadata:
    """What AOTAutograd notes beside the fake value of every node, and torchair's patterns read."""
    return TensorMetadata(
        value.shape, value.dtype, value.requires_grad, value.stride(), None, value.is_quantized, {}
    )


class Emitter:
    """Creates the nodes of one replacement, each with its fake value and the labels of what it replaces."""

    def __init__(
        self, rewriter: Rewriter, template: fx.Node, inputs: frozenset[fx.Node] = frozenset()
    ) -> None:
        self.rewriter = rewriter
        self.template = template
        self.inputs = inputs
        """What the replaced nodes read."""
        self.before: fx.Node = template
        self.nodes: list[fx.Node] = []

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert ``target(*args, **kwargs)``; its fake implementation gives shape and dtype, or refuses.

        Raises :class:`NotAdmitted` where the host or the target does not take the call.
        """
        args, kwargs = _without_defaults(target, args, kwargs)
        admission = self.rewriter.admission
        why_not = admission(target, args, kwargs) if admission is not None else None
        if why_not is not None:
            raise NotAdmitted(why_not)
        graph = self.rewriter.graph
        with graph.inserting_before(self.before):
            node = graph.call_function(target, args, kwargs)
        self.rewriter.added(node)
        self.nodes.append(node)
        meta = self.template.meta
        for label in ("stack_trace", *_LABELS):
            if label in meta:
                node.meta[label] = meta[label]
        value = node.meta["val"] = self._fake(target, args, kwargs)
        if isinstance(value, torch.Tensor):
            node.meta["tensor_meta"] = _tensor_meta(value)
        return node

    def _fake(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is operator.getitem:
            return args[0].meta["val"][args[1]]
        return self.rewriter.fake(target, args, kwargs)

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return self.call(operator.getitem, node, index)

    def term(self, term: Term, dtype: torch.dtype | None = None) -> fx.Node:
        """The node that holds ``term``, made if it exists only inside another node; cast to ``dtype``."""
        live = [n for n in term.nodes if n not in self.rewriter.dead]
        # Of equal values none that only another stream or scope computes, unless the source reads it.
        here = place_of(self.template)
        near = (n for n in live if n.op == "placeholder" or n in self.inputs or place_of(n) == here)
        node = next(near, live[0] if live else term.node)
        if node is None:
            if term.op == "cast":
                node = self.term(term.args[0])
                dtype = dtype or term.dtype
            elif term.op == "view":
                node = self.view(self.term(term.args[0]), term.args[1])
            elif term.op == "const" and term.dtype is not None:  # what a node holds in another dtype
                node = self.full(self.sizes(term.args[1]), term.args[0], term.dtype)
            else:
                raise RewriteError(f"no node of the graph holds {term.op}")
        return self.cast(node, dtype)

    def cast(self, node: fx.Node, dtype: torch.dtype | None) -> fx.Node:
        if dtype is None or node.meta["val"].dtype == dtype:
            return node
        if self.rewriter.decomposed:
            return self.call(torch.ops.prims.convert_element_type.default, node, dtype)
        return self.call(aten._to_copy.default, node, dtype=dtype)

    def full(self, sizes: Sequence[Any], value: int | float, dtype: torch.dtype = torch.float32) -> fx.Node:
        """A tensor of one number, on the device of what is replaced."""
        device = self.template.meta["val"].device
        number = float(value) if dtype.is_floating_point else value
        return self.call(aten.full.default, list(sizes), number, dtype=dtype, device=device)

    def shared(self, key: Any, build: Callable[[], fx.Node]) -> fx.Node:
        """What ``build`` makes, made once for all replacements that ask with the same ``key`` and run in the
        same stream and scope."""
        known = self.rewriter.shared_nodes
        key = (key, place_of(self.template))
        if key not in known:
            known[key] = build()
        elif not known[key] < self.before:
            self.rewriter.has_late(known[key].next)
        return known[key]

    def arange(self, length: Size, step: Any = 1) -> fx.Node:
        """int64 [length]: 0, step, 2 * step .."""
        (count,) = self.sizes((length,))
        device = self.template.meta["val"].device
        if self.rewriter.decomposed:
            options = {"start": 0, "step": step, "dtype": torch.int64, "device": device}
            return self.call(torch.ops.prims.iota.default, count, **options, requires_grad=False)
        positions = self.call(aten.arange.default, count, dtype=torch.int64, device=device)
        return positions if step == 1 else self.call(aten.mul.Tensor, positions, step)

    def view(self, node: fx.Node, shape: tuple[Size, ...]) -> fx.Node:
        """``node`` viewed as ``shape``; nothing where it has that shape already.

        A value that is not known to lie row by row is copied first, as AOTAutograd writes it: torchair takes
        every ``reshape`` for a view, and would lose a transposition in front of one that copies.
        """
        have = sizes_of(node.meta["val"].shape)
        if have == shape:
            return node
        if not self.rewriter.decomposed and not row_major(node.meta["val"]):
            node = self.call(aten.clone.default, node, **_ROW_MAJOR)
        return self.call(aten.reshape.default, node, self.sizes(shape, infer=True))

    def size(self, node: fx.Node, dim: int) -> Any:
        """One size of ``node`` as an argument."""
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, node, dim)

    def sizes(self, shape: tuple[Size, ...], infer: bool = False) -> list[Any]:
        """A shape as arguments: numbers, nodes for symbolic sizes, and with ``infer`` one -1 for an unknown.

        Raises :class:`RewriteError` where no node of the graph holds a size.
        """
        arguments: list[Any] = []
        inferred = not infer
        for size in shape:
            if isinstance(size, int):
                arguments.append(size)
                continue
            found = self.rewriter.size_node(size, self.before)
            if found is None and inferred:
                raise RewriteError(f"no node of the graph holds the size {size}")
            arguments.append(-1 if found is None else found)
            inferred = inferred or found is None
        return arguments
