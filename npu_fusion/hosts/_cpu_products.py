"""int8 products that are left in a rewritten graph go to this package's CPU kernel.

::

    %p = _int_mm(%q, %w)      ->      %p = npu_quant_matmul(%q, %w, full([1], 1), output_dtype=int32)

What stands before npu_dequant_swiglu_quant is such a product: the fusion takes its int32 result. PyTorch's
own kernel is several times slower for a few tokens (docs/performance.md), and both are exact, so this is a
choice of a kernel, not a fusion: it is in no report. Done where graphs run on the CPU, compiled kernels are
there and something was fused: a graph in which nothing fuses is left as it came.
"""

from __future__ import annotations

import torch
from torch import fx

from npu_fusion.kernels.cpu import _library
from npu_fusion.meta_impls._dtypes import enum_value

_INT_MM = torch.ops.aten._int_mm.default
_QUANT_MATMUL = torch.ops.npu.npu_quant_matmul.default


def use_compiled(graph: fx.Graph) -> None:
    """Rewrite ``graph`` in place."""
    products = [node for node in graph.find_nodes(op="call_function", target=_INT_MM) if _on_cpu(node)]
    if not products or _library.library() is None:
        return
    with graph.inserting_before(products[0]):
        scale = graph.call_function(
            torch.ops.aten.full.default, ([1], 1.0), {"dtype": torch.float32, "device": torch.device("cpu")}
        )
    with products[0].meta["val"].fake_mode:
        scale.meta["val"] = torch.full([1], 1.0)
    for node in products:
        node.target = _QUANT_MATMUL
        node.args = (*node.args, scale)
        node.kwargs = {"output_dtype": enum_value(torch.int32)}
    graph.lint()


def _on_cpu(product: fx.Node) -> bool:
    value = product.meta.get("val")
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"
