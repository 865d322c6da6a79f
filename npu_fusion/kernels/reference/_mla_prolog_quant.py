"""What the quantization modes of mla_prolog change; formula in meta_impls/mla_prolog.py."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.kernels.reference._mx import dequantize_mx, quantize_mx
from npu_fusion.kernels.reference._quant import INT8_MAX, saturate, symmetric_rows
from npu_fusion.kernels.reference.quant_matmul import int8_matmul
from npu_fusion.meta_impls._mla_prolog import MXFP8, PER_CHANNEL, PER_TENSOR, PER_TILE, Call

_FP8_MAX = 448.0
_LARGEST = {torch.int8: INT8_MAX, torch.float8_e4m3fn: _FP8_MAX}
_SMALLEST_FP8_AMAX = 1e-4


def product(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``x @ weight`` in fp32; rounded to ``dtype`` if the operands are not quantized.

    ``x_scale`` and ``weight_scale``: [R, 1] and [1, columns] for int8, [R, K / 32] and [columns, K / 32] for
    mxfp8.
    """
    if weight_scale is None:
        return (x.to(torch.float32) @ weight.to(torch.float32)).to(dtype).to(torch.float32)
    assert x_scale is not None
    if weight.dtype == torch.int8:
        return int8_matmul(x, weight).to(torch.float32) * x_scale * weight_scale
    return dequantize_mx(x, x_scale) @ dequantize_mx(weight.t(), weight_scale).t()


def normalized(c: Call, n: Tensor) -> tuple[Tensor, Tensor]:
    """query_norm as the product with weight_uq_qr takes it, from fp32 ``n``, and its scale ([0]: none)."""
    if c.weight_uq_qr.dtype == torch.int8:
        if c.smooth_scales_cq is not None:
            n = n * c.smooth_scales_cq
        qn, scale = symmetric_rows(n, INT8_MAX, torch.int8)
        return qn, scale.unsqueeze(-1)
    qn = n.to(c.dtype)
    if c.weight_quant_mode == MXFP8:
        return quantize_mx(qn.to(torch.float32))
    return qn, n.new_empty(0)


def quantize_query(c: Call, query: Tensor, query_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``query``, ``query_rope`` and dequant_scale_q_nope [R, N, 1]; as they are and [0] if not quantized."""
    if not c.query_quant_mode:
        return query, query_rope, query.new_empty(0, dtype=torch.float32)
    assert c.quant_scale_ckv is not None
    dtype = c.quantized_dtype
    query, scale = symmetric_rows(query.to(torch.float32), _LARGEST[dtype], dtype)
    scale = scale.unsqueeze(-1)
    factor = c.quant_scale_ckv.flatten()[0] / scale
    return query, (query_rope.to(torch.float32) * factor).to(c.dtype), scale


def cache_rows(c: Call, ckv: Tensor, kr: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows of kv_cache and kr_cache (None if it has none) from fp32 ``ckv`` and the rounded ``kr``."""
    mode, dtype = c.kv_cache_quant_mode, c.quantized_dtype
    if mode == PER_TILE:
        data, scale = _tiles(c, ckv)
        return torch.cat([part.view(torch.uint8) for part in (data, kr, scale)], dim=-1).view(dtype), None
    if mode == PER_TENSOR:
        assert c.quant_scale_ckv is not None
        return saturate(ckv * c.quant_scale_ckv.flatten()[0], dtype), kr
    if mode == PER_CHANNEL:
        assert c.quant_scale_ckv is not None
        assert c.quant_scale_ckr is not None
        return saturate(ckv * c.quant_scale_ckv, dtype), saturate(kr * c.quant_scale_ckr, dtype)
    return ckv.to(c.dtype), kr


def _tiles(c: Call, ckv: Tensor) -> tuple[Tensor, Tensor]:
    """``ckv`` [R, Hckv] quantized tile by tile, and the scales [R, Hckv / tile_size]."""
    tiles = ckv.unflatten(-1, (-1, c.tile_size))
    amax = tiles.abs().amax(dim=-1, keepdim=True)
    dtype = c.quantized_dtype
    if dtype == torch.int8:
        limit = amax if c.k_nope_clip_alpha is None else amax * c.k_nope_clip_alpha
        scale = limit / INT8_MAX
        # A tile of zeros: NaN, which saturate makes 0 as the device does.
        quotient = tiles.clamp(-limit, limit) / scale
    else:
        scale = amax.clamp(min=_SMALLEST_FP8_AMAX) / _FP8_MAX
        quotient = tiles / scale
    return saturate(quotient, dtype).flatten(-2), scale.squeeze(-1)
