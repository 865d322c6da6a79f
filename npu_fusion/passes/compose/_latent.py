"""Keys and values that are expanded from a latent, head by head, by one product.

::

    %e = view(mm(%latent, t(%w)), [B, L, N, width])          the columns of each head:
    %nope, %value = parts of transpose(%e)            ──▶    those of %nope, those of %value; B, L, N;
    %key = cat(%nope, expand(%rotary))                       and %rotary, which has the position

A key without position has no ``cat``; then the product is taken for an expansion only if it has more columns
than the latent, and none but those of keys and values. The key and the value may be the first rows of what is
expanded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from npu_fusion.passes.axes import Axis, Dim, Layout, coalesced, layout
from npu_fusion.passes.canonicalize.cache_writes import as_write
from npu_fusion.passes.checks import Sizes, Truth
from npu_fusion.passes.pattern import Context, Refused
from npu_fusion.passes.terms import Size, Term

aten = torch.ops.aten


@dataclass(frozen=True)
class Expansion:
    """Keys without position and values that are columns of one product of the latent, head by head."""

    product: Term
    """[B*rows, N*width]"""
    batch: Size
    rows: Size
    length: Size
    """Of the first rows in each sequence that are keys; a cache may have more."""
    heads: int
    width: int
    rank: int
    """C"""
    nope: tuple[int, int]
    """First column in each head and number of columns: of the keys, and of the values."""
    value: tuple[int, int]
    rotary: Term | None
    """[B, N, rows, Dr], if the keys have a part with position."""

    @property
    def latent(self) -> Term:
        """Before it was viewed as [B*L, C], if a node holds that."""
        rows = self.product.args[0]
        return rows.args[0] if rows.op == "view" and rows.args[0].nodes else rows


def _joined(key: Term, sizes: Sizes) -> tuple[Term, Term | None] | None:
    """The two parts of the width of a key [.., L, width]: without and with position. The key may be the first
    rows of them."""
    found = layout(key, sizes)
    if found is not None and _is_product(found.root):
        return key, None
    if found is None or found.root.op != "cat" or len(found.root.shape) != 4:
        return None
    pieces, dim = found.root.args
    batch, heads, _, width = found.root.shape
    rows = whole_axes((batch, heads, key.shape[-2], width))
    if dim != 3 or len(pieces) != 2 or any(found.origin) or not same_axes(found.flat(), rows, sizes):
        return None
    return pieces


def whole_axes(shape: Sequence[Size]) -> Dim:
    """The axes of all of a tensor."""
    return coalesced(Axis(d, 1, s) for d, s in enumerate(shape))


def product_of(value: Term, context: Context) -> Term | None:
    """The product that values, or what is written to a cache of values, are columns of."""
    read = layout(value, context.sizes)
    if read is not None and _is_product(read.root):
        return read.root
    new = written(value, context)
    return None if new is None else product_of(new, context)


def is_key(key: Term, product: Term, context: Context) -> bool:
    """Is what a key has without position, or what is written to a cache of keys, of this product?"""
    joined = _joined(key, context.sizes)
    if joined is None:
        new = written(key, context)
        return new is not None and is_key(new, product, context)
    nope = layout(joined[0], context.sizes)
    return nope is not None and nope.root is product


def expansion(key: Term, value: Term, context: Context) -> Expansion | Refused | None:
    """How keys and values are expanded; None where they are not columns of one product."""
    sizes = context.sizes
    joined = _joined(key, sizes)
    if joined is None:
        return None
    nope, rotary = joined
    read, values = layout(nope, sizes), layout(value, sizes)
    if read is None or values is None or read.root is not values.root:
        return None
    product = read.root
    if _has_bias(product):
        return Refused("the expansion of the latent has a bias", f"{product.node}", (product,))
    if product.op != "mm":
        return None
    batch, heads, held = _frame(nope, read, rotary is not None)
    (rank, total), columns, of_value = product.args[1].shape, nope.shape[-1], value.shape[-1]
    if not all(isinstance(size, int) for size in (heads, rank, total, columns, of_value)):
        return None
    width = total // heads
    if rotary is None and not (rank < total and columns + of_value == width):
        return None  # query, key and value of one product, say
    length = key.shape[-2]
    parts = []
    for part, rows, taken in ((read, held, columns), (values, length, of_value)):
        axes = Axis(0, held, batch), Axis(1, width, heads), Axis(0, 1, rows), Axis(1, 1, taken)
        if not same_axes(part.flat(), coalesced(axes), sizes) or part.origin[0] != 0:
            shown = f"{list(nope.shape)} and {list(value.shape)} of {list(product.shape)}"
            return Refused("keys and values are not the heads of one latent", shown, (product,))
        parts.append((part.origin[1], taken))
    if not all(isinstance(start, int) for start, _ in parts):
        return None
    return Expansion(product, batch, held, length, heads, width, rank, parts[0], parts[1], rotary)


def _frame(nope: Term, read: Layout, whole: bool) -> tuple[Size, Any, Size]:
    """Batch, heads, and rows of each sequence in the product. ``whole``: these are sizes of ``nope``."""
    if whole:
        batch, heads, held, _ = nope.shape
        return batch, heads, held
    first, columns = read.flat()[0], read.over(1)
    heads = columns[0].size if len(columns) == 2 else 1
    return (first.size, heads, first.step) if first.dim == 0 else (1, heads, read.root.shape[0])


def _is_product(term: Term) -> bool:
    return term.op == "mm" or _has_bias(term)


def _has_bias(product: Term) -> bool:
    if product.op == "input":
        return product.args[0].target is aten.addmm.default
    return product.op == "add" and any(isinstance(a, Term) and a.op == "mm" for a in product.args)


def same_axes(a: Sequence[Axis], b: Sequence[Axis], sizes: Sizes) -> bool:
    return len(a) == len(b) and all(
        x.dim == y.dim
        and sizes.equal(x.step, y.step) is Truth.YES
        and sizes.equal(x.size, y.size) is Truth.YES
        for x, y in zip(a, b, strict=True)
    )


def written(term: Term, context: Context) -> Term | None:
    """The new rows of a cache."""
    read = layout(term, context.sizes)
    if read is None:
        return None
    root = read.root
    if root.op == "cat" and root.args[1] == len(root.shape) - 2 and len(root.args[0]) == 2:
        return root.args[0][1]
    write = as_write(context.view, root)
    return None if write is None else write.args[1]
