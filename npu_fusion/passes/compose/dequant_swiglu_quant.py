"""An int32 product, dequantized, through SwiGLU, quantized again.

::

    %p = _int_mm(%q, %w)                                    %p = _int_mm(%q, %w)
    %f = to(%p, f32)                                        %y, %s = npu_dequant_swiglu_quant(
    %d = mul(mul(%f, %weight_scale), %token_scale)   ->           %p, weight_scale=, activation_scale=,
    %a, %b = chunk(%d, 2, -1)                                     activate_left=True, quant_mode=1)
    %h = mul(silu(%a), %b)
    %y, %s = quantize %h to int8 per token

    npu_quant_matmul(.., output_dtype=bf16)                 npu_quant_matmul(.., output_dtype=int32)
    npu_swiglu, npu_dynamic_quant                    ->     npu_dequant_swiglu_quant

Also with a bias (int32 before the scales, floating after), smooth scales (``quant_scale``), a static output
scale (``quant_mode=0``, which divides), either half activated, any order of the scales.

Conditions: the product is int32 (or npu_quant_matmul can give it); one scale per output channel, at most one
per token; the halves, the activation and the quantization are what :mod:`..lift.swiglu` and
:mod:`..lift.dynamic_quant` require; no other reader of what disappears; the target's alignment; the memory
gate where the int32 product is new. ``accurate`` where the source rounds to 16 bits in between, or multiplies
the scales in another order.

Source: torch_npu documentation of npu_dequant_swiglu_quant. Its defaults are the right half and static
quantization.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from npu_fusion.config import Numerics
from npu_fusion.passes.compose._swiglu_quantized import Activated, activated, swiglu_inside
from npu_fusion.passes.lift.dequant import Dequantized, available, dequantized, raw, token_scale, weight_scale
from npu_fusion.passes.lift.dynamic_quant import OPERATOR, Quantized
from npu_fusion.passes.lift.quant_matmul import accumulator
from npu_fusion.passes.lift.quantize import along_last, scale_and_offset
from npu_fusion.passes.lift.swiglu import Gated, even
from npu_fusion.passes.pattern import Constraint, Context, Fusion, Match, Refused
from npu_fusion.passes.rewrite import Emitter
from npu_fusion.passes.terms import LOW_PRECISION, Term, TermGraph, sizes_of
from npu_fusion.passes.walk import Walk, dtype_name
from npu_fusion.targets import resolve

aten = torch.ops.aten


class DequantSwiGLUQuant(Fusion):
    name = "dequant_swiglu_quant"
    operator = "npu_dequant_swiglu_quant"
    anchors: ClassVar = ("cast", OPERATOR, "npu.npu_quantize.default", "round")
    priority = 10
    stage = "compose"

    def match(self, term: Term, context: Context) -> Match | Refused | None:
        if term.op == "round" or (term.op == "cast" and term.dtype not in (torch.int8, torch.uint8)):
            return _fake_quantized(term, context)
        middle = activated(term, context)
        if not isinstance(middle, Activated):
            return middle
        quantized, glu, smooth, walk = middle.quantized, middle.glu, middle.smooth, middle.walk
        found = dequantized(glu.x, walk, context)
        if isinstance(found, Refused):
            return found
        if not quantized.dynamic:
            refused = along_last(quantized, context)
            if refused is not None:
                return refused
            if smooth is not None:
                return Refused("static quantization has no smooth scales", "", (term,))
            if quantized.static_inverse:
                walk.note(Numerics.ACCURATE, "x * factor is computed as x / (1 / factor)")
        limits = _hardware(found, context)
        return (
            limits if limits is not None else _replacement(term, found, glu, quantized, smooth, walk, context)
        )


def _hardware(found: Dequantized, context: Context) -> Refused | None:
    target = resolve(context.config)
    if target is None:
        return None
    assert found.product is not None
    if found.bias is not None and found.bias.dtype != torch.int32 and not target.float_bias:
        return Refused(
            "the operator documents an int32 bias only", dtype_name(found.bias.dtype), (found.bias,)
        )
    if len(found.product.shape) > target.swiglu_max_rank:
        return Refused(
            "the operator takes at most 8 dimensions", str(len(found.product.shape)), (found.product,)
        )
    return None


def _replacement(
    term: Term,
    found: Dequantized,
    glu: Gated,
    quantized: Quantized,
    smooth: Term | None,
    walk: Walk,
    context: Context,
) -> Match | Refused:
    product, bias = found.product, found.bias
    assert product is not None
    if not available(product):
        return Refused("no node holds the int32 product", "", (term,))
    new_product = not product.nodes
    constraints = [even(context, product)]
    target = resolve(context.config)
    if target is not None:
        alignment = target.swiglu_alignment
        constraints.append(
            Constraint(
                context.sizes.multiple(product.shape[-1], alignment),
                f"the last dimension is not a multiple of {alignment}",
                f"it is {product.shape[-1]}",
            )
        )
    static = () if quantized.dynamic else (quantized.static_scale, quantized.offset)
    numbers = [n for n in found.numbers if isinstance(n, Term)]
    given = [bias, smooth, *found.per_channel, *found.per_token, *numbers, *static]
    inputs = [t for t in given if isinstance(t, Term)]
    inputs.extend(product.args if new_product else (product,))
    rows = product.shape[:-1]

    def build(e: Emitter) -> list[fx.Node]:
        x = e.term(product) if not new_product else _int32_product(e, product, found, context)
        arguments: dict[str, Any] = {"weight_scale": weight_scale(e, found, x, product.shape[-1])}
        if found.per_token:
            arguments["activation_scale"] = token_scale(e, found.per_token)
        if bias is not None:
            arguments["bias"] = e.view(e.term(raw(bias)), (product.shape[-1],))
        if smooth is not None:
            arguments["quant_scale"] = e.view(e.term(smooth, torch.float32), (smooth.shape[-1],))
        if not quantized.dynamic:
            arguments |= _static_scale(e, quantized)
        call = e.call(
            torch.ops.npu.npu_dequant_swiglu_quant.default,
            x,
            **arguments,
            activate_left=glu.left,
            quant_mode=1 if quantized.dynamic else 0,
        )
        y = e.item(call, 0)
        return [y, e.item(call, 1)] if quantized.dynamic else [y]

    outputs = [[quantized.y], quantized.scales] if quantized.dynamic else [[quantized.y]]
    return Match(
        inputs,
        outputs,
        build,
        walk.drift,
        constraints,
        int32_product=(*rows, product.shape[-1]) if new_product else None,
    )


def _int32_product(e: Emitter, product: Term, found: Dequantized, context: Context) -> fx.Node:
    scale = (found.per_channel or found.numbers)[0]
    return accumulator(e, product, e.view(e.term(raw(scale)), (scale.shape[-1],)), context)


def _static_scale(e: Emitter, quantized: Quantized) -> dict[str, Any]:
    """quant_scale divides; a factor is inverted once per call, on the small tensor."""
    scale, offset = scale_and_offset(e, quantized)
    if quantized.static_inverse:
        scale = e.call(aten.reciprocal.default, scale)
    if offset is None:
        (size,) = sizes_of(scale.meta["val"].shape)
        offset = e.shared(("no offset", size), lambda: e.full([e.size(scale, 0)], 0.0))
    return {"quant_scale": scale, "quant_offset": offset}


def _fake_quantized(term: Term, context: Context) -> Refused | None:
    """Rounded to the int8 grid but multiplied back: the next matmul is a floating one."""
    rounded = term if term.op == "round" else term.args[0]
    key = (_fake_quantized, rounded)
    if rounded.op != "round" or key in context.memo:
        return None
    context.memo[key] = True
    if not _scaled_back(rounded, context.view) or not swiglu_inside(rounded, context):
        return None
    return Refused("quantized and dequantized again: the next matmul is a floating one", "", (term,))


def _scaled_back(rounded: Term, view: TermGraph) -> bool:
    """Does every way from here lead through clamps and roundings to a multiplication, none to integers?"""
    back = False
    pending = [rounded]
    while pending:
        for user in view.users(pending.pop()):
            if user.op in ("mul", "sub"):
                back = True
            elif user.op in ("clamp", "view") or (
                user.op == "cast" and user.dtype in (torch.float32, *LOW_PRECISION)
            ):
                pending.append(user)
            else:
                return False
    return back
