from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npu_fusion.quantization.algorithms.awq import scaling_factors
from npu_fusion.quantization.qparams import round_to_nearest
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import WeightScheme
from tests.quantization.algorithms._problems import (
    E1M2,
    FP4,
    INT4,
    INT4_ASYMMETRIC,
    INT4_GROUPS,
    MXFP4,
    exact_error,
    random,
    same,
    scheme_id,
    solve,
    with_outliers,
)

K = 128
LOW_BITS = (INT4, INT4_GROUPS, INT4_ASYMMETRIC, MXFP4, FP4, E1M2)


def total_error(
    weights: list[Tensor], quantized: tuple[QuantizedWeight, ...], smooth: Tensor | None, x: Tensor
) -> float:
    factors = 1.0 if smooth is None else smooth.double()
    return sum(
        exact_error(q.dequantize().double() * factors, w, x).sum().item()
        for q, w in zip(quantized, weights, strict=True)
    )


def test_factors() -> None:
    abs_mean = torch.tensor([4.0, 1.0, 16.0])
    assert scaling_factors(abs_mean, 0).tolist() == [1.0, 1.0, 1.0]
    # 4^.5, 1, 16^.5, divided by sqrt(4 * 1)
    assert scaling_factors(abs_mean, 0.5).tolist() == [1.0, 0.5, 2.0]
    assert scaling_factors(torch.tensor([1e-12, 1.0]), 0.9).tolist() == pytest.approx([1e-2, 1e2])


def test_dead_channels_stay() -> None:
    abs_mean = torch.tensor([4.0, 0.0, 16.0, torch.nan, torch.inf])
    factors = scaling_factors(abs_mean, 0.5)
    torch.testing.assert_close(factors, torch.tensor([0.5**0.5, 1.0, 2**0.5, 1.0, 1.0]))
    assert scaling_factors(torch.zeros(3), 0.5).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("scheme", LOW_BITS, ids=scheme_id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outliers_are_protected(scheme: WeightScheme, dtype: torch.dtype) -> None:
    weights, x = [random(48, K, seed=1), random(16, K, seed=2)], with_outliers(256, K, factor=10)
    solution = solve("awq", weights, x, scheme, None, dtype, {"grids_num": 20})
    assert solution.smooth_scales is not None and solution.smooth_scales.dtype == dtype
    nearest = tuple(round_to_nearest(weight, scheme) for weight in weights)
    error = total_error(weights, solution.weights, solution.smooth_scales, x)
    assert error < 0.85 * total_error(weights, nearest, None, x)


@pytest.mark.parametrize("scheme", LOW_BITS, ids=scheme_id)
@pytest.mark.parametrize("seed", range(4))
def test_never_worse_than_rounding_to_nearest(scheme: WeightScheme, seed: int) -> None:
    weights, x = [random(16, K, seed=seed)], random(64, K, seed=seed + 10)
    solution = solve("awq", weights, x, scheme)
    nearest = tuple(round_to_nearest(weight, scheme) for weight in weights)
    error = total_error(weights, solution.weights, solution.smooth_scales, x)
    assert error <= total_error(weights, nearest, None, x) * (1 + 1e-5)


def test_the_best_of_the_grid_is_taken() -> None:
    weights, x = [random(24, K, seed=1), 2 * random(8, K, seed=2)], with_outliers(256, K, factor=4)
    solution = solve("awq", weights, x, INT4_GROUPS, options={"grids_num": 8})
    abs_mean = x.abs().mean(0)
    errors = []
    for k in range(8):
        smooth = 1 / scaling_factors(abs_mean, k / 8)
        quantized = tuple(round_to_nearest(weight / smooth, INT4_GROUPS) for weight in weights)
        errors.append(total_error(weights, quantized, smooth, x))
    assert 0 < errors.index(min(errors)) < 7, "the example has its optimum inside of the grid"
    error = total_error(weights, solution.weights, solution.smooth_scales, x)
    assert error == pytest.approx(min(errors), rel=1e-4)


def test_no_smoothing_where_none_helps() -> None:
    # All channels alike: every ratio gives the factors 1.
    x = torch.where(random(64, K) > 0, 1.0, -1.0)
    solution = solve("awq", [random(16, K)], x, INT4_GROUPS)
    assert solution.smooth_scales is None
    assert same(solution.weights[0], round_to_nearest(random(16, K), INT4_GROUPS))


def test_every_candidate_is_tied() -> None:
    seen = []

    def tie(factors: Tensor) -> Tensor:
        seen.append(factors)
        return factors.unflatten(0, (2, -1)).amax(0).repeat(2)

    x = with_outliers(64, K)
    solution = solve("awq", [random(16, K)], x, INT4_GROUPS, options={"grids_num": 5}, tie=tie)
    assert len(seen) == 4
    assert solution.smooth_scales is not None
    assert torch.equal(solution.smooth_scales[: K // 2], solution.smooth_scales[K // 2 :])
