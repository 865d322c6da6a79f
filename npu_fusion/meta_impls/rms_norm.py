"""npu_rms_norm: root mean square layer normalization.

::

    rstd = 1 / sqrt(mean(x^2 over the last gamma.dim() dimensions) + epsilon)    fp32
    y    = round(x * rstd * gamma)                                               fp32, ONE rounding at the end

Trap: Hugging Face's LlamaRMSNorm rounds ``x * rstd`` to the model's dtype before it multiplies by the weight
(two roundings); its bf16 and fp16 results differ from this operator's by up to one unit in the last place.

Formula: op-plugin documentation and public kernel sources of torch_npu 2.13.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.meta_impls._checks import FLOATS, check_dtype, check_rank
from npu_fusion.meta_impls._norm import check_gamma, new_rstd
from npu_fusion.meta_impls._registry import operator


@operator("npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)")
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    """``input`` [..., *gamma.shape], 1 to 8 dimensions, float16, bfloat16 or float32; ``gamma`` of the same
    dtype, or float32.

    Returns ``y`` (shape and dtype of ``input``) and ``rstd`` (float32, normalized dimensions 1).
    Raises ``ValueError`` for any other dtype, rank or shape, and for a normalized dimension of size 0.
    """
    op = "npu_rms_norm"
    check_dtype(op, "input", input, *FLOATS)
    check_rank(op, "input", input, 1, 8)
    check_dtype(op, "gamma", gamma, input.dtype, torch.float32)
    check_gamma(op, "input", input, gamma)
    return input.new_empty(input.shape), new_rstd(input, gamma)
