"""Rotations as products of complex numbers.

::

    view_as_real(view_as_complex(view(x, [.., h, 2])) * turn)   ->   turned_pairs(x, turn)   [.., h, 2]

``turn`` is complex. Everything else complex stays opaque.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from npu_fusion.passes.terms import PURE, Term, TermGraph, rule

aten = torch.ops.aten

PURE.update({aten.complex.default, aten.polar.default})


@rule(aten.view_as_complex.default)
def _view_as_complex(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    return view.make("as_complex", (args[0],), node.meta["val"].dtype)


@rule(aten.view_as_real.default)
def _view_as_real(view: TermGraph, node: fx.Node, args: list[Any]) -> Any:
    product = args[0]
    if product.op == "mul" and isinstance(product.args[1], Term):
        for pairs, turn in (product.args, product.args[::-1]):
            if pairs.op == "as_complex":
                return view.make("turned_pairs", (pairs.args[0], turn), node.meta["val"].dtype)
    return view.make("as_real", (product,), node.meta["val"].dtype)
