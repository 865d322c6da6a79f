"""npu_transpose_batchmatmul: a batch of matrix products between transpositions.

::

    a = input.permute(perm_x1)                     [B, M, K]
    w = weight.permute(perm_x2)                    [B, K, N]
    y = (a @ w).permute(1, 0, 2)                   [M, B, N]

summed in fp32, with one rounding to the dtype of the input. With ``scale`` the result is int8, all batches in
one row: ``sat(rint(y.reshape(M, 1, B * N) * scale (+ offset)))`` of the fp32 sums. With a
``batch_split_factor`` f above 1 the batches are dealt to f results:
``y.reshape(M, f, B * N / f).permute(1, 0, 2)``.

Traps:

* ``perm_y=None`` is [1, 0, 2], not the identity: tokens come first.
* ``scale`` is the bit pattern of ``npu_trans_quant_param``, which keeps 10 mantissa bits of the fp32 scale
  and may hold an integer offset.
* The golden of op-plugin truncates the int8 result; here, as in npu_quant_matmul, it is rounded half to even.
* ``batch_split_factor`` splits B (aclnn documentation, Meta implementation and golden); the op-plugin
  documentation says N.

Devices take B and N up to 65535; A2 and A3 take ``perm_x2=[0, 2, 1]`` only without scale and split, beside
``perm_x1=[1, 0, 2]``, and torch_npu only since CANN 8.5. uint64 scales are not implemented.

Formula: op-plugin and aclnn documentation, Meta implementation and golden of torch_npu 2.13.0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import (
    FLOATS,
    check,
    check_choice,
    check_dtype,
    check_rank,
    check_shape,
    check_size,
)
from npu_fusion.meta_impls._registry import operator

OP = "npu_transpose_batchmatmul"

IDENTITY = (0, 1, 2)
PERM_Y = (1, 0, 2)


@operator(
    "npu_transpose_batchmatmul(Tensor input, Tensor weight, *, Tensor? bias=None, Tensor? scale=None, "
    "int[]? perm_x1=None, int[]? perm_x2=None, int[]? perm_y=None, int? batch_split_factor=1) -> Tensor"
)
def npu_transpose_batchmatmul(
    input: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    perm_x1: Sequence[int] | None = None,
    perm_x2: Sequence[int] | None = None,
    perm_y: Sequence[int] | None = None,
    batch_split_factor: int | None = 1,
) -> Tensor:
    """Multiply ``input`` by ``weight``, batch by batch.

    Args:
        input: [B, M, K], or [M, B, K] with ``perm_x1=[1, 0, 2]``; fp16, bf16 or fp32.
        weight: [B, K, N], or [B, N, K] with ``perm_x2=[0, 2, 1]``; the dtype of ``input``.
        bias: None.
        scale: int64 [B * N]; fp16 ``input`` only.
        perm_x1: None, [0, 1, 2] or [1, 0, 2].
        perm_x2: None, [0, 1, 2] or [0, 2, 1].
        perm_y: None or [1, 0, 2].
        batch_split_factor: a divisor of B from 1 on; None is 1; 1 with ``scale``.

    Returns [M, B, N] in the dtype of ``input``; with ``scale`` int8 [M, 1, B * N]; with a
    ``batch_split_factor`` f above 1 [f, M, B * N / f]. Raises ``ValueError`` for anything else.
    """
    check(bias is None, OP, "bias", "given", "None")
    check_dtype(OP, "input", input, *FLOATS)
    check_dtype(OP, "weight", weight, input.dtype)
    check_rank(OP, "input", input, 3, 3)
    check_rank(OP, "weight", weight, 3, 3)
    check_choice(OP, "perm_x1", list(perm_x1 or IDENTITY), ([0, 1, 2], [1, 0, 2]))
    check_choice(OP, "perm_x2", list(perm_x2 or IDENTITY), ([0, 1, 2], [0, 2, 1]))
    check_choice(OP, "perm_y", list(perm_y or PERM_Y), ([1, 0, 2],))

    batch, rows, inner = (input.size(dim) for dim in perm_x1 or IDENTITY)
    weight_batch, weight_rows, columns = (weight.size(dim) for dim in perm_x2 or IDENTITY)
    message = f"input has {batch} batches, weight {weight_batch}; accepted: the same number"
    check_size(batch == weight_batch, OP, message)
    message = f"input has {inner} columns, weight {weight_rows} rows; accepted: the same number"
    check_size(inner == weight_rows, OP, message)

    parts = 1 if batch_split_factor is None else batch_split_factor
    check(parts >= 1, OP, "batch_split_factor", parts, "1 or more")
    message = f"batch_split_factor is {parts}; accepted: a divisor of {batch}, the number of batches"
    check_size(batch % parts == 0, OP, message)
    if scale is not None:
        check_dtype(OP, "input with a scale", input, torch.float16)
        check_dtype(OP, "scale", scale, torch.int64)
        check_shape(OP, "scale", scale, (batch * columns,))
        check(parts == 1, OP, "batch_split_factor", parts, "1 with a scale")
        return input.new_empty((rows, 1, batch * columns), dtype=torch.int8)
    if parts > 1:
        return input.new_empty((parts, rows, batch // parts * columns))
    return input.new_empty((rows, batch, columns))
