"""SwiGLU: gate and up projection become one layer, whose output is halved, gate first.

::

    %g = gate(%x)                                 %h = gate_up(%x)
    %a = silu(%g)                                 %g, %u = chunk(%h, 2, -1)
    %u = up(%x)                         ->        %a = silu(%g)
    %m = mul(%a, %u)                              %m = mul(%a, %u)

which is the form of ``npu_swiglu`` and ``npu_dequant_swiglu_quant``. It is found by what a module's forward
computes (``torch.fx``), whatever the names of class and layers; the layers are those of
:func:`npu_fusion._mergeable.mergeable`.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from npu_fusion import _mergeable
from npu_fusion._mergeable import Names
from npu_fusion._prepare_checks import Sharing, attached, shared_memory
from npu_fusion._prepare_result import Merged, Skipped
from npu_fusion._rewritten import RewrittenForward, Traced, is_rewritten, trace
from npu_fusion.config import FusionConfig

_FUSIONS = ("swiglu", "swiglu_quant", "dequant_swiglu_quant")


@dataclass(frozen=True)
class _Gated:
    """``mul(silu(gate(x)), up(x))``, in either order of the factors."""

    gate: fx.Node
    silu: fx.Node
    up: fx.Node


@dataclass(frozen=True)
class _Pair:
    names: Names
    joined: nn.Module
    """Of the right size, still without values."""


@dataclass(frozen=True)
class SwigluPlan:
    """All that can fail for one module, but for memory, done beforehand."""

    name: str
    module: nn.Module
    forward: RewrittenForward
    pairs: Sequence[_Pair]

    @property
    def done(self) -> list[Merged]:
        return [Merged(self.name, *pair.names.halves, pair.names.merged) for pair in self.pairs]

    def carry_out(self) -> None:
        for pair in self.pairs:
            gate, up = (self.module.get_submodule(half) for half in pair.names.halves)
            _mergeable.join(pair.joined, gate, up)
        for pair in self.pairs:
            _mergeable.replace(self.module, pair.names, pair.joined)
        self.forward.install()


def plan(model: nn.Module, config: FusionConfig, sharing: Sharing) -> tuple[list[SwigluPlan], list[Skipped]]:
    """Every SwiGLU of ``model`` that can be merged, and why the others cannot."""
    plans: list[SwigluPlan] = []
    skipped: list[Skipped] = []
    off = None
    if not any(config.enabled(fusion) for fusion in _FUSIONS):
        off = f"fusion_config switches off {', '.join(_FUSIONS)}"
    for name, module in model.named_modules():
        if not _may_gate(module):
            continue
        traced = trace(module)
        if isinstance(traced, str):
            if any(_is_silu(child) for child in module.children()):
                skipped.append(Skipped(name, traced))
            continue
        pairs: list[_Pair] = []
        for gated in list(_gated_pairs(module, traced.graph)):
            obstacle = off or _obstacle(module, traced.graph, gated, sharing)
            if obstacle is None:
                pairs.append(_pair(module, gated))
                _rewrite(traced, gated, pairs[-1].names.merged)
            else:
                skipped.append(Skipped(name, obstacle))
        if pairs:
            plans.append(SwigluPlan(name, module, RewrittenForward(module, traced), pairs))
    return plans, skipped


def _may_gate(module: nn.Module) -> bool:
    """Two children are linear layers of one shape, and a forward that could use them is not yet rewritten."""
    if type(module).forward is nn.Module.forward or is_rewritten(module):
        return False
    shapes = Counter((c.in_features, c.out_features) for c in module.children() if _is_linear(c))
    return any(count > 1 for count in shapes.values())


def _is_linear(layer: nn.Module) -> bool:
    """Also wrappers and other classes of linear layers, which are then refused by name."""
    return all(isinstance(getattr(layer, name, None), int) for name in ("in_features", "out_features"))


def _gated_pairs(module: nn.Module, graph: fx.Graph) -> Iterator[_Gated]:
    for node in graph.nodes:
        for factor, up in _factors(node):
            gate = _silu_input(module, factor)
            if gate is not None and all(_linear_call(module, n) for n in (gate, up)):
                yield _Gated(gate, factor, up)


def _factors(node: fx.Node) -> Sequence[tuple[fx.Node, fx.Node]]:
    """The two factors of a product of two tensors, in both orders."""
    if (node.op, node.target) in _PRODUCTS and not node.kwargs:
        a, b = node.args
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            return (a, b), (b, a)
    return ()


_PRODUCTS = (("call_function", operator.mul), ("call_function", torch.mul), ("call_method", "mul"))


def _silu_input(module: nn.Module, node: fx.Node) -> fx.Node | None:
    is_silu = (
        node.target is F.silu
        if node.op == "call_function"
        else (node.op == "call_module" and _is_silu(module.get_submodule(str(node.target))))
    )
    return node.args[0] if is_silu and node.args and isinstance(node.args[0], fx.Node) else None


def _is_silu(activation: nn.Module) -> bool:
    """Whether the module computes silu of its input and nothing else, as that of transformers does."""
    if type(activation) is nn.SiLU:
        return True
    if type(activation).forward is nn.Module.forward or any(activation.children()):
        return False
    traced = trace(activation)
    if isinstance(traced, str):
        return False
    x, *rest = traced.graph.nodes
    silu = rest[0]
    return (
        [n.target for n in rest] == [F.silu, "output"]
        and silu.args == (x,)
        and not _in_place(activation, silu)
    )


def _linear_call(module: nn.Module, node: fx.Node) -> bool:
    """``layer(x)`` and no other arguments."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    return _is_linear(module.get_submodule(str(node.target)))


def _pair(module: nn.Module, gated: _Gated) -> _Pair:
    gate, up = str(gated.gate.target), str(gated.up.target)
    declared = tuple(name for name, _ in module.named_children() if name in (gate, up))
    names = Names(_joint_name(gate, up), (gate, up), (declared[0], declared[1]))
    return _Pair(names, _mergeable.double(module.get_submodule(gate)))


def _joint_name(gate: str, up: str) -> str:
    """``gate_proj``, ``up_proj`` -> ``gate_up_proj``; ``w1``, ``w3`` -> ``w1_w3``."""
    (gate_stem, _, gate_end), (up_stem, _, up_end) = gate.rpartition("_"), up.rpartition("_")
    if gate_stem and up_stem and gate_end == up_end:
        return f"{gate_stem}_{up_stem}_{gate_end}"
    return f"{gate}_{up}"


def _rewrite(traced: Traced, gated: _Gated, merged: str) -> None:
    graph, lines = traced.graph, traced.lines
    first = next(node for node in graph.nodes if node in (gated.gate, gated.up))
    with graph.inserting_before(first):
        both = graph.call_module(merged, first.args)
        chunks = graph.call_method("chunk", (both, 2, -1))
        halves = [graph.call_function(operator.getitem, (chunks, index)) for index in (0, 1)]
    for node in (both, chunks, *halves):
        lines[node.name] = lines[gated.gate.name]
    for old, new in zip((gated.gate, gated.up), halves, strict=True):
        old.replace_all_uses_with(new)
        graph.erase_node(old)


def _obstacle(module: nn.Module, graph: fx.Graph, gated: _Gated, sharing: Sharing) -> str | None:
    """Why the pair cannot be merged, or None.

    1. Each projection is a layer of a class that :func:`mergeable` knows, and nothing is attached to it.
    2. It is a child of the module itself, which calls it once, reads it in no other way, and alone holds it.
    3. Both are given the same input, with nothing but the activation in between, which is not in place.
    4. Their tensors agree in names, shapes, dtypes, devices and training, and are nobody else's memory, but
       for those that belong to the input, which are equal.
    5. The name of the merged layer is free.
    """
    nodes = (gated.gate, gated.up)
    names = (str(gated.gate.target), str(gated.up.target))
    gate, up = (module.get_submodule(name) for name in names)
    for name, node, layer in zip(names, nodes, (gate, up), strict=True):
        reason = _layer_obstacle(name, layer) or _use_obstacle(name, node, graph)
        if reason is not None:
            return reason
        if sharing.holders(layer) > 1:
            return f"{name} is a layer of other modules, too"
    between = list(graph.nodes)
    first, second = sorted(map(between.index, nodes))
    if gated.gate.args != gated.up.args:
        return f"{names[0]} and {names[1]} have different inputs"
    if any(node is not gated.silu for node in between[first + 1 : second]):
        return f"something else runs between {names[0]} and {names[1]}, which might change their input"
    if _in_place(module, gated.silu):
        return "the activation works in place"
    merged = _joint_name(*names)
    return (
        _difference(names, gate, up)
        or _mergeable.unlike(names, gate, up)
        or shared_memory(names, (gate, up), sharing, _mergeable.shared_names(gate))
        or (f"the module has an attribute {merged} already" if hasattr(module, merged) else None)
    )


def _layer_obstacle(name: str, layer: nn.Module) -> str | None:
    if not _mergeable.is_mergeable(layer):
        return f"{name} is a {type(layer).__name__}; accepted: {_mergeable.mergeable_names()}"
    return attached(name, layer)


def _use_obstacle(name: str, node: fx.Node, graph: fx.Graph) -> str | None:
    if "." in name:
        return f"{name} is no child of the module itself"
    reads = [n for n in graph.nodes if n.op in ("call_module", "get_attr")]
    readers = [n for n in reads if f"{n.target}.".startswith(f"{name}.")]
    if readers != [node]:
        return f"{name} is used more than once"
    if len(node.users) != 1:
        return f"the output of {name} is used more than once"
    return None


def _in_place(module: nn.Module, silu: fx.Node) -> bool:
    if silu.op == "call_function":
        return any((*silu.args[1:], *silu.kwargs.values()))
    return getattr(module.get_submodule(str(silu.target)), "inplace", False)


def _difference(names: tuple[str, str], gate: nn.Module, up: nn.Module) -> str | None:
    tensors = [layer.state_dict(keep_vars=True) for layer in (gate, up)]
    for key in sorted(tensors[0].keys() ^ tensors[1].keys()):
        has, has_not = names if key in tensors[0] else names[::-1]
        return f"{has} has a {key}, {has_not} has not"
    for key in tensors[0]:
        what = [_description(t[key]) for t in tensors]
        if what[0] != what[1]:
            return f"{names[0]}.{key} is {what[0]}, {names[1]}.{key} is {what[1]}"
    return None


def _description(tensor: Tensor) -> str:
    trained = ", trained" if tensor.requires_grad else ""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}{trained}"
