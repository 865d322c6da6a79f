"""Rotary position embedding of adjacent pairs, stored as halves (DeepSeek).

::

    %p = reshape(transpose(view(%x, [.., D/2, 2]), -1, -2), [.., D])     ->  %y = npu_interleave_rope(
    %y = add(mul(%p, %cos), mul(cat(neg(%p[D/2:]), %p[:D/2]), %sin))             %x, %cos, %sin)

    %a, %b = %x[::2], %x[1::2]                                           ->  %y = npu_interleave_rope(
    %y = cat(sub(mul(%a, %c), mul(%b, %s)),                                      %x, cat(%c, %c),
             add(mul(%b, %c), mul(%a, %s)))                                      cat(%s, %s))

The rotation is what :func:`.rotary_mul.rotation` reads; here the entries are first sorted into even and odd.

Conditions: those of the rotation; x is [B, N, S, D] and the cosine [B or 1, 1, S or 1, D]. On a target the
last dimension is 64, and except on the 950 the values have 16 bits and are made contiguous. In 16 bits
``accurate``: the source rounds the products.

Source: torch_npu documentation of npu_interleave_rope.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from npu_fusion.passes.canonicalize.views import reshaped
from npu_fusion.passes.checks import row_major
from npu_fusion.passes.lift.rotary_mul import (
    RANK,
    Arguments,
    Rotation,
    alternating,
    arguments,
    padded,
    rotation,
    source,
    widened,
)
from npu_fusion.passes.lift.swiglu import even
from npu_fusion.passes.pattern import Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import Term, TermGraph
from npu_fusion.passes.walk import dtype_name
from npu_fusion.targets import resolve


def _before_sorting(x: Term, view: TermGraph) -> Term | None:
    """The tensor of which ``x`` has the even entries of the last dimension first, then the odd ones."""
    sorted_ = source(x)
    if sorted_.op == "view" and sorted_.args[0].op == "permute":
        pairs, dims = sorted_.args[0].args
        rank = len(dims)
        swapped = (*range(rank - 2), rank - 1, rank - 2)
        shape = (*pairs.shape[:-2], 2 * pairs.shape[-2])
        if dims == swapped and pairs.shape[-1] == 2 and shape == sorted_.shape:
            return widened(reshaped(view, pairs, shape), view)
    if sorted_.op == "cat" and len(sorted_.args[0]) == 2 and sorted_.args[1] == len(sorted_.shape) - 1:
        evens, odds = (alternating(p, view) for p in sorted_.args[0])
        if evens is not None and odds is not None and evens[0] is odds[0] and (evens[1], odds[1]) == (0, 1):
            return evens[0]
    return None


class InterleaveRope(Fusion):
    name = "interleave_rope"
    operator = "npu_interleave_rope"
    anchors: ClassVar = ("add", "cat")
    priority = 42
    stage = "lift"

    def match(self, term: Term, context: Context) -> Match | Refused | None:
        found = rotation(term.args[0] if term.op == "cast" else term, context)
        if not isinstance(found, Rotation):
            return None  # reported by rotary_mul
        if found.mode == "half":
            x = _before_sorting(found.x, context.view)
            if x is None:
                return None
            found = dataclasses.replace(found, x=x, mode="deinterleave")
        if found.mode != "deinterleave":
            return None
        given = arguments(found, term, context)
        if isinstance(given, Refused):
            return given
        if len(given.x.shape) != RANK or padded(given.cos.shape, RANK)[1] != 1:
            shown = f"{list(given.x.shape)} and {list(given.cos.shape)}"
            return Refused("the layout is not [B, N, S, D] with one cosine for all heads", shown, (term,))
        limits = _hardware(given, context)
        if limits is not None:
            return limits

        def build(e: Emitter) -> list[fx.Node]:
            nodes = [e.term(given.x), *given.cosine_and_sine(e)]
            target = resolve(context.config)
            if target is not None and not target.interleave_rope_any_layout:
                nodes = [_contiguous(e, n) for n in nodes]
            return [e.call(torch.ops.npu.npu_interleave_rope.default, *nodes)]

        return Match(given.inputs, [[given.output]], build, found.drift, [even(context, given.x)])


def _hardware(given: Arguments, context: Context) -> Refused | None:
    target = resolve(context.config)
    if target is None:
        return None
    if given.x.shape[-1] != target.interleave_rope_width:
        reason = f"the last dimension is not {target.interleave_rope_width}"
        return Refused(reason, f"it is {given.x.shape[-1]}", (given.output,))
    if given.x.dtype == torch.float32 and not target.interleave_rope_any_layout:
        return Refused(
            "npu_interleave_rope takes float16 and bfloat16", dtype_name(given.x.dtype), (given.output,)
        )
    return None


def _contiguous(e: Emitter, node: fx.Node) -> fx.Node:
    if row_major(node.meta["val"]):
        return node
    return e.call(torch.ops.aten.clone.default, node, memory_format=torch.contiguous_format)
