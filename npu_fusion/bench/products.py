"""The operators with matrix products inside, beside these products alone.

``npu_quant_matmul`` multiplies [tokens, width] by [width, width], ``npu_mla_prolog_v3`` has the sizes of
DeepSeek-V3 with 32 heads (its share of a device with the heads split among four). The products alone are
``torch._int_mm`` and ``torch.mm`` on the same operands, each in both layouts of the weight: ``n x k`` read
through ``.t()``, as ``torch.nn.Linear`` keeps it, and contiguous ``k x n``. The faster one counts. The heads'
products are one ``torch.bmm``, into a tensor of its own or in the operator's order. A prolog's products are
called one after the other, as in the operator, so that each finds its weight in memory and not in a cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_fusion.bench import formulas
from npu_fusion.bench.cases import Random, positive, rows

HIDDEN, Q_RANK, HEADS, HEAD, ROTARY, LATENT = 7168, 1536, 32, 128, 64, 512
PAGES, PLACES = 16, 128
"""Of the caches."""

npu = torch.ops.npu
N_K, K_N = "n x k", "k x n"
_SHAPES = ((HIDDEN, Q_RANK), (Q_RANK, HEADS * (HEAD + ROTARY)), (HIDDEN, LATENT + ROTARY))
"""Of weight_dq, weight_uq_qr and weight_dkv_kr."""


@dataclass(frozen=True)
class Call:
    """One call with everything beside it; ``products``: for each product its layouts by name."""

    fused: Callable[[], Any]
    eager: Callable[..., Any]
    args: tuple[Tensor, ...]
    products: Sequence[Mapping[str, Callable[[], Any]]]


def quant_matmul(layout: str) -> Callable[[int, int, Random], Call]:
    """Of ``npu_quant_matmul`` with a bfloat16 result, its weight in this layout."""

    def make(tokens: int, width: int, random: Random) -> Call:
        q, weights = _int8(random, tokens, width), _layouts(_int8(random, width, width))
        given = weights[layout]
        channel, token = positive(random, width), positive(random, tokens)

        def fused() -> Tensor:
            return npu.npu_quant_matmul(q, given, channel, pertoken_scale=token, output_dtype=torch.bfloat16)

        return Call(
            fused, formulas.quant_matmul, (q, given, channel, token), [_each(torch._int_mm, q, weights)]
        )

    return make


def mla_prolog(layout: str, tokens: int, random: Random) -> Call:
    """Of ``npu_mla_prolog_v3`` in bfloat16, its three large weights in this layout."""
    weights = [_layouts(rows(random, k, n) * k**-0.5) for k, n in _SHAPES]
    dq, uq_qr, dkv_kr = (layouts[layout] for layouts in weights)
    x = rows(random, tokens, HIDDEN)
    rest = _rest(tokens, random)
    uk, *given, kv_cache, kr_cache, slots = rest

    def fused() -> Any:
        return npu.npu_mla_prolog_v3(
            x, dq, uq_qr, uk, dkv_kr, *given, kv_cache, kr_cache, cache_index=slots,
            rmsnorm_epsilon_cq=formulas.EPSILON, rmsnorm_epsilon_ckv=formulas.EPSILON,
        )  # fmt: skip

    operands = zip((x, rows(random, tokens, Q_RANK), x), weights, strict=True)
    products = [_each(torch.mm, a, layouts) for a, layouts in operands]
    args = (x, dq, uq_qr, uk, dkv_kr, *rest[1:])
    return Call(fused, formulas.mla_prolog, args, [*products, _heads(tokens, uk, random)])


def mla_prolog_int8(layout: str, tokens: int, random: Random) -> Call:
    """The same with ``weight_quant_mode`` 2: int8 but for ``weight_uk``, bfloat16 caches."""
    weights = [_layouts(_int8(random, k, n)) for k, n in _SHAPES]
    dq, uq_qr, dkv_kr = (layouts[layout] for layouts in weights)
    scale_dq, scale_uq_qr, scale_dkv_kr = (positive(random, 1, n) for _, n in _SHAPES)
    x, scale_x = _int8(random, tokens, HIDDEN), positive(random, tokens)
    rest = _rest(tokens, random)
    uk, *given, kv_cache, kr_cache, slots = rest

    def fused() -> Any:
        return npu.npu_mla_prolog_v3(
            x, dq, uq_qr, uk, dkv_kr, *given, kv_cache, kr_cache, cache_index=slots,
            dequant_scale_x=scale_x.unsqueeze(-1), dequant_scale_w_dq=scale_dq,
            dequant_scale_w_uq_qr=scale_uq_qr, dequant_scale_w_dkv_kr=scale_dkv_kr, weight_quant_mode=2,
            rmsnorm_epsilon_cq=formulas.EPSILON, rmsnorm_epsilon_ckv=formulas.EPSILON,
        )  # fmt: skip

    operands = zip((x, _int8(random, tokens, Q_RANK), x), weights, strict=True)
    products = [_each(torch._int_mm, a, layouts) for a, layouts in operands]
    args = (x, scale_x, dq, scale_dq, uq_qr, scale_uq_qr, uk, dkv_kr, scale_dkv_kr, *rest[1:])
    return Call(fused, formulas.mla_prolog_int8, args, [*products, _heads(tokens, uk, random)])


MATMULS = {f"quant_matmul, weight {layout}": quant_matmul(layout) for layout in (N_K, K_N)}
PROLOGS = {
    f"mla_prolog_v3, {dtype}, weights {layout}": functools.partial(make, layout)
    for dtype, make in (("bfloat16", mla_prolog), ("int8", mla_prolog_int8))
    for layout in (N_K, K_N)
}


def _int8(random: Random, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=random, dtype=torch.int8)


def _rest(tokens: int, random: Random) -> list[Tensor]:
    """weight_uk, the two gammas, sine and cosine, the two caches, and where the rows go."""
    uk = rows(random, HEADS, HEAD, LATENT) * HEAD**-0.5
    gammas = [rows(random, Q_RANK), rows(random, LATENT)]
    angles = [rows(random, tokens, ROTARY), rows(random, tokens, ROTARY)]
    caches = [rows(random, PAGES, PLACES, 1, width) for width in (LATENT, ROTARY)]
    slots = torch.randperm(PAGES * PLACES, generator=random)[:tokens]
    return [uk, *gammas, *angles, *caches, slots]


def _layouts(weight: Tensor) -> dict[str, Tensor]:
    return {N_K: weight.t().contiguous().t(), K_N: weight}


def _each(
    product: Callable[[Tensor, Tensor], Tensor], a: Tensor, weights: Mapping[str, Tensor]
) -> dict[str, Callable[[], Tensor]]:
    return {layout: functools.partial(product, a, weight) for layout, weight in weights.items()}


def _heads(tokens: int, uk: Tensor, random: Random) -> dict[str, Callable[[], Tensor]]:
    nope = rows(random, HEADS, tokens, HEAD)
    query = torch.empty(tokens, HEADS, LATENT, dtype=torch.bfloat16)
    return {
        "of its own": lambda: torch.bmm(nope, uk),
        "in the order of query": lambda: torch.bmm(nope, uk, out=query.transpose(0, 1)),
    }
