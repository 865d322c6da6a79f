"""Attention, in one operator or written out, as something whose query, key and value can be exchanged.

::

    %o = scaled_dot_product_attention(%q, %k, %v, %mask, scale=c)

    %s = bmm(mul(%q, c), transpose(mul(%k, d)))        whatever is between the two products (scale, mask,
    %p = softmax(add(%s, %mask))                 ──▶   softmax in any spelling, casts) is kept as it is: it
    %o = bmm(%p, %v)                                   is computed again, node by node, on the new scores

Written out, the two products are recognized and nothing else. A number that multiplies query or key before
the product is told apart from them (``scale``). The new attention has one key that all heads share, so there
the heads are rows of one product with it. Trap: the two products may differ in dtype, as where scores are in
float32 and weights rounded to 16 bits; each keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from npu_fusion.passes.canonicalize.views import permuted, reshaped
from npu_fusion.passes.pattern import Context, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Size, Term, TermGraph, sizes_of

aten = torch.ops.aten

_EQUAL_SIZES_UP_TO = {
    aten._scaled_dot_product_flash_attention.default: 256,
    aten._scaled_dot_product_cudnn_attention.default: 256,
}
"""Largest size of a head that the kernels of an operator take."""


@dataclass
class Attention:
    """Query, key and value end in [S, width]; ``result`` is the term to replace. Query and
    key have the dtype in which the scores are computed."""

    result: Term
    query: Term
    key: Term
    value: Term
    others: list[Term]
    """What else is read: masks, mostly."""
    rebuild: Callable[[Emitter, fx.Node, fx.Node, int, float], fx.Node]
    """``rebuild(e, query, key, columns, scale)``: [B, N, S, columns] out of a query [B, N, S, E] and one key
    [B, 1, L, E] for all heads, in the dtype of those that they replace; the first ``columns`` of the key are
    the value. ``scale``: of the scores where the operator would take it from the size of a head."""
    scale: float = 1.0
    """By what numbers query and key are multiplied in all."""


def called(term: Term, context: Context) -> Attention | Refused | None:
    """The call of an attention operator that gives ``term``."""
    node, query, key, value = term.args
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    dropout = given.get("dropout_p", 0.0)
    if dropout != 0.0:
        return Refused("attention with dropout", f"dropout_p={dropout}", (term,))
    read = context.rewriter.live_users(node)
    if isinstance(node.meta["val"], (tuple, list)) and any(u.args[1] != 0 and u.users for u in read):
        return Refused("another result of the attention operator is used", str(node.target), (term,))
    exchanged = [given.pop(name) for name in names[:3]]
    others = _terms((n for n in node.all_input_nodes if n not in exchanged), context)
    if others is None:
        return None

    def rebuild(e: Emitter, q: fx.Node, k: fx.Node, columns: int, scale: float) -> fx.Node:
        heads = q.meta["val"].shape[1]
        k = e.call(aten.expand.default, k, [-1, heads, -1, -1])
        named = {name: value for name, value in node.kwargs.items() if name in given}
        if named.get("scale") is None:
            named["scale"] = scale
        result = e.call(node.target, q, k, k, *node.args[3:], **named)
        if not isinstance(result.meta["val"], torch.Tensor):
            result = e.item(result, 0)
        return e.call(aten.slice.Tensor, result, 3, 0, columns)

    return Attention(term, query, key, value, others, rebuild)


def too_wide(attention: Attention, width: int) -> Refused | None:
    """Has the operator no kernel for heads of that size?"""
    if attention.result.op != "attention":
        return None
    most = _EQUAL_SIZES_UP_TO.get(attention.result.args[0].target)
    if most is None or width <= most:
        return None
    return Refused(
        "the attention operator takes no heads of the size of the latent",
        f"{width}, at most {most}",
        (attention.result,),
    )


def written_out(
    term: Term, after: fx.Node, is_key: Callable[[Term], bool], context: Context
) -> Attention | Refused | None:
    """Two products, the second being ``term``, with anything between them that keeps the scores' shape.

    Looks for the first product between ``after`` and the second: its second operand, unscaled and with a row
    for each key, is one that ``is_key`` accepts.
    """
    last = term.node
    assert last is not None
    weights = last.args[0]
    assert isinstance(weights, fx.Node)
    behind, scores = _scores(weights, after, is_key, context)
    if len(scores) != 1:
        return None
    first, query, key, scale = scores[0]
    between = _path(behind, first)
    if weights not in between:
        return None
    rows, shape = (sizes_of(node.meta["val"].shape) for node in (weights, first))
    if not context.sizes.same_shape(rows, shape):
        shown = f"{list(rows)} and {list(shape)}"
        return Refused("the attention weights have another shape than the scores", shown, (term,))
    others = _terms(_read_by(between, {first, *between}), context)
    if others is None:
        return None
    for node in between:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return Refused("attention with dropout", str(node.target), (term,))

    def rebuild(e: Emitter, q: fx.Node, k: fx.Node, columns: int, _: float) -> fx.Node:
        batch, heads, length, width = sizes_of(q.meta["val"].shape)
        keys = sizes_of(k.meta["val"].shape)[2]
        k = e.view(k, (batch, keys, width))
        rows = e.view(q, (batch, heads * length, width))
        product = e.call(aten.bmm.default, rows, e.call(aten.permute.default, k, [0, 2, 1]))
        env = {first: e.view(product, sizes_of(first.meta["val"].shape))}
        for node in between:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env.get(n, n))
            env[node] = e.call(node.target, *args, **kwargs)
        weighed = e.view(env[weights], (batch, heads * length, keys))
        latent = e.cast(e.call(aten.slice.Tensor, k, 2, 0, columns), weighed.meta["val"].dtype)
        result = e.call(aten.bmm.default, weighed, latent)
        return e.view(result, (batch, heads, length, columns))

    return Attention(term, query, key, term.args[1], others, rebuild, scale)


_Scores = tuple[fx.Node, Term, Term, float]


def _scores(
    weights: fx.Node, after: fx.Node, is_key: Callable[[Term], bool], context: Context
) -> tuple[set[fx.Node], list[_Scores]]:
    """The nodes after ``after`` that ``weights`` are computed from, and the products of keys among them."""
    found: list[_Scores] = []
    seen: set[fx.Node] = set()
    pending = [weights]
    while pending:
        node = pending.pop()
        if node in seen or node.op != "call_function" or node < after:
            continue
        seen.add(node)
        product = context.view.of.get(node)
        if isinstance(product, Term) and product.op == "bmm" and node in product.nodes:
            query, a = unscaled(context.view, product.args[0])
            key, b = unscaled(context.view, product.args[1])
            key = permuted(context.view, key, (0, 2, 1))
            if node.target is aten.bmm.default and is_key(key):
                found.append((node, query, key, a * b))
                continue
        pending.extend(node.all_input_nodes)
    return seen, found


def _path(nodes: set[fx.Node], first: fx.Node) -> list[fx.Node]:
    """Those of ``nodes`` that are computed from ``first``, in graph order, without sizes."""
    path: dict[fx.Node, None] = {}
    for node in sorted(nodes):
        if any(n is first or n in path for n in node.all_input_nodes) and not _is_size(node):
            path[node] = None
    return list(path)


def _read_by(nodes: Iterable[fx.Node], own: set[fx.Node]) -> Iterable[fx.Node]:
    return (n for node in nodes for n in node.all_input_nodes if n not in own)


def _is_size(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def _terms(nodes: Iterable[fx.Node], context: Context) -> list[Term] | None:
    """What the nodes hold, sizes left out; None if one of them holds several values."""
    terms: dict[Term, None] = {}
    for node in nodes:
        if _is_size(node):
            continue
        term = context.view.of.get(node)
        if not isinstance(term, Term):
            return None
        terms[term] = None
    return list(terms)


def unscaled(view: TermGraph, term: Term) -> tuple[Term, float]:
    """``term`` without the numbers that it is multiplied by or divided by as a whole, and their product.

    Symbolic sizes stay: they are no numbers, and no node may hold their product.
    """
    if term.op in ("view", "permute", "expand"):
        inner, factor = unscaled(view, term.args[0])
        if factor == 1:
            return term, 1.0
        shape: tuple[Size, ...] = term.shape
        if term.op == "view":
            return reshaped(view, inner, shape), factor
        if term.op == "permute":
            return permuted(view, inner, term.args[1]), factor
        return view.make("expand", (inner, shape), inner.dtype), factor
    wide = term.args[0] if term.op == "cast" and term.dtype in LOW_PRECISION else term
    if wide.op not in ("mul", "div"):
        return term, 1.0
    inner, number = wide.args
    if not isinstance(inner, Term) or not isinstance(number, (int, float)) or number == 0:
        return term, 1.0
    if wide is not term:
        inner = view.cast(inner, term.dtype)
    if inner.dtype != term.dtype or inner.shape != term.shape:
        return term, 1.0
    inner, factor = unscaled(view, inner)
    return inner, factor * (number if wide.op == "mul" else 1 / number)
