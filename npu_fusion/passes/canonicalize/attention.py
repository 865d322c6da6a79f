"""Attention in one operator.

::

    _scaled_dot_product_*(q, k, v, ..)   ->  attention(node, q, k, v), and what else it returns

The term names the three tensors that every such operator begins with; mask, scale and the rest are read from
the node, which makes each call a term of its own (one with dropout is no function of its operands).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from npu_fusion.passes.terms import TermGraph, rule

aten = torch.ops.aten

OPERATORS = tuple(
    getattr(aten, name).default
    for name in (
        "scaled_dot_product_attention",
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(aten, name)
)


@rule(*OPERATORS)
def _attention(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    q, k, v = args[:3]
    result = view.make("attention", (node, q, k, v), q.dtype)
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return result
    others = (view.make("get", (result, i), getattr(value[i], "dtype", None)) for i in range(1, len(value)))
    return result, *others
