"""RMSNorm as one ATen operator, as graphs hold it before decomposition.

::

    rms_norm(x, [H], g, eps): bf16         ->  cast(rms_norm(cast(x, f32), cast(g, f32), eps), bf16)
    _fused_rms_norm(x, [H], g, eps): bf16  ->  the same, rstd

Without an epsilon PyTorch takes the machine epsilon of the dtype that it computes in. Several normalized
dimensions stay opaque; a missing weight is None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from npu_fusion.passes.terms import LOW_PRECISION, TermGraph, rule

aten = torch.ops.aten


def _normalized(view: TermGraph, args: list[Any]) -> Any:
    x, normalized, gamma, epsilon = args
    if len(normalized) != 1:
        return NotImplemented
    wide = torch.float32 if x.dtype in LOW_PRECISION else x.dtype
    epsilon = torch.finfo(wide).eps if epsilon is None else epsilon
    term = view.make("rms_norm", (view.cast(x, wide), view.cast(gamma, wide), epsilon), wide)
    return view.cast(term, x.dtype)


@rule(aten.rms_norm.default)
def _rms_norm(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return _normalized(view, args)


if hasattr(aten, "_fused_rms_norm"):  # torch 2.9

    @rule(aten._fused_rms_norm.default)
    def _fused_rms_norm(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
        y = _normalized(view, args)
        if y is NotImplemented:
            return NotImplemented
        x, _, _, epsilon = args
        return y, view.make("rstd", (x, epsilon), node.meta["val"][1].dtype)
