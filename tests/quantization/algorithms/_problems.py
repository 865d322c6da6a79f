"""Problems for algorithms: weights, and inputs whose channels differ in size and depend on each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from npu_fusion.quantization.algorithms import ALGORITHMS
from npu_fusion.quantization.algorithms._base import Problem, Solution
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import InputScheme, Scheme, WeightScheme
from npu_fusion.quantization.statistics import Statistics

INT8, INT4 = WeightScheme("int8"), WeightScheme("int4")
INT4_GROUPS = WeightScheme("int4", strategy="group", group_size=32)
INT4_ASYMMETRIC = WeightScheme("int4", symmetric=False, strategy="group", group_size=32)
INT8_TENSOR = WeightScheme("int8", symmetric=False, strategy="tensor")
MXFP4 = WeightScheme("mxfp4_e2m1", strategy="group", group_size=32)
MXFP8 = WeightScheme("mxfp8_e4m3fn", strategy="group", group_size=32)
FP4 = WeightScheme("float4_e2m1", strategy="group", group_size=32)
E1M2 = WeightScheme("float4_e1m2", strategy="group", group_size=32)
FP8, HIF8 = WeightScheme("float8_e4m3fn"), WeightScheme("hifloat8", strategy="tensor")
WEIGHT_SCHEMES = (
    INT8, INT4, INT4_GROUPS, INT4_ASYMMETRIC, INT8_TENSOR, MXFP4, MXFP8, FP4, E1M2, FP8, HIF8,
)  # fmt: skip


def scheme_id(scheme: WeightScheme | InputScheme | None) -> str:
    if scheme is None:
        return "no_inputs"
    kind = "" if scheme.symmetric else "asymmetric-"
    return f"{scheme.type}-{kind}{scheme.strategy}"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, channels: int, seed: int = 0) -> Tensor:
    """Rows of few directions and some noise: what GPTQ and SignRound live on."""
    mixed = random(rows, channels // 4, seed=seed) @ random(channels // 4, channels, seed=seed + 1)
    return mixed * 2 / channels**0.5 + 0.3 * random(rows, channels, seed=seed + 2)


def with_outliers(rows: int, channels: int, factor: float = 50.0, seed: int = 0) -> Tensor:
    """Every 16th channel is that much larger than the others."""
    x = random(rows, channels, seed=seed)
    x[:, ::16] *= factor
    return x


def statistics(x: Tensor | None, channels: int, needs: frozenset[str], images: bool = False) -> Statistics:
    """Of two batches, the halves of ``x``; None: of a layer that never ran."""
    result = Statistics(channels, needs, torch.device("cpu"), images=images)
    if x is not None:
        for half in x.chunk(2):
            result.update(half)
    return result


def problem(
    algorithm: str,
    weights: Sequence[Tensor],
    x: Tensor | None,
    scheme: WeightScheme,
    inputs: InputScheme | None = None,
    dtype: torch.dtype = torch.float32,
    options: dict[str, Any] | None = None,
    **others: Any,
) -> Problem:
    """One with no more statistics than the algorithm says it needs."""
    complete = Scheme(scheme, inputs, algorithm, options or {})
    images = x is not None and x.dim() == 4
    channels = x.size(1) if x is not None and images else weights[0].size(1)
    needs = ALGORITHMS[algorithm].needs(complete)
    return Problem(tuple(weights), statistics(x, channels, needs, images), complete, dtype, **others)


def solve(algorithm: str, *args: Any, **kwargs: Any) -> Solution:
    return ALGORITHMS[algorithm].solve(problem(algorithm, *args, **kwargs))


def exact_error(value: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """The squared error of each output over all rows of ``x``, in float64 and without a Gram matrix."""
    return (x.double() @ (value.double() - weight.double()).t()).square().sum(0)


def same(left: QuantizedWeight, right: QuantizedWeight) -> bool:
    """Equal to the bit?"""
    pairs = (
        (left.codes, right.codes),
        (left.scale, right.scale),
        (left.offset, right.offset),
        (left.channel_scale, right.channel_scale),
    )
    return left.scheme == right.scheme and all(
        (a is None) == (b is None) and (a is None or b is None or torch.equal(_bits(a), _bits(b)))
        for a, b in pairs
    )


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
