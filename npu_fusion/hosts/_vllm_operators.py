"""Operators of vllm-ascend that wrap those of torch_npu, as torch_npu's while the pipeline looks.

::

    vllm.quantize(x, scale, 1 / scale, offset)                 npu_quantize(x, scale, offset, qint8, -1, True)
    _C_ascend.npu_add_rms_norm_bias(x1, x2, g, None, eps)      npu_add_rms_norm(x1, x2, g, eps)

The nodes stay the same objects; what no fusion has taken is afterwards called as before, so vllm-ascend's own
patterns find it. With a bias the second one has no counterpart and is left alone.

vllm-ascend multiplies by the reciprocal, rounded to the model's dtype, and hands the scale over as well,
because the fused operators divide. Dividing by the scale that the model was calibrated with is closer to what
is meant, but does not give the same bits: with ``numerics="strict"`` the multiplication is kept.

Source: vllm-ascend 0.23.0, vllm_ascend/ops/register_custom_ops.py, ops/layernorm.py, csrc/torch_binding.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from npu_fusion.config import Numerics
from npu_fusion.passes.terms import bind

npu = torch.ops.npu

Restore = Callable[[], None]


@contextmanager
def as_torch_npu(graph: fx.Graph, level: Numerics) -> Iterator[None]:
    """Inside, the operators above are torch_npu's."""
    changed: dict[fx.Node, Restore] = {}
    for node in graph.nodes:
        called = str(node.target)
        if called == "vllm.quantize.default":
            restore = _quantize(node, level == Numerics.STRICT)
        elif called == "_C_ascend.npu_add_rms_norm_bias.default":
            restore = _add_rms_norm(node)
        else:
            continue
        if restore is not None:
            changed[node] = restore
    try:
        yield
    finally:
        for node in graph.nodes:
            if node in changed:
                changed[node]()


def _quantize(node: fx.Node, strict: bool) -> Restore | None:
    x, scale, reciprocal, offset = bind(node)
    if scale.op != "placeholder" or reciprocal.op != "placeholder":
        return None  # the one that loses its user here might be erased, and the call not be restored
    factor = reciprocal if strict else scale
    return _retarget(node, npu.npu_quantize.default, (x, factor, offset, torch.qint8, -1, not strict))


def _add_rms_norm(node: fx.Node) -> Restore | None:
    x1, x2, gamma, bias, epsilon = bind(node)
    if bias is not None:
        return None
    return _retarget(node, npu.npu_add_rms_norm.default, (x1, x2, gamma, epsilon))


def _retarget(node: fx.Node, target: Any, args: tuple[Any, ...]) -> Restore:
    original = node.target, node.args, node.kwargs
    node.target, node.args, node.kwargs = target, args, {}

    def restore() -> None:
        now = dict(zip(args, node.args, strict=True))  # a fusion before this node may have replaced an input
        node.target = original[0]
        node.args, node.kwargs = map_arg(original[1:], lambda n: now.get(n, n))

    return restore
