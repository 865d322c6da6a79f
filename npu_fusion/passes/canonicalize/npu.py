"""Calls of torch_npu operators, written out in the canonical arithmetic they stand for.

::

    npu_swiglu(x): bf16                    ->  cast(swiglu(cast(x, f32), left), bf16)
    npu_rms_norm(x, g, eps): bf16          ->  cast(rms_norm(cast(x, f32), cast(g, f32), eps), bf16), rstd
    npu_add_rms_norm(a, b, g, eps)         ->  the same of the unrounded sum, rstd, cast(add(a, b), bf16)
    npu_quant_matmul(a, b, ws, as): bf16   ->  cast(mul(mul(cast(int_mm(a, b), f32), ws), as) [+ bias], bf16)
    npu_quant_matmul(a, b, ..): int32      ->  int_mm(a, b)
    npu_dequant_bias(acc, ws, as, bias)    ->  the same on a given product
    npu_transpose_batchmatmul(a, b, ..)    ->  permute(bmm(permute(a), permute(b)))

so that a model that calls them and one that spells them out look alike to the passes. A call with an argument
that the arithmetic does not cover (an offset, packed scales, groups) stays opaque, with all its arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from npu_fusion.meta_impls._registry import OPERATORS
from npu_fusion.passes.canonicalize.pointwise import binary
from npu_fusion.passes.canonicalize.views import permuted, reshaped
from npu_fusion.passes.terms import LOW_PRECISION, PURE, Term, TermGraph, rule

npu = torch.ops.npu

PURE.update(operator.overload for operator in OPERATORS.values())


def _opaque(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    """All arguments kept, nothing said about what is computed."""
    dtype = getattr(node.meta.get("val"), "dtype", None)
    return view.make(str(node.target), tuple(args), dtype)


@rule(npu.npu_swiglu.default)
def _swiglu(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x, dim = args
    if dim not in (-1, len(x.shape) - 1):
        return _opaque(view, node, args)
    wide = view.cast(x, torch.float32)
    return view.cast(view.make("swiglu", (wide, True), torch.float32), x.dtype)


@rule(npu.npu_rms_norm.default)
def _rms_norm(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x, gamma, epsilon = args
    if len(gamma.shape) != 1 or not isinstance(epsilon, float):
        return _opaque(view, node, args)
    y = _normalized(view, view.cast(x, torch.float32), gamma, epsilon, x.dtype)
    return y, view.make("rstd", (x, epsilon), torch.float32)


@rule(npu.npu_add_rms_norm.default)
def _add_rms_norm(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x1, x2, gamma, epsilon = args
    if len(gamma.shape) != 1 or not isinstance(epsilon, float):
        return _opaque(view, node, args)
    total = binary(view, "add", view.cast(x1, torch.float32), view.cast(x2, torch.float32), torch.float32)
    y = _normalized(view, total, gamma, epsilon, x1.dtype)
    return y, view.make("rstd", (total, epsilon), torch.float32), view.cast(total, x1.dtype)


def _normalized(view: TermGraph, x: Term, gamma: Term, epsilon: float, dtype: torch.dtype | None) -> Term:
    normalized = view.make("rms_norm", (x, view.cast(gamma, torch.float32), epsilon), torch.float32)
    return view.cast(normalized, dtype)


@rule(npu.npu_quant_matmul.default)
def _quant_matmul(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x1, x2, scale, offset, pertoken_scale, bias, _, *others = args
    result = node.meta["val"]
    covered = (
        offset is None
        and all(o is None for o in others)
        and x1.dtype == x2.dtype == torch.int8
        and len(x1.shape) == len(x2.shape) == 2
        and (result.dtype == torch.int32 or result.dtype in LOW_PRECISION)
        and scale.dtype in (torch.float32, torch.bfloat16)
    )
    if not covered:
        return _opaque(view, node, args)
    product = view.make("int_mm", (x1, x2), torch.int32)
    if result.dtype == torch.int32:
        if bias is not None:
            return binary(view, "add", product, bias, torch.int32)
        return product
    return _dequantized(view, product, scale, pertoken_scale, bias, result.dtype)


@rule(npu.npu_dequant_bias.default)
def _dequant_bias(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    product, scale, pertoken_scale, bias, _ = args
    return _dequantized(view, product, scale, pertoken_scale, bias, node.meta["val"].dtype)


def _dequantized(
    view: TermGraph, product: Term, scale: Term, token: Term | None, bias: Term | None, dtype: torch.dtype
) -> Term:
    """``((product [+ int bias]) * scale * token [+ float bias])`` in float32, rounded once."""
    wide = torch.float32
    if bias is not None and bias.dtype == torch.int32:
        product, bias = binary(view, "add", product, bias, torch.int32), None
    value = binary(view, "mul", view.cast(product, wide), view.cast(scale, wide), wide)
    if token is not None:
        rows = reshaped(view, token, (*product.shape[:-1], 1))
        value = binary(view, "mul", value, view.cast(rows, wide), wide)
    if bias is not None:
        value = binary(view, "add", value, view.cast(bias, wide), wide)
    return view.cast(value, dtype)


@rule(npu.npu_transpose_batchmatmul.default)
def _transpose_batchmatmul(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    x, weight, bias, scale, perm_x1, perm_x2, perm_y, batch_split_factor = args
    if bias is not None or scale is not None or batch_split_factor not in (None, 1):
        return _opaque(view, node, args)
    a, b = (permuted(view, t, p or (0, 1, 2)) for t, p in ((x, perm_x1), (weight, perm_x2)))
    product = view.make("bmm", (a, b), node.meta["val"].dtype)
    return permuted(view, product, perm_y or (1, 0, 2))
