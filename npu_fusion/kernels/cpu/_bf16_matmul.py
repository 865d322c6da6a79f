"""Products of bfloat16 (and other) matrices for the kernels: ours or oneDNN's, whichever is faster.

With few rows a product takes as long as its weight takes to come from memory. Measured on a Zen 5 core, 7168
by 1536, ms, the weight as [k, n] (kn) and as [n, k] (nk: ``.t()`` of a module's):

==========  ======  ======  ======  ======  ======  ======
rows            1       4       8      24      64     512
==========  ======  ======  ======  ======  ======  ======
ours, kn       0.8     0.9     0.8     1.8     4.2    39.0
oneDNN, kn     2.3     2.3     2.6     3.3     5.0    39.9
ours, nk       0.7     1.0     1.4     2.7     8.8
oneDNN, nk     1.3     1.3     1.5     2.3     4.1    37.8
==========  ======  ======  ======  ======  ======  ======
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from npu_fusion.kernels.cpu._library import finished, kernel
from npu_fusion.kernels.reference._mla_prolog_quant import product

_MOST_ROWS_KN = 256
_MOST_ROWS_NK = 12
_SHORTEST_DOTS = 64
"""Elements along k for each row: below, adding up the lanes of a sum takes longer than the sum."""


_function = kernel("bf16_matmul", "15q")


def matmul(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out = x @ weight``: three matrices or batches of them, of one dtype, in any strides.

    Summed in fp32 and rounded once.
    """
    if x.dtype is torch.bfloat16 and _multiply(x, weight, out):
        return
    if not _has_onednn(x.dtype):
        out.copy_(product(x, None, weight, None, x.dtype))
    elif x.dim() == 2:
        torch.mm(x, weight, out=out)
    else:
        torch.bmm(x, weight, out=out)


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Ours, if it is the faster one and takes these strides."""
    function = _function()
    *batch, m, k = x.shape
    rows_of_k = weight.stride(-2) == 1
    if function is None or x.stride(-1) != 1 or out.stride(-1) != 1 or x.numel() == 0 or out.numel() == 0:
        return False
    if not rows_of_k and weight.stride(-1) != 1:
        return False
    if _has_onednn(x.dtype) and m > (min(_MOST_ROWS_NK, k // _SHORTEST_DOTS) if rows_of_k else _MOST_ROWS_KN):
        return False
    steps = [t.stride(0) if batch else 0 for t in (x, weight, out)]
    status = function(
        x.data_ptr(),
        steps[0],
        x.stride(-2),
        weight.data_ptr(),
        steps[1],
        weight.stride(-1 if rows_of_k else -2),
        rows_of_k,
        out.data_ptr(),
        steps[2],
        out.stride(-2),
        batch[0] if batch else 1,
        m,
        weight.size(-1),
        k,
        torch.get_num_threads(),
    )
    return finished(status)


@functools.cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether torch multiplies ``dtype`` by oneDNN.

    Without the instructions for a 16-bit type it has loops, slower than a product of widened operands.
    """
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True
