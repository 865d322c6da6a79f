"""npu_dynamic_mx_quant: blocks of neighbours that share one scale, a power of two taken from the data.

With the blocks of ``block_size`` neighbours along ``axis``, the last of which may be shorter::

    exponent = floor(log2(amax|block|)) - EMAX          scale_alg 0 (OCP)
    exponent = ceil(log2(amax|block| / MAX))            scale_alg 1
    y        = sat(round(block / 2^exponent))           mxscale = exponent + 127, in 8 bits (e8m0)

    dst_type        y                                     EMAX     MAX
    float8_e4m3fn   its dtype                             8        448
    float8_e5m2     its dtype                             15       57344
    float4_e2m1     uint8, two values in each             2        6
    float4_e1m2     uint8, two values in each             0        1.75

The exponent is clamped to [-127, 127]; rounding is half to even. A block with an element that is not finite
has the scale NaN (255) and zeros.

Scales lie in pairs, as the matrix unit reads them: the shape of ``mxscale`` is that of ``input`` with half as
many entries along ``axis`` as there are blocks, and a last dimension of 2, whatever ``axis`` is::

    mxscale[.., p, .., i] = scale of block 2p + i; of an odd number of blocks the last pair ends in 0 (2^-127)

Two values share a byte along the LAST dimension (the even one in the low nibble), also where ``axis`` is
another.

Traps: ``mxscale`` is uint8, not e8m0. Where the scale is the smallest (2^-127) the kernel of Ascend 950 gives
zeros, while its reference divides, as is done here. From float16 to 4 bits that kernel goes by way of
bfloat16, which rounds twice; here it is once.

Formula: documentation (aclnnDynamicMxQuant, its V2 and V3), kernels and reference of DynamicMxQuant; layout
and dtypes as in the Meta kernel of torch_npu 2.13.0. Only on Ascend 950. Not implemented: ``round_mode``
other than "rint" (for 4 bits the device has "floor" and "round"), ``scale_alg`` 2, and ``dst_type_max`` and
``max_low_bound``, which belong to ``scale_alg`` 2 and 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.formats import float8
from npu_fusion.meta_impls._checks import check, check_choice, check_dtype, check_rank, check_size
from npu_fusion.meta_impls._dtypes import FLOAT4_E1M2, FLOAT4_E2M1, dtype_argument
from npu_fusion.meta_impls._registry import operator

OP = "npu_dynamic_mx_quant"

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_FLOAT4 = {FLOAT4_E2M1: "float4_e2m1", FLOAT4_E1M2: "float4_e1m2"}
_FLOAT8 = {dtype: name for name, dtype in float8.DTYPES.items()}
_ACCEPTED = "24 or 292 (float8_e4m3fn), 23 or 291 (float8_e5m2), 296 (float4_e2m1), 297 (float4_e1m2)"
_LARGEST_BLOCK = 1024

OCP, NEVER_SATURATES = 0, 1
"""``scale_alg``."""


@operator(
    'npu_dynamic_mx_quant(Tensor input, *, int axis=-1, str round_mode="rint", int dst_type=296, '
    "int block_size=32, int? scale_alg=0, float dst_type_max=0.0, float max_low_bound=0.0) "
    "-> (Tensor, Tensor)"
)
def npu_dynamic_mx_quant(
    input: Tensor,
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int | torch.dtype = FLOAT4_E2M1,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Quantize ``input`` in blocks along ``axis``; returns ``(y, mxscale)``.

    Args:
        input: fp16, bf16 or fp32 (then with at least 32 entries along ``axis``), rank 1 to 7. axis: from
        -rank to rank - 1. round_mode: "rint". dst_type: 24 or 292 (float8_e4m3fn), 23 or 291 (float8_e5m2),
        296 (float4_e2m1) or 297 (float4_e1m2); 4 bits
            need an even last dimension.
        block_size: a multiple of 32, at most 1024; 32 for fp32.
        scale_alg: None or 0 (OCP), 1 (nothing saturates; 8 bits only).
        dst_type_max, max_low_bound: must be 0.

    Returns:
        y: of the shape of ``input`` in float8; for 4 bits uint8 with the last dimension divided by 2.
        mxscale: uint8; the shape is in the docstring of this module.

    Raises ``ValueError`` for anything else.
    """
    check_dtype(OP, "input", input, *_FLOATS)
    check_rank(OP, "input", input, 1, 7)
    check(-input.dim() <= axis < input.dim(), OP, "axis", axis, f"{-input.dim()} to {input.dim() - 1}")
    check_choice(OP, "round_mode", round_mode, ("rint",))
    name = element(dst_type)
    algorithms = (None, OCP, NEVER_SATURATES) if name in float8.DTYPES else (None, OCP)
    check_choice(OP, "scale_alg", scale_alg, algorithms)
    check(dst_type_max == 0, OP, "dst_type_max", dst_type_max, "0")
    check(max_low_bound == 0, OP, "max_low_bound", max_low_bound, "0")
    dim = axis % input.dim()
    wide = input.dtype == torch.float32
    blocks = block_size > 0 and block_size % 32 == 0 and block_size <= (32 if wide else _LARGEST_BLOCK)
    accepted = "32 for float32" if wide else f"32 to {_LARGEST_BLOCK} in steps of 32"
    check(blocks, OP, "block_size", block_size, accepted)
    if wide:
        message = f"input has {input.size(dim)} float32 entries along axis {axis}; accepted: at least 32"
        check_size(input.size(dim) >= 32, OP, message)

    *leading, columns = input.shape
    scales = [*input.shape, 2]
    scales[dim] = -(-input.size(dim) // (2 * block_size))
    mxscale = input.new_empty(scales, dtype=torch.uint8)
    if name in float8.DTYPES:
        return input.new_empty(input.shape, dtype=float8.DTYPES[name]), mxscale
    check_size(columns % 2 == 0, OP, f"input has {columns} columns; accepted: a multiple of 2 ({name})")
    return input.new_empty((*leading, columns // 2), dtype=torch.uint8), mxscale


def element(dst_type: int | torch.dtype) -> str:
    """The format of the elements, a name of ``npu_fusion.formats``; ``ValueError`` for other types."""
    if isinstance(dst_type, int) and dst_type in _FLOAT4:
        return _FLOAT4[dst_type]
    return _FLOAT8[dtype_argument(OP, "dst_type", dst_type, torch.uint8, _FLOAT8, _ACCEPTED)]
