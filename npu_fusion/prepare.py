"""What a model's weights need once, before it is compiled, so that its graphs can be fused.

Weights are inputs of the graphs that a compiler sees: merging them there would be done again at every step.

SwiGLU: gate and up projection become one layer, whose output is halved, gate first::

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
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from npu_fusion import _mergeable
from npu_fusion._mergeable import Names, mergeable
from npu_fusion._rewritten import RewrittenForward, Traced, is_rewritten, trace
from npu_fusion.config import FusionConfig

__all__ = ["Merged", "Prepared", "Skipped", "mergeable", "prepare"]

_FUSIONS = ("swiglu", "swiglu_quant", "dequant_swiglu_quant")


@dataclass(frozen=True)
class Merged:
    """Two layers of one module that are one layer now."""

    module: str
    """Name of the module in the model; empty for the model itself."""
    gate: str
    up: str
    merged: str

    def __str__(self) -> str:
        return f"{self.gate} and {self.up} merged into {self.merged}"


@dataclass(frozen=True)
class Skipped:
    """A module that looks like a SwiGLU and was left as it is."""

    module: str
    reason: str

    def __str__(self) -> str:
        return f"left as it is: {self.reason}"


@dataclass(frozen=True)
class Prepared(Sequence[Merged]):
    """What :func:`prepare` did, as a sequence of :class:`Merged`, and what it did not."""

    merged: tuple[Merged, ...]
    skipped: tuple[Skipped, ...]
    dry_run: bool = False
    """Nothing was changed; ``merged`` is what would have been."""

    @overload
    def __getitem__(self, index: int) -> Merged: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Merged]: ...
    def __getitem__(self, index: int | slice) -> Merged | Sequence[Merged]:
        return self.merged[index]

    def __len__(self) -> int:
        return len(self.merged)

    def __str__(self) -> str:
        would = " (dry run: nothing was changed)" if self.dry_run else ""
        lines = [f"prepare: {len(self.merged)} SwiGLU merged, {len(self.skipped)} left as they are{would}"]
        groups: defaultdict[str, list[str]] = defaultdict(list)
        entries: Sequence[Merged | Skipped] = (*self.merged, *self.skipped)
        for entry in entries:
            groups[str(entry)].append(entry.module or "(the model)")
        for what, modules in groups.items():
            first, *rest = modules
            where = f"{first} ... {rest[-1]} ({len(modules)} modules)" if rest else first
            lines.append(f"  {where}: {what}")
        return "\n".join(lines)


def prepare(model: nn.Module, fusion_config: FusionConfig | Mapping[str, Any] | None = None) -> Prepared:
    """Prepare the weights of ``model`` for the fusions, in place and once; a second call finds nothing to do.

    Call it after the model is on its device, and quantized, but before it is compiled, sharded, or given to
    an optimizer. The projections give the same values: bit by bit for ``W8A8DynamicLinear``, up to the order
    in which the backend's matmul adds for ``torch.nn.Linear``. Run eagerly, the activation reads one half of
    each row, for which PyTorch's CPU kernel may round silu otherwise than for a tensor of its own.

    A module with a merged layer keeps its object, class, hooks and ``state_dict`` keys: it saves as, and
    loads from, checkpoints of the model as it was. Its ``parameters()`` are the merged ones. It can be copied
    with ``copy.deepcopy`` and pickled. Its forward becomes that of a ``torch.fx`` trace, in which what it
    read from Python attributes (not children, parameters and buffers) is fixed.

    While a pair is merged, the memory of one more gate and up weight is needed. If that fails, the modules
    before it stay merged, all others are as they were, and the model works; any other error comes before the
    first change.

    Args:
        fusion_config: a :class:`FusionConfig` or a dict of its fields. With ``dry_run`` nothing is changed;
            without any of the fusions ``swiglu``, ``swiglu_quant`` and ``dequant_swiglu_quant`` nothing is
            merged.

    Returns:
        What was merged, and for each module that looks like a SwiGLU why it was not.

    Raises:
        TypeError: ``model`` is not a module, or ``fusion_config`` of another type.
        ValueError: ``fusion_config`` has an unknown key or value.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare: model is a {type(model).__name__}; accepted: torch.nn.Module")
    config = FusionConfig.make(fusion_config)
    plans, skipped = _plan(model, config)
    if not config.dry_run:
        for plan in plans:
            plan.carry_out()
    merged = [Merged(p.name, *pair.names.halves, pair.names.merged) for p in plans for pair in p.pairs]
    return Prepared(tuple(merged), tuple(skipped), config.dry_run)


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
class _Plan:
    """All that can fail for one module, but for memory, done beforehand."""

    name: str
    module: nn.Module
    forward: RewrittenForward
    pairs: Sequence[_Pair]

    def carry_out(self) -> None:
        for pair in self.pairs:
            gate, up = (self.module.get_submodule(half) for half in pair.names.halves)
            _mergeable.join(pair.joined, gate, up)
        for pair in self.pairs:
            _mergeable.replace(self.module, pair.names, pair.joined)
        self.forward.install()


def _plan(model: nn.Module, config: FusionConfig) -> tuple[list[_Plan], list[Skipped]]:
    plans: list[_Plan] = []
    skipped: list[Skipped] = []
    off = None
    if not any(config.enabled(fusion) for fusion in _FUSIONS):
        off = f"fusion_config switches off {', '.join(_FUSIONS)}"
    sharing = _Sharing(model)
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
            plans.append(_Plan(name, module, RewrittenForward(module, traced), pairs))
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


class _Sharing:
    """Who holds which layer and which memory in the whole model."""

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        self._holders = Counter(child for module in modules.values() for child in module._modules.values())
        self._tensors: defaultdict[int, list[tuple[str, nn.Module, Tensor]]] = defaultdict(list)
        for name, module in modules.items():
            for key, tensor in chain(module._parameters.items(), module._buffers.items()):
                if tensor is not None:
                    self._tensors[_memory(tensor)].append((f"{name}.{key}".removeprefix("."), module, tensor))

    def holders(self, layer: nn.Module) -> int:
        return self._holders[layer]

    def other(self, layer: nn.Module, tensor: Tensor) -> str | None:
        """Name of a tensor of another module in the memory of a layer's tensor."""
        for name, owner, other in self._tensors[_memory(tensor)]:
            if owner is not layer and (other is tensor or _overlap(other, tensor)):
                return name
        return None


def _memory(tensor: Tensor) -> int:
    """Address of the storage, or identity of the tensor where there is none (meta device, subclasses)."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return (plain and tensor.untyped_storage().data_ptr()) or id(tensor)


def _overlap(a: Tensor, b: Tensor) -> bool:
    (a_start, a_end), (b_start, b_end) = _extent(a), _extent(b)
    return a_start < b_end and b_start < a_end


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _obstacle(module: nn.Module, graph: fx.Graph, gated: _Gated, sharing: _Sharing) -> str | None:
    """Why the pair cannot be merged, or None.

    1. Each projection is a layer of a class that :func:`mergeable` knows, and nothing is attached to it.
    2. It is a child of the module itself, which calls it once, reads it in no other way, and alone holds it.
    3. Both are given the same input, with nothing but the activation in between, which is not in place.
    4. Their tensors agree in names, shapes, dtypes, devices and training, and are nobody else's memory.
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
        or _memory_obstacle(names, (gate, up), sharing)
        or (f"the module has an attribute {merged} already" if hasattr(module, merged) else None)
    )


def _layer_obstacle(name: str, layer: nn.Module) -> str | None:
    if not _mergeable.is_mergeable(layer):
        return f"{name} is a {type(layer).__name__}; accepted: {_mergeable.mergeable_names()}"
    if "forward" in vars(layer):
        return f"the forward of {name} was replaced on the object"
    hooks = [key for key, value in vars(layer).items() if "hook" in key and value]
    if hooks:
        return f"{name} has hooks ({', '.join(hooks)})"
    for key, tensor in chain(layer.named_parameters(), layer.named_buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"{name}.{key} is a {type(tensor).__name__}; accepted: plain tensors"
        if tensor.grad is not None:
            return f"{name}.{key} has a gradient, which would be lost"
    return None


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


def _memory_obstacle(
    names: tuple[str, str], layers: tuple[nn.Module, nn.Module], sharing: _Sharing
) -> str | None:
    for name, layer in zip(names, layers, strict=True):
        for key, tensor in layer.state_dict(keep_vars=True).items():
            other = sharing.other(layer, tensor)
            if other is not None:
                return f"{name}.{key} shares its memory with {other}"
    return None
