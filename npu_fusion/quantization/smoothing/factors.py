"""How a factor for each channel passes through an operator: the algebra of tags.

Ask what happens to a tensor when channel c of a producer is multiplied by m[c] > 0. Each element of the
tensor has a tag that says so::

    c >= 0     it is multiplied by m[c]
    ONE        it does not change
    ZERO       it is zero, so any factor is right
    MIXED      something else: no single factor says it

Moving elements moves their tags, so ``cat``, ``index`` and their like are simply run on the tags. Products
add up what their factors have (``c * ONE = c``), sums need equal tags, and a matrix product needs tags that
are equal along the dimension that it sums over: a token's value vector has its channels in the columns, so
attention weights, which sum over tokens, leave the channels as they are, whatever the weights.

An operator that is not in :data:`RULES` gives MIXED. That is the safe side: a factor is only ever let through
where multiplying the producer's channel is proven to multiply exactly this element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ONE, ZERO, MIXED = -1, -2, -3

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
"""Operator (in ATen, without overload) -> tags of its result from those of its arguments. A rule takes the
operator's own arguments, with tags (int32) in the place of floating point tensors; other tensors are
themselves (never int32). What it returns broadcasts to the result; of several results, those that it leaves
out have no factor."""
ZEROS = ("zeros", "zeros_like", "new_zeros", "zero")
FILLS = ("full", "full_like", "new_full", "fill", "scalar_tensor")
"""Operators whose last argument is what they write."""
METADATA = frozenset(
    {"empty_like", "ones_like", "rand_like", "randn_like", "new_empty", "new_empty_strided", "new_ones"}
    | {"zeros_like", "new_zeros", "full_like", "new_full", "_assert_tensor_metadata"}
)
"""Operators that read no element of what they are given."""


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def uniform(tags: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """The tag that all elements along ``dims`` (kept, of size 1) have in common, or MIXED."""
    dims = (dims,) if isinstance(dims, int) else dims
    if tags.numel() == 0:
        size = list(tags.shape)
        for dim in dims:
            size[dim] = 1
        return tags.new_full(size, ZERO)  # an empty sum
    top = tags.amax(dims, keepdim=True)
    if torch.equal(top, tags.amin(dims, keepdim=True)):
        return top
    return torch.where(((tags == top) | (tags == ZERO)).all(dims, keepdim=True), top, MIXED)


def is_one(tags: Tensor) -> bool:
    """No element has a factor or is known to be zero. Quick for tensors that no factor has reached."""
    if tags.dim() and not any(tags.stride()):
        tags = tags.as_strided((1,), (1,))
    return bool((tags == ONE).all())


def product(a: Tensor, b: Tensor) -> Tensor:
    if is_one(a) or is_one(b):
        return torch.broadcast_tensors(a, b)[int(is_one(a))]
    tags = torch.where(a == ONE, b, torch.where(b == ONE, a, MIXED))
    return torch.where((a == ZERO) | (b == ZERO), ZERO, tags)


def total(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a == b) | (b == ZERO), a, torch.where(a == ZERO, b, MIXED))


def constant(value: Any) -> int:
    """The tag of a number."""
    return ZERO if value == 0 else ONE


def _tags(value: Any) -> Tensor:
    """Of an operand of arithmetic: a number, tags, or a tensor of integers, which no factor changes."""
    if not isinstance(value, Tensor):
        return torch.tensor(constant(value), dtype=torch.int32)
    return value if value.dtype == torch.int32 else torch.full_like(value, ONE, dtype=torch.int32)


@_rule("clone", "_to_copy", "neg", "relu", "leaky_relu", "abs")
def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    # relu and abs: f(m x) = m f(x) for every m > 0. Casts to integers are refused where they are written.
    return x


@_rule("mul")
def _mul(a: Any, b: Any) -> Tensor:
    return product(_tags(a), _tags(b))


@_rule("div")
def _div(a: Any, b: Any, rounding_mode: str | None = None) -> Tensor:
    a, b = _tags(a), _tags(b)
    return torch.where((b == ONE) & (rounding_mode is None), a, MIXED)


@_rule("add", "sub", "rsub")
def _add(a: Any, b: Any, alpha: Any = 1) -> Tensor:
    return total(_tags(a), _tags(b))


@_rule("addcmul")
def _addcmul(x: Tensor, a: Tensor, b: Tensor, value: Any = 1) -> Tensor:
    return total(x, product(a, b))


@_rule("sum", "mean")
def _sum(x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    dims = tuple(range(x.dim())) if dim is None or dim == [] else dim
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    tags = uniform(x, dims) if x.dim() else x
    return tags if keepdim else tags.squeeze(dims)


@_rule("mm", "bmm")
def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return product(uniform(a, -1), uniform(b, -2))


@_rule("addmm", "baddbmm")
def _addmm(x: Tensor, a: Tensor, b: Tensor, beta: Any = 1, alpha: Any = 1) -> Tensor:
    tags = _matmul(a, b)
    return tags if beta == 0 else total(x, tags)


ATTENTION = "_scaled_dot_product_"
_KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")


@_rule(*(ATTENTION + kernel for kernel in (*_KERNELS, "fused_attention_overrideable", "attention_math")))
def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> list[Any]:
    """[B, H, L, E] from value [B, H or fewer, S, E]; the other results are of query and key alone."""
    others = [x for x in (query, key, *rest, *options.values()) if isinstance(x, Tensor)]
    if not all(is_one(x) for x in others if x.dtype == torch.int32):
        return [torch.full((), MIXED, dtype=torch.int32)]
    heads = uniform(value, -2).repeat_interleave(query.size(1) // max(1, value.size(1)), dim=1)
    return [heads]


@_rule("native_layer_norm", "_fused_rms_norm")
def _norm(x: Tensor, shape: Any, weight: Tensor | None, bias: Any, *_: Any) -> list[Any]:
    """y = norm(x) * weight + bias. An input with a factor is normalized with all its channels: MIXED."""
    inner = torch.full((), ONE if is_one(x) else MIXED, dtype=torch.int32)
    tags = inner if weight is None else product(inner, weight)
    return [total(tags, bias) if isinstance(bias, Tensor) else tags]


@_rule("masked_fill")
def _masked_fill(x: Tensor, mask: Tensor, value: Any) -> Tensor:
    return torch.where(mask, _tags(value), x)


@_rule("where")
def _where(condition: Tensor, a: Any = None, b: Any = None) -> Tensor:
    return torch.where(condition, _tags(a), _tags(b))


@_rule("constant_pad_nd")
def _pad(x: Tensor, pad: Any, value: Any = 0) -> Tensor:
    return torch.constant_pad_nd(x, pad, constant(value))


@_rule("copy")
def _copy(x: Tensor, source: Any, *_: Any) -> Tensor:
    return _tags(source)


@_rule(*ZEROS)
def _zeros(*_: Any, **__: Any) -> Tensor:
    return torch.tensor(ZERO, dtype=torch.int32)


@_rule(*FILLS)
def _full(*args: Any, **_: Any) -> Tensor:
    return _tags(args[-1])


def _moved(name: str) -> Rule:
    """An operator that only moves elements (zeros may come in): run on tags."""

    def rule(*args: Any, **kwargs: Any) -> Any:
        return getattr(torch.ops.aten, name)(*args, **kwargs)

    return rule


for _name in (
    "cat",
    "stack",
    "index",
    "index_select",
    "gather",
    "repeat",
    "roll",
    "flip",
    "index_copy",
    "select_scatter",
    "slice_scatter",
    "split_with_sizes_copy",
):
    RULES[_name] = _moved(_name)


@_rule("index_put")
def _index_put(x: Tensor, indices: Any, values: Tensor, accumulate: bool = False, *_: Any) -> Tensor:
    if accumulate:
        return torch.full_like(x, MIXED)
    return torch.ops.aten.index_put(x, indices, values)


@_rule("scatter")
def _scatter(x: Tensor, dim: int, index: Tensor, source: Any, reduce: str | None = None) -> Tensor:
    if reduce is not None:
        return torch.full_like(x, MIXED)
    return torch.scatter(x, dim, index, source if isinstance(source, Tensor) else constant(source))
