from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npu_fusion.quantization.algorithms.smoothquant import smoothing_factors
from npu_fusion.quantization.qparams import quantize_dequantize, round_to_nearest
from npu_fusion.quantization.scheme import InputScheme
from tests.quantization.algorithms._problems import FP4, INT8, random, same, solve, with_outliers

K = 64


def test_factors() -> None:
    factors = smoothing_factors(torch.tensor([16.0, 0.25]), torch.tensor([4.0, 1.0]), 0.5)
    torch.testing.assert_close(factors, torch.tensor([2.0, 0.5]))
    factors = smoothing_factors(torch.tensor([16.0]), torch.tensor([4.0]), 0.75)
    torch.testing.assert_close(factors, torch.tensor([8.0 / 4.0**0.25]))
    assert smoothing_factors(torch.tensor([16.0]), torch.tensor([4.0]), 0).tolist() == [0.25]
    assert smoothing_factors(torch.tensor([16.0]), torch.tensor([4.0]), 1).tolist() == [16.0]


def test_factors_do_not_overflow_in_half_precision() -> None:
    factors = smoothing_factors(torch.tensor([60000.0]).half(), torch.tensor([6e-8]).half(), 0.5)
    assert factors.dtype == torch.float32
    assert 1e5 < factors.item() < 1.1e6


@pytest.mark.parametrize(
    ("input_max", "weight_max"),
    [(0.0, 2.0), (2.0, 0.0), (0.0, 0.0), (torch.inf, 2.0), (torch.nan, 2.0), (-torch.inf, 2.0)],
)
def test_dead_channels_stay(input_max: float, weight_max: float) -> None:
    for strength in (0.0, 0.5, 1.0):
        factors = smoothing_factors(torch.tensor([input_max]), torch.tensor([weight_max]), strength)
        assert factors.tolist() == [1.0]


def test_strength_out_of_range() -> None:
    with pytest.raises(ValueError, match="strength is 1.5; accepted: 0 to 1"):
        smoothing_factors(torch.ones(1), torch.ones(1), 1.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_smoothing_itself_is_exact(dtype: torch.dtype) -> None:
    weights, x = [random(32, K, seed=1), random(16, K, seed=2) * 3], with_outliers(128, K)
    solution = solve("smoothquant", weights, x, INT8, None, dtype, {"smooth_strength": 0.5})
    smooth = solution.smooth_scales
    assert smooth is not None and smooth.dtype == dtype
    # One factor for all siblings, of the largest weight among them, rounded once.
    largest = torch.cat(weights).abs().amax(0)
    exact = largest.double().sqrt() / x.abs().amax(0).double().sqrt()
    assert ((smooth.double() - exact).abs() <= exact * max(torch.finfo(dtype).eps, 1e-6)).all()
    for weight, quantized in zip(weights, solution.weights, strict=True):
        smoothed = weight / smooth.float()
        assert same(quantized, round_to_nearest(smoothed, INT8))
        product = (x.double() * smooth.double()) @ (weight.double() / smooth.double()).t()
        torch.testing.assert_close(product, x.double() @ weight.double().t(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_range_is_that_of_the_smoothed_input(symmetric: bool) -> None:
    weights, x = [random(32, K, seed=1)], with_outliers(128, K)
    x[:, 3] = x[:, 3].abs() * 20
    inputs = InputScheme("int8", symmetric)
    solution = solve("smoothquant", weights, x, INT8, inputs, torch.bfloat16)
    assert solution.smooth_scales is not None and solution.inputs is not None
    smoothed = x * solution.smooth_scales.float()
    low, high = smoothed.min(), smoothed.max()
    scale = (high - low) / 255
    if symmetric:
        scale = high / 127 if high >= -low else -low / 128
    torch.testing.assert_close(solution.inputs.scale, scale.reshape(1))
    assert (solution.inputs.offset is None) == symmetric


def test_outliers_lose_their_power_over_static_int8() -> None:
    weights, x = [random(48, K, seed=1)], with_outliers(256, K, factor=100)
    inputs = InputScheme("int8")
    errors = {}
    for name in ("minmax", "smoothquant"):
        solution = solve(name, weights, x, INT8, inputs)
        assert solution.inputs is not None
        smooth = torch.ones(K) if solution.smooth_scales is None else solution.smooth_scales
        read = quantize_dequantize(x * smooth, "int8", solution.inputs)
        y = read.double() @ solution.weights[0].dequantize().double().t()
        errors[name] = (y - x.double() @ weights[0].double().t()).square().mean()
    assert errors["smoothquant"] < errors["minmax"] / 5


def test_smoothing_undoes_any_diagonal_rescaling() -> None:
    weight, x = random(48, K, seed=1), with_outliers(128, K)
    planted = torch.exp2(torch.arange(K) % 7 - 3.0)
    plain = solve("smoothquant", [weight], x, INT8, InputScheme("int8"))
    rescaled = solve("smoothquant", [weight / planted], x * planted, INT8, InputScheme("int8"))
    assert plain.smooth_scales is not None and rescaled.smooth_scales is not None
    torch.testing.assert_close(rescaled.smooth_scales * planted, plain.smooth_scales)
    assert plain.inputs is not None and rescaled.inputs is not None
    torch.testing.assert_close(plain.inputs.scale, rescaled.inputs.scale)
    torch.testing.assert_close(plain.weights[0].scale, rescaled.weights[0].scale)
    assert (plain.weights[0].codes != rescaled.weights[0].codes).float().mean() < 0.001


def test_tied_channels_share_a_factor() -> None:
    def tie(factors: Tensor) -> Tensor:
        return factors.unflatten(0, (4, -1)).amax(0).repeat(4)

    solution = solve("smoothquant", [random(8, K)], with_outliers(32, K), INT8, tie=tie)
    assert solution.smooth_scales is not None
    rows = solution.smooth_scales.unflatten(0, (4, -1))
    assert (rows == rows[0]).all()


def test_two_levels() -> None:
    solution = solve("smoothquant", [random(8, K)], with_outliers(32, K), FP4, InputScheme("float8_e4m3fn"))
    assert solution.weights[0].channel_scale is not None


def test_larger_strength_moves_more_into_the_weights() -> None:
    weight, x = random(48, K, seed=1), with_outliers(128, K)
    spans = []
    for strength in (0.3, 0.5, 0.8):
        solution = solve("smoothquant", [weight], x, INT8, options={"smooth_strength": strength})
        assert solution.smooth_scales is not None
        spans.append((x * solution.smooth_scales).abs().amax(0))
    ratios = [(span.max() / span.min()).item() for span in spans]
    assert ratios[0] > ratios[1] > ratios[2]
