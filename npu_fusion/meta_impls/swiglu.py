"""npu_swiglu: ``silu(first half) * second half``.

    x [..., 2H]  ──▶  [first | second]  ──▶  first / (1 + exp(-first)) * second  ──▶  y [..., H]

All arithmetic is fp32 with one rounding to the dtype of the input at the end, so ``silu(a) * b`` computed
operator by operator in bf16 (two roundings) may differ by one ulp.

Traps:

* the FIRST half is activated; npu_dequant_swiglu_quant and npu_swiglu_quant activate the second by default;
* ``dim`` must have an even size: torch_npu's Meta kernel rounds down silently, its device kernel refuses.

Formula: op-plugin documentation and public kernel sources of torch_npu 2.13.0.
"""

from __future__ import annotations

from torch import Tensor

from npu_fusion.meta_impls._checks import FLOATS, check, check_dtype, check_rank, check_size
from npu_fusion.meta_impls._registry import operator

OP = "npu_swiglu"


@operator("npu_swiglu(Tensor input, int dim=-1) -> Tensor")
def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """Shape and dtype of ``input`` (float16, bfloat16 or float32, any rank from 1) with ``dim`` halved.

    Raises ``ValueError`` for another dtype, a ``dim`` out of range or of odd size.
    """
    check_dtype(OP, "input", input, *FLOATS)
    check_rank(OP, "input", input, 1)
    rank = input.dim()
    check(-rank <= dim < rank, OP, "dim", dim, f"{-rank} to {rank - 1}")
    shape = list(input.shape)
    check_size(shape[dim] % 2 == 0, OP, f"input has shape {shape}; accepted: an even dimension {dim}")
    shape[dim] = shape[dim] // 2
    return input.new_empty(shape)
