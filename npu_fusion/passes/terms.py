"""The canonical view of a graph: what every node *computes*, in one spelling.

An FX graph says the same thing in many ways. The passes do not match on FX nodes; they match on
:class:`Term` values, built beside the graph in one forward walk and never changing it::

    %neg = neg(%x)                                   silu(x)
    %exp = exp(%neg)
    %add = add(%exp, 1)              ──────▶
    %div = div(%x, %add)

* Equal computations are one term (hash-consing), so common subexpressions need no pass of their own. Only
  operators known to be pure are merged; everything else is a term of its own, keyed by its node.
* Arithmetic in bfloat16 or float16 is written as what PyTorch does: widen to float32, compute, round once:
  ``mul(a, b): bf16`` is ``cast(mul(cast(a, f32), cast(b, f32)), bf16)``. A rounding is thus a visible
  ``cast(cast(t, bf16), f32)`` that a matcher may step through, and must account for.
* Sizes are ``int`` or sympy expressions, never SymInts: comparing them installs no guard.
* A canonical form that is not bit-identical to its spelling carries a :class:`Drift`, which the matcher
  adds to what the numerics policy has to allow.

The rules that map operators to terms are in :mod:`npu_fusion.passes.canonicalize`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from npu_fusion import _compat
from npu_fusion.config import Numerics
from npu_fusion.passes.memory import storage_root, written_by

Size: TypeAlias = "int | sympy.Expr"

LOW_PRECISION = frozenset({torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Drift:
    """One way in which a replacement differs from its source: what, and the numerics level it needs."""

    level: Numerics
    what: str


class Term:
    """One value of the graph in canonical form.

    ``op``: name of the canonical operator, or ``"input"`` for what is not looked into (placeholders, unknown
    operators). ``args``: terms and literals (numbers, sizes, dtypes, strings, None, tuples). ``nodes``: the
    FX nodes that hold this value, in graph order; empty for values that exist only inside a node (the
    widening of an operand, say). ``serial``: order of first appearance. ``drift``: what canonicalization
    itself gave up, if anything.
    """

    __slots__ = ("_shape", "args", "drift", "dtype", "nodes", "op", "serial")

    def __init__(
        self, op: str, args: tuple[Any, ...], dtype: torch.dtype | None, drift: tuple[Drift, ...], serial: int
    ) -> None:
        self.op = op
        self.args = args
        self.dtype = dtype
        self.drift = drift
        self.serial = serial
        self.nodes: list[fx.Node] = []
        self._shape: tuple[Size, ...] | None = None

    @property
    def node(self) -> fx.Node | None:
        return self.nodes[0] if self.nodes else None

    @property
    def shape(self) -> tuple[Size, ...]:
        """Sizes; raises ``ValueError`` for a value that is not a tensor."""
        if self._shape is None:
            if self.nodes:
                self._shape = sizes_of(self.nodes[0].meta["val"].shape)
            else:
                self._shape = _shape_of_synthetic(self)
        return self._shape

    def __repr__(self) -> str:
        return f"<{self.op} {self.node.name if self.node is not None else '(no node)'}>"


def size_of(value: int | torch.SymInt) -> Size:
    """A size as int or sympy expression, without guarding."""
    if isinstance(value, torch.SymInt):
        expr = value.node.expr
        return int(expr) if expr.is_Integer else expr
    return value


def same_size(a: Size, b: Size) -> bool:
    """Are two sizes the same by how they are written, whatever the symbols are?"""
    return a == b or sympy.expand(a - b) == 0


def sizes_of(shape: Iterable[int | torch.SymInt]) -> tuple[Size, ...]:
    sizes = tuple(shape)
    for size in sizes:
        if type(size) is not int:
            return tuple(size_of(s) for s in sizes)
    return sizes


# Operators whose result has the shape of their (broadcast) operands.
_POINTWISE: set[str] = set()


def pointwise(*ops: str) -> None:
    """Declare canonical operators as elementwise (called by the canonicalization rules on import)."""
    _POINTWISE.update(ops)


_LIKE_FIRST = frozenset({"rms_norm", "npu.npu_interleave_rope.default", "write"})
"""Operators whose result has the shape of their first operand."""


def _shape_of_synthetic(term: Term) -> tuple[Size, ...]:
    """Shape of a term that no node holds. Such terms are elementwise, or carry their shape."""
    if term.op in _POINTWISE:
        shape: tuple[Size, ...] = ()
        for arg in term.args:
            if isinstance(arg, Term):
                shape = broadcast(shape, arg.shape)
        return shape
    if term.op == "half":
        base, _ = term.args
        last = base.shape[-1]
        return (*base.shape[:-1], last // 2 if isinstance(last, int) else sympy.floor(last / 2))
    if term.op in ("view", "expand", "const"):
        return term.args[1]
    if term.op in ("absmax", "amax", "amin", "mean", "sum"):
        base, dims = term.args
        return tuple(1 if d in dims else s for d, s in enumerate(base.shape))
    if term.op == "slice":
        base, dim, _, length, _ = term.args
        return (*base.shape[:dim], length, *base.shape[dim + 1 :])
    if term.op == "permute":
        base, dims = term.args
        return tuple(base.shape[d] for d in dims)
    if term.op in _LIKE_FIRST:
        return term.args[0].shape
    if term.op in ("int_mm", "bmm"):
        a, b = term.args
        return (*a.shape[:-1], b.shape[-1])
    if term.op == "swiglu":
        *lead, last = term.args[0].shape
        return (*lead, last // 2 if isinstance(last, int) else sympy.floor(last / 2))
    raise ValueError(f"the shape of {term.op} is not known")


def broadcast(a: tuple[Size, ...], b: tuple[Size, ...]) -> tuple[Size, ...]:
    if len(a) < len(b):
        a, b = b, a
    lead = len(a) - len(b)
    return a[:lead] + tuple(y if x == 1 else x for x, y in zip(a[lead:], b, strict=True))


Rule = Callable[["TermGraph", fx.Node, list[Any]], Any]

RULES: dict[Any, Rule] = {}
"""Operator overload -> rule. A rule gets all arguments of the schema, defaults filled in."""

PURE: set[Any] = set()
"""Overloads without a rule that are nevertheless pure: equal calls are one term. Filled by the rules."""


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a canonicalization rule for operator overloads."""

    def decorate(fn: Rule) -> Rule:
        for target in targets:
            if target in RULES:
                raise ValueError(f"{target} has two canonicalization rules")
            RULES[target] = fn
        return fn

    return decorate


_SIGNATURES: dict[Any, tuple[tuple[str, Any], ...]] = {}


def _signature(target: Any) -> tuple[tuple[str, Any], ...]:
    known = _SIGNATURES.get(target)
    if known is None:
        known = tuple((a.name, a.default_value) for a in target._schema.arguments)
        _SIGNATURES[target] = known
    return known


def bind(node: fx.Node) -> list[Any]:
    """All arguments of an operator call in schema order: positional, keyword, then the schema's default.

    This is what keeps a keyword argument from being ignored: a rule sees every argument there is.
    """
    if not hasattr(node.target, "_schema"):  # a higher-order operator has positional arguments only
        return list(node.args)
    signature = _signature(node.target)
    args = list(node.args)
    if len(args) == len(signature):
        return args
    kwargs = node.kwargs
    for name, default in signature[len(args) :]:
        args.append(kwargs.get(name, default) if kwargs else default)
    return args


_LITERALS = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class TermGraph:
    """The terms of one FX graph. ``of[node]`` is the node's term (or a tuple of terms, or a literal)."""

    def __init__(self, graph: fx.Graph, without: Container[fx.Node] = ()) -> None:
        """``without``: nodes to leave out, with all their users."""
        self.graph = graph
        self.of: dict[fx.Node, Any] = {}
        self._table: dict[Any, Term] = {}
        self._written: set[fx.Node] = set()
        self.terms: list[Term] = []
        """Every term that a node holds, in the order of its first node."""
        self._users: dict[Term, list[Term]] | None = None
        for node in graph.nodes:
            if node not in without:
                self._visit(node)

    def by_operator(self) -> dict[str, list[Term]]:
        """All terms there are by now, also those that no node holds."""
        found: dict[str, list[Term]] = {}
        for term in list(self._table.values()):
            found.setdefault(term.op, []).append(term)
        return found

    # -- construction ---------------------------------------------------------------------------------

    def make(
        self, op: str, args: tuple[Any, ...], dtype: torch.dtype | None, drift: tuple[Drift, ...] = ()
    ) -> Term:
        """The term ``op(*args)``; equal calls give the same object."""
        key = (op, args, dtype, drift)
        term = self._table.get(key)
        if term is None:
            term = self._table[key] = Term(op, args, dtype, drift, len(self._table))
        return term

    def constant(self, value: int | float, shape: tuple[Size, ...], dtype: torch.dtype) -> Term:
        """A tensor of one number, as its dtype holds that number."""
        with _compat.real_tensors():
            held = torch.tensor(value, dtype=dtype).item()
        return self.make("const", (held, shape), dtype)

    def users(self, term: Term) -> list[Term]:
        """The terms that have ``term`` as an operand, in the graph as it came (matching may make more)."""
        if self._users is None:
            self._users = {}
            for user in list(self._table.values()):
                for arg in user.args:
                    if isinstance(arg, Term):
                        self._users.setdefault(arg, []).append(user)
        return self._users.get(term, [])

    def held(self, term: Any) -> Any:
        """``term``, or the 16-bit value that a node holds where widening that is all there is to it."""
        if isinstance(term, Term) and not term.nodes:
            for dtype in LOW_PRECISION:
                short = self._table.get(("cast", (term, dtype), dtype, ()))
                if short is not None and short.nodes and representable(term, dtype):
                    return short
        return term

    def input(self, node: fx.Node) -> Term:
        """A term that is not looked into."""
        value = node.meta.get("val")
        return self.make("input", (node,), getattr(value, "dtype", None))

    def cast(self, term: Any, dtype: torch.dtype | None) -> Any:
        """Convert to ``dtype``; identities and exact round trips disappear."""
        if not isinstance(term, Term) or dtype is None or term.dtype == dtype:
            return term
        if term.op == "cast" and term.args[0].dtype == dtype and _is_widening(dtype, term.dtype):
            return term.args[0]
        if term.op == "cast" and dtype == torch.float32 and representable(term.args[0], term.dtype):
            return term.args[0]  # the rounding in between changed nothing
        if term.op == "const":
            return self.constant(term.args[0], term.args[1], dtype)
        if term.op == "half":  # casts go inside, so that both halves share one converted base
            base, which = term.args
            return self.make("half", (self.cast(base, dtype), which), dtype, term.drift)
        return self.make("cast", (term, dtype), dtype)

    def term(self, arg: Any) -> Any:
        """The term (or literal) of an FX argument."""
        if isinstance(arg, fx.Node):
            return self.of[arg]
        if isinstance(arg, _LITERALS):
            return arg
        if isinstance(arg, (list, tuple)):
            return tuple(self.term(a) for a in arg)
        if isinstance(arg, torch.SymInt):
            return size_of(arg)
        return repr(arg)

    def _visit(self, node: fx.Node) -> None:
        op = node.op
        value: Any
        if op == "call_function":
            written = written_by(node)
            if written or self._reads_written(node):
                value = self.input(node)
                self._written |= written
            else:
                value = self._call(node)
        elif op == "get_attr":
            value = self._attribute(node)
        elif op == "output":
            return
        else:
            value = self._symbol(node)
            if value is None:
                value = self.input(node)
        if isinstance(value, Term) and value.nodes and _size(node) != _size(value.nodes[0]):
            value = self.input(node)  # the same values in another shape: some broadcast was not seen
        self.of[node] = value
        if isinstance(value, Term):
            if not value.nodes:
                self.terms.append(value)
            value.nodes.append(node)

    def _reads_written(self, node: fx.Node) -> bool:
        """Does the node read memory that was written since it was first read? It is then not what it was."""
        return bool(self._written) and any(storage_root(n) in self._written for n in node.all_input_nodes)

    def _call(self, node: fx.Node) -> Any:
        target = node.target
        found = RULES.get(target)
        if found is not None:
            value = found(self, node, [self.term(a) for a in bind(node)])
            return self.input(node) if value is NotImplemented else value
        if target is operator.getitem:
            base, index = node.args
            base = self.of[base]  # type: ignore[index]
            if isinstance(base, tuple) and isinstance(index, int):
                return base[index]
            if isinstance(base, Term) and base.op != "input":
                return self.make("get", (base, index), node.meta["val"].dtype)
            return self.input(node)
        symbol = self._symbol(node)
        if symbol is not None:
            return symbol
        if target in PURE:
            value = node.meta.get("val")
            args = tuple(self.term(a) for a in bind(node))
            return self.make(str(target), args, getattr(value, "dtype", None))
        return self.input(node)

    def _symbol(self, node: fx.Node) -> Any:
        """A node that holds a size, as int or sympy expression."""
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            return size_of(value)
        return value if type(value) is int else None

    def _attribute(self, node: fx.Node) -> Any:
        """A constant lifted into the graph: a one-element tensor is its number."""
        value: Any = self.graph.owning_module
        for name in str(node.target).split("."):
            value = getattr(value, name, None)
        if (
            isinstance(value, torch.Tensor)
            and type(value) in (torch.Tensor, torch.nn.Parameter)
            and value.numel() == 1
            and value.device.type != "meta"
            and not value.requires_grad
        ):
            with _disable_current_modes():  # a fake mode would refuse to read it
                number = value.item()
            return self.make("const", (number, tuple(value.shape)), value.dtype)
        return self.input(node)


def _size(node: fx.Node) -> tuple[Size, ...] | None:
    """Sizes of a tensor, None for what returns several."""
    value = node.meta.get("val")
    return sizes_of(value.shape) if isinstance(value, torch.Tensor) else None


# Operators whose result is one of their operands' values, up to sign or rounding to an integer.
_KEEP_PRECISION = frozenset(
    {"neg", "abs", "round", "amax", "amin", "absmax", "half", "view", "slice", "permute", "expand"}
)


def representable(term: Any, dtype: torch.dtype | None) -> bool:
    """Does this float32 value fit into the 16-bit ``dtype`` without rounding, by how it was made?"""
    if dtype not in LOW_PRECISION or not isinstance(term, Term) or term.dtype != torch.float32:
        return False
    while term.op in _KEEP_PRECISION or (term.op == "clamp" and all(map(_small_integer, term.args[1:]))):
        term = term.args[0]
    return term.op == "cast" and term.args[0].dtype == dtype


def _small_integer(bound: Any) -> bool:
    """An open end of a clamp, or one that every 16-bit float can hold."""
    return bound is None or (isinstance(bound, (int, float)) and abs(bound) <= 256 and bound == int(bound))


def _is_widening(narrow: torch.dtype, wide: torch.dtype | None) -> bool:
    """Is narrow -> wide -> narrow the identity?"""
    if wide == torch.float32:
        return narrow in LOW_PRECISION or narrow in (torch.int8, torch.uint8)
    return wide == torch.float64 and narrow in (torch.float32, *LOW_PRECISION, torch.int8, torch.int32)
