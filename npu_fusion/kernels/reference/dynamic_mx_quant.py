"""npu_dynamic_mx_quant on the CPU; formula, layout and traps in the file of this name in meta_impls."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from npu_fusion import formats
from npu_fusion.formats import mx
from npu_fusion.kernels.reference._mx import quantize_blocks
from npu_fusion.meta_impls._dtypes import FLOAT4_E2M1
from npu_fusion.meta_impls._registry import cpu_kernel
from npu_fusion.meta_impls.dynamic_mx_quant import NEVER_SATURATES, element


@cpu_kernel("npu_dynamic_mx_quant")
def npu_dynamic_mx_quant(
    input: Tensor,
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = FLOAT4_E2M1,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[Tensor, Tensor]:
    name = element(dst_type)
    dim = axis % input.dim()
    rows = input.to(torch.float32).movedim(dim, -1)
    size = rows.size(-1)
    # Zeros fill the last pair of blocks: they raise no maximum, and blocks of them have the padding's scale.
    pairs = -(-size // (2 * block_size))
    padded = pad(rows, (0, 2 * pairs * block_size - size))
    mode = "rceil" if scale_alg == NEVER_SATURATES else "floor"
    codes, exponent = quantize_blocks(padded.unflatten(-1, (2 * pairs, block_size)), name, mode)
    y = codes.flatten(-2)[..., :size].movedim(-1, dim).contiguous()
    scale = mx.e8m0(exponent).view(torch.uint8).unflatten(-1, (pairs, 2)).movedim(-2, dim)
    return formats.pack_nibbles(y) if name.startswith("float4") else y, scale.contiguous()
