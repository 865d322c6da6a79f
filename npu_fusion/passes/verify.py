"""``FusionConfig.verify``: run a region and its replacement on random inputs of the traced shapes, compare.

Symbolic sizes take the values they were traced with. Tolerances by numerics level: strict is bit-identical;
otherwise int8 may differ by 2, in at most a quarter of the elements (quotients in 16 bits round often), and
floating results by 1 % of the largest value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from npu_fusion import _compat
from npu_fusion.config import Numerics
from npu_fusion.passes.terms import Term

if TYPE_CHECKING:
    from npu_fusion.passes.pattern import Region
    from npu_fusion.passes.rewrite import Emitter

INT8_STEP, INT8_FRACTION, FLOAT_RELATIVE = 2, 0.25, 1e-2


class FusionVerificationError(RuntimeError):
    """A replacement does not compute what the region it replaces computes."""


def verify(
    fusion: str,
    region: Region,
    replaced: Sequence[tuple[fx.Node, fx.Node]],
    emitter: Emitter,
    level: Numerics,
) -> None:
    """Raise :class:`FusionVerificationError` unless every pair of ``replaced`` (old, new) agrees."""
    with _compat.real_tensors():
        _verify(fusion, region, replaced, emitter, level)


def _verify(
    fusion: str,
    region: Region,
    replaced: Sequence[tuple[fx.Node, fx.Node]],
    emitter: Emitter,
    level: Numerics,
) -> None:
    generator = torch.Generator().manual_seed(0)
    given: dict[fx.Node, Any] = {}
    added = set(emitter.rewriter.added_nodes())
    read = (n for new in emitter.nodes for n in new.all_input_nodes if n not in added)
    for node in sorted({*region.inputs, *read}):
        if node in given:
            continue
        base = _base(node)
        if base not in given:
            given[base] = _random_like(base.meta["val"], generator, _is_scale(node.meta["val"]))
        value = given[base] if base is node else _evaluate([node], given)[node]
        held = emitter.rewriter.view.of.get(node)
        # the replacement may read another node that holds the same value
        given.update(dict.fromkeys(held.nodes if isinstance(held, Term) else [], value) | {node: value})
    source = _evaluate(sorted(region.nodes), given)
    fused = _evaluate(emitter.nodes, given)
    for old, new in replaced:
        problem = _difference(source[old], fused[new], level)
        if problem is not None:
            raise FusionVerificationError(
                f"{fusion}: {new.name} does not reproduce {old.name} on random inputs "
                f"({level.name.lower()}): {problem}"
            )


def _base(node: fx.Node) -> fx.Node:
    """What an input is a view of: two views of one tensor must agree."""
    while node.op == "call_function" and (getattr(node.target, "is_view", False) or node.target in _VIEWS):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        node = source
    return node


aten = torch.ops.aten
_VIEWS = frozenset({aten.reshape.default, aten._unsafe_view.default, aten.clone.default})


def _is_scale(value: Any) -> bool:
    """By its shape: one row, or one column."""
    if not isinstance(value, torch.Tensor):
        return False
    shape = [_compat.hint(s) for s in value.shape]
    return len(shape) < 2 or shape[-1] == 1 or all(s == 1 for s in shape[:-1])


def _random_like(value: Any, generator: torch.Generator, is_scale: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return _compat.hint(value)
    shape = [_compat.hint(s) for s in value.shape]
    if value.dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    if value.dtype == torch.int64:  # indices: each must be inside of what it indexes, whatever that is
        return torch.randperm(math.prod(shape), generator=generator).reshape(shape)
    if value.dtype.is_complex:
        return torch.randn(shape, dtype=value.dtype, generator=generator)
    if not value.dtype.is_floating_point:
        return torch.randint(-20_000, 20_001, shape, generator=generator).to(value.dtype)
    if is_scale:  # scales are small and positive; anything else would saturate or divide by zero
        return (torch.rand(shape, generator=generator) * 0.02 + 1e-3).to(value.dtype)
    return torch.randn(shape, generator=generator).to(value.dtype)


def _evaluate(nodes: Iterable[fx.Node], given: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    values = dict(given)

    def lookup(node: fx.Node) -> Any:
        if node not in values:
            if node.op == "get_attr":
                values[node] = _attribute(node)
            elif node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
                # a constant made in the graph, such as full([], c)
                args, kwargs = fx.map_arg((node.args, node.kwargs), lookup)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            elif isinstance(node.meta.get("val"), torch.Tensor):
                raise FusionVerificationError(f"{node.name} is read but is no input of the match")
            else:
                values[node] = _compat.hint(node.meta["val"])
        return values[node]

    for node in nodes:
        if node not in values:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lookup)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values


def _attribute(node: fx.Node) -> Any:
    value: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def _difference(source: torch.Tensor, fused: torch.Tensor, level: Numerics) -> str | None:
    """What is wrong, or None."""
    if source.shape != fused.shape or source.dtype != fused.dtype:
        return f"{fused.dtype} {list(fused.shape)} instead of {source.dtype} {list(source.shape)}"
    if level is Numerics.STRICT:
        unequal = (source != fused) & ~((source != source) & (fused != fused))
        return f"{int(unequal.sum())} of {source.numel()} elements differ" if unequal.any() else None
    distance = (source.double() - fused.double()).abs()
    if not distance.numel():
        return None
    if source.dtype == torch.int8:
        fraction = float((distance > 0).double().mean())
        if distance.max() > INT8_STEP or fraction > INT8_FRACTION:
            return f"int8 differs by up to {int(distance.max())} in {fraction:.2%} of the elements"
        return None
    largest = float(source.double().abs().max())
    if not distance.max() <= FLOAT_RELATIVE * largest:
        return f"differs by {float(distance.max()):.3g}, the largest value is {largest:.3g}"
    return None
