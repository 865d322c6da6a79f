"""The operators that are measured: the call, the formula beside it, and inputs of any size.

Operators that read and write memory are measured for ``tokens`` rows of ``width``: the width of their result,
so ``dequant_swiglu_quant`` and ``swiglu_quant`` read rows of twice that. Rotations have heads of 128 (64 with
adjacent pairs), ``width`` in all. Those with matrix products are in :mod:`npu_fusion.bench.products`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_fusion.bench import formulas

HEAD, ROTARY_HEAD = 128, 64
npu = torch.ops.npu

Random = torch.Generator


@dataclass(frozen=True)
class Case:
    """One operator; ``fused`` and ``eager`` take what ``inputs(tokens, width, random)`` makes."""

    inputs: Callable[[int, int, Random], tuple[Tensor, ...]]
    fused: Callable[..., Any]
    eager: Callable[..., Any]


def rows(random: Random, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=random).to(dtype)


def positive(random: Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape, generator=random) * 0.01 + 0.001).to(dtype)


def _products(tokens: int, width: int, random: Random) -> tuple[Tensor, ...]:
    x = torch.randint(-2000, 2000, (tokens, 2 * width), generator=random, dtype=torch.int32)
    return x, positive(random, 2 * width), positive(random, tokens)


def _products_static(tokens: int, width: int, random: Random) -> tuple[Tensor, ...]:
    return *_products(tokens, width, random), positive(random, width)


def _added(tokens: int, width: int, random: Random) -> tuple[Tensor, ...]:
    return rows(random, tokens, width), rows(random, tokens, width), rows(random, width)


def _added_static(tokens: int, width: int, random: Random) -> tuple[Tensor, ...]:
    return *_added(tokens, width, random), positive(random, width, dtype=torch.bfloat16)


def _rotated(tokens: int, width: int, random: Random) -> tuple[Tensor, ...]:
    x = rows(random, 1, tokens, width // HEAD, HEAD)
    return x, rows(random, 1, tokens, 1, HEAD), rows(random, 1, tokens, 1, HEAD)


def _pairs(tokens: int, width: int, random: Random) -> tuple[Tensor, ...]:
    angles = (tokens, 1, 1, ROTARY_HEAD)
    x = rows(random, tokens, width // ROTARY_HEAD, 1, ROTARY_HEAD)
    return x, rows(random, *angles), rows(random, *angles)


def _dequant_swiglu_quant(x: Tensor, channel: Tensor, token: Tensor) -> Any:
    return npu.npu_dequant_swiglu_quant(
        x, weight_scale=channel, activation_scale=token, activate_left=True, quant_mode=1
    )


def _dequant_swiglu_quant_static(x: Tensor, channel: Tensor, token: Tensor, step: Tensor) -> Any:
    y, _ = npu.npu_dequant_swiglu_quant(
        x, weight_scale=channel, activation_scale=token, quant_scale=step, activate_left=True
    )
    return y


def _swiglu_quant(x: Tensor) -> Any:
    return npu.npu_swiglu_quant(x, activate_left=True, quant_mode=1)


def _add_rms_norm_quant(x1: Tensor, x2: Tensor, gamma: Tensor, step: Tensor) -> Any:
    y, _, total = npu.npu_add_rms_norm_quant(x1, x2, gamma, step, None, epsilon=formulas.EPSILON)
    return y, total


def _add_rms_norm_dynamic_quant(x1: Tensor, x2: Tensor, gamma: Tensor) -> Any:
    y, _, total, scale, _ = npu.npu_add_rms_norm_dynamic_quant(x1, x2, gamma, epsilon=formulas.EPSILON)
    return y, scale, total


def _add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor) -> Any:
    y, _, total = npu.npu_add_rms_norm(x1, x2, gamma, formulas.EPSILON)
    return y, total


CASES: dict[str, Case] = {
    "dequant_swiglu_quant": Case(_products, _dequant_swiglu_quant, formulas.dequant_swiglu_quant),
    "dequant_swiglu_quant, static": Case(
        _products_static, _dequant_swiglu_quant_static, formulas.dequant_swiglu_quant_static
    ),
    "swiglu_quant": Case(lambda t, w, r: (rows(r, t, 2 * w),), _swiglu_quant, formulas.swiglu_quant),
    "dynamic_quant": Case(
        lambda t, w, r: (rows(r, t, w),), lambda x: npu.npu_dynamic_quant(x), formulas.quantize_rows
    ),
    "rms_norm": Case(
        lambda t, w, r: (rows(r, t, w), rows(r, w)),
        lambda x, gamma: npu.npu_rms_norm(x, gamma, formulas.EPSILON)[0],
        formulas.normalized,
    ),
    "add_rms_norm": Case(_added, _add_rms_norm, formulas.add_rms_norm),
    "add_rms_norm_quant": Case(_added_static, _add_rms_norm_quant, formulas.add_rms_norm_quant),
    "add_rms_norm_dynamic_quant": Case(
        _added, _add_rms_norm_dynamic_quant, formulas.add_rms_norm_dynamic_quant
    ),
    "rotary_mul": Case(_rotated, lambda *args: npu.npu_rotary_mul(*args), formulas.halves_rotated),
    "interleave_rope": Case(_pairs, lambda *args: npu.npu_interleave_rope(*args), formulas.pairs_rotated),
}
