"""npu_grouped_matmul_swiglu_quant: int8 matmul of each expert's rows, SwiGLU, per-token quantization.

    x [M, K] int8, rows of expert e ──▶ int32 (x @ weight[e]) ──▶ fp32 * weight_scale[e] * x_scale[row]
                                                                             │ [M, 2N]
    scale = amax|s| / 127 ; y = rint(s / scale)  ◀──  s = silu(first half) * second half

The int32 sums are exact; everything after them is fp32; y is rounded half to even and saturated.

Traps:

* the FIRST half is activated, unlike in npu_dequant_swiglu_quant;
* ``group_list`` holds running sums ([3, 4, 4, 6]: expert 2 has no rows), unlike group_index there;
* rows from ``group_list[-1]`` on are uninitialized memory on the device; here they are zeroed;
* a zero row has scale 0 and y 0;
* the third result is reserved: a float32 scalar without meaning (here 0);
* the device takes ``weight`` in FRACTAL_NZ format. After npu_format_cast its logical shape is still
  [E, K, 2N]; the documentation also passes a view of the storage, [E, ceil(2N/32), ceil(K/16), 16, 32].

The int4-weight form (A8W4: int32 or int4 weight, ``bias`` as the assist matrix) is refused.

Formula: op-plugin documentation and public kernel sources of torch_npu 2.13.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import FLOATS, check, check_dtype, check_rank, check_shape, check_size
from npu_fusion.meta_impls._registry import operator

OP = "npu_grouped_matmul_swiglu_quant"

# One fractal of int8 in the NZ format: 16 rows of 32 bytes.
NZ_ROWS, NZ_COLUMNS = 16, 32


@operator(
    "npu_grouped_matmul_swiglu_quant(Tensor x, Tensor weight, Tensor group_list, Tensor weight_scale, "
    "Tensor x_scale, *, Tensor? bias=None, Tensor? offset=None) -> (Tensor, Tensor, Tensor)"
)
def npu_grouped_matmul_swiglu_quant(
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor,
    *,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``y`` int8 [M, N], ``scale`` float32 [M] and a reserved float32 scalar.

    * ``x``: int8 [M, K];
    * ``weight``: int8 [E, K, 2N], or its NZ storage [E, ceil(2N/32), ceil(K/16), 16, 32];
    * ``group_list``: int64 [E], the end of each expert's rows, not decreasing, at most M;
    * ``weight_scale``: float32, float16 or bfloat16 [E, 2N];
    * ``x_scale``: float32 [M];
    * ``bias``, ``offset``: None.

    Raises ``ValueError`` for anything else.
    """
    check_dtype(OP, "x", x, torch.int8)
    check_rank(OP, "x", x, 2, 2)
    check_dtype(OP, "weight", weight, torch.int8)
    check_dtype(OP, "group_list", group_list, torch.int64)
    check_dtype(OP, "weight_scale", weight_scale, *FLOATS)
    check_rank(OP, "weight_scale", weight_scale, 2, 2)
    check_dtype(OP, "x_scale", x_scale, torch.float32)
    check(bias is None, OP, "bias", "given", "None (it belongs to int4 weights, which are not supported)")
    check(offset is None, OP, "offset", "given", "None (reserved)")

    tokens, inner = x.shape
    experts, columns = weight_scale.shape
    positive_even = (columns % 2 == 0) & (columns > 0)
    given = f"weight_scale has shape {list(weight_scale.shape)}"
    check_size(positive_even, OP, f"{given}; accepted: a positive even last dimension")
    if weight.dim() == 5:
        fractals = [experts, _ceil_div(columns, NZ_COLUMNS), _ceil_div(inner, NZ_ROWS), NZ_ROWS, NZ_COLUMNS]
        check_shape(OP, "weight", weight, fractals)
    else:
        check_shape(OP, "weight", weight, [experts, inner, columns])
    check_shape(OP, "group_list", group_list, [experts])
    check_shape(OP, "x_scale", x_scale, [tokens])

    y = x.new_empty([tokens, columns // 2])
    return y, x.new_empty([tokens], dtype=torch.float32), x.new_empty([], dtype=torch.float32)


def _ceil_div(size: int | torch.SymInt, divisor: int) -> int | torch.SymInt:
    return (size + divisor - 1) // divisor
