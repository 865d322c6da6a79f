"""What a user writes instead of the fused operators: plain PyTorch, for eager and for ``torch.compile``.

Each takes the tensors that the operator takes and computes its outputs by its formula
(:mod:`npu_fusion.meta_impls`), in the dtypes in which models have it: int32 products and bfloat16
activations, fp32 in between. Outputs that no user would compute are left out (the ``rstd`` of the norms).
Quantization by rows is :func:`quantize_rows`, the one that this package's own quantized layers trace to.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from npu_fusion.quantization.modules.w8a8_linear import quantize_rows

EPSILON = 1e-6


def dequantized(product: Tensor, channel: Tensor, token: Tensor) -> Tensor:
    """fp32 of int32 [T, C] with the scales of its channels [C] and tokens [T]."""
    return product.float() * channel * token.unsqueeze(-1)


def gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def quantized(x: Tensor, step: Tensor) -> Tensor:
    return (x.float() / step).round().clamp(-128, 127).to(torch.int8)


def normalized(x: Tensor, gamma: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON) * gamma.float()).to(x.dtype)


def halves_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def pairs_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Adjacent pairs in, halves out: the rotation of latent attention."""
    return halves_rotated(torch.cat((x[..., ::2], x[..., 1::2]), -1), cos, sin)


def dequant_swiglu_quant(x: Tensor, channel: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows(gated(dequantized(x, channel, token)))


def dequant_swiglu_quant_static(x: Tensor, channel: Tensor, token: Tensor, step: Tensor) -> Tensor:
    return quantized(gated(dequantized(x, channel, token)), step)


def swiglu_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """The scale is that of the quantization, the inverse of the others'."""
    y, scale = quantize_rows(gated(x.float()))
    return y, scale.reciprocal()


def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    total = x1 + x2
    return normalized(total, gamma), total


def add_rms_norm_quant(x1: Tensor, x2: Tensor, gamma: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    total = x1 + x2
    return quantized(normalized(total, gamma), step), total


def add_rms_norm_dynamic_quant(x1: Tensor, x2: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = x1 + x2
    return *quantize_rows(normalized(total, gamma)), total


def quant_matmul(q: Tensor, weight: Tensor, channel: Tensor, token: Tensor) -> Tensor:
    return dequantized(torch._int_mm(q, weight), channel, token).bfloat16()


def mla_prolog(
    x: Tensor,
    weight_dq: Tensor,
    weight_uq_qr: Tensor,
    weight_uk: Tensor,
    weight_dkv_kr: Tensor,
    gamma_cq: Tensor,
    gamma_ckv: Tensor,
    sin: Tensor,
    cos: Tensor,
    kv_cache: Tensor,
    kr_cache: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """Latent attention up to its scores, in bfloat16; the new rows are written into the caches."""
    n = normalized(x @ weight_dq, gamma_cq)
    return _attention_inputs(
        n @ weight_uq_qr, x @ weight_dkv_kr, weight_uk, gamma_ckv, sin, cos, kv_cache, kr_cache, slots
    )


def mla_prolog_int8(
    x: Tensor,
    scale_x: Tensor,
    weight_dq: Tensor,
    scale_dq: Tensor,
    weight_uq_qr: Tensor,
    scale_uq_qr: Tensor,
    weight_uk: Tensor,
    weight_dkv_kr: Tensor,
    scale_dkv_kr: Tensor,
    gamma_cq: Tensor,
    gamma_ckv: Tensor,
    sin: Tensor,
    cos: Tensor,
    kv_cache: Tensor,
    kr_cache: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same with int8 activations and weights, but for ``weight_uk``."""
    n = normalized(quant_matmul(x, weight_dq, scale_dq, scale_x), gamma_cq)
    q, scale = quantize_rows(n)
    up = quant_matmul(q, weight_uq_qr, scale_uq_qr, scale.squeeze(-1))
    down = quant_matmul(x, weight_dkv_kr, scale_dkv_kr, scale_x)
    return _attention_inputs(up, down, weight_uk, gamma_ckv, sin, cos, kv_cache, kr_cache, slots)


def _attention_inputs(
    up: Tensor,
    down: Tensor,
    weight_uk: Tensor,
    gamma_ckv: Tensor,
    sin: Tensor,
    cos: Tensor,
    kv_cache: Tensor,
    kr_cache: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    heads, width, latent = weight_uk.shape
    nope, rope = up.unflatten(-1, (heads, -1)).tensor_split((width,), -1)
    query = torch.bmm(nope.transpose(0, 1), weight_uk).transpose(0, 1)
    ckv, key = down.tensor_split((latent,), -1)
    kv_cache.view(-1, latent).index_copy_(0, slots, normalized(ckv, gamma_ckv))
    kr_cache.view(-1, key.shape[-1]).index_copy_(0, slots, pairs_rotated(key, cos, sin))
    return query.contiguous(), pairs_rotated(rope, cos.unsqueeze(1), sin.unsqueeze(1))
