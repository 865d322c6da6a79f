from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from npu_fusion.quantization.inner_scale import nearest_inner_scale
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.qparams import (
    encode_weight,
    quantize_dequantize,
    round_to_nearest,
    weight_parameters,
)
from npu_fusion.quantization.scheme import InputScheme, WeightScheme
from tests.quantization.algorithms._problems import (
    FP4,
    FP8,
    INT4_ASYMMETRIC,
    problem,
    random,
    same,
    scheme_id,
    solve,
)

EXPONENTS = range(-5, 6)
HIF8_TENSOR = WeightScheme("hifloat8", strategy="tensor")
INT4_TENSOR = WeightScheme("int4", strategy="tensor")


def heavy(*shape: int, seed: int = 0) -> Tensor:
    """Mostly small numbers and few very large ones."""
    return random(*shape, seed=seed) * torch.exp(1.5 * random(*shape, seed=seed + 1))


def loud(x: Tensor, channels: slice) -> Tensor:
    """With some channels that are much larger than the others."""
    x = x.clone()
    x[:, channels] *= 30
    return x


def quiet(x: Tensor, channels: slice) -> Tensor:
    """With some channels that are nearly nothing, so that saturating what meets them pays."""
    x = x.clone()
    x[:, channels] *= 1e-4
    return x


@pytest.mark.parametrize("scheme", [FP8, HIF8_TENSOR, INT4_TENSOR, INT4_ASYMMETRIC], ids=scheme_id)
def test_every_output_has_its_best_scale(scheme: WeightScheme) -> None:
    some = slice(0, 64, 32)
    weights = [loud(random(12, 64, seed=1), some), heavy(6, 64, seed=3)]
    x = quiet(heavy(100, 64, seed=5), some)
    solution = solve("ofmr", weights, x, scheme)
    chosen = set()
    for weight, quantized in zip(weights, solution.weights, strict=True):
        scale, offset = weight_parameters(weight, scheme)
        errors = []
        for exponent in EXPONENTS:
            value = encode_weight(weight, scheme, scale * 2.0**exponent, offset).dequantize()
            errors.append(((x.double() @ (value - weight).double().t()) ** 2).sum(0))
        table = torch.stack(errors)
        if scheme.strategy == "tensor":
            table = table.sum(1, keepdim=True)
        best = table.argmin(0)
        factor = torch.exp2(best.double() - 5).float()
        expected = scale * (factor if scale.dim() == 1 else factor.unsqueeze(1))
        assert torch.equal(quantized.scale, expected)
        value = encode_weight(weight, scheme, expected, offset).dequantize()
        assert torch.equal(quantized.dequantize(), value)
        chosen |= set(best.tolist())
    assert chosen != {5}, "the example has something to find"


@pytest.mark.parametrize("inputs", [InputScheme("hifloat8"), InputScheme("int8"), InputScheme("int8", False)])
def test_siblings_share_the_best_scale_of_their_input(inputs: InputScheme) -> None:
    some = slice(5, 6)
    # The first layer hardly reads the loud channel and would saturate it more than the second can bear.
    weights = [quiet(random(12, 64, seed=1), some), random(6, 64, seed=3)]
    weights[1][:, some] *= 0.03
    x = loud(random(100, 64, seed=5), some)
    plain = solve("minmax", weights, x, FP8, inputs).inputs
    solution = solve("ofmr", weights, x, FP8, inputs)
    assert plain is not None and solution.inputs is not None
    errors = []
    for exponent in EXPONENTS:
        candidate = InputParameters(plain.scale * 2.0**exponent, plain.offset)
        read = quantize_dequantize(x, inputs.type, candidate)
        errors.append(
            [
                (F.linear(read, q.dequantize()) - F.linear(x, w)).double().square().sum()
                for q, w in zip(solution.weights, weights, strict=True)
            ]
        )
    table = torch.tensor(errors)
    best = int(table.sum(1).argmin())
    assert best != 5, "the example has something to find"
    assert best != table[:, 0].argmin(), "the layers do not agree"
    assert torch.equal(solution.inputs.scale, plain.scale * 2.0 ** (best - 5))
    assert (solution.inputs.offset is None) == inputs.symmetric


def test_convolution() -> None:
    # The second channel of each of the two groups: large in the kernel; in the images the first two are.
    kernel = loud(random(6, 2, 3, 3, seed=1), slice(1, 2))
    images = quiet(random(5, 4, 8, 8, seed=3), slice(1, None, 2))

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight.unflatten(1, (2, 3, 3)), None, stride=2, padding=1, groups=2)

    weight = kernel.flatten(1)
    solution = solve("ofmr", [weight], images, FP8, InputScheme("float8_e4m3fn"), apply=convolve)
    (quantized,), target = solution.weights, convolve(images, weight)
    scale, _ = weight_parameters(weight, FP8)
    errors = []
    for exponent in EXPONENTS:
        value = encode_weight(weight, FP8, scale * 2.0**exponent).dequantize()
        errors.append((convolve(images, value) - target).square().sum((0, 2, 3)))
    best = torch.stack(errors).argmin(0)
    assert (best != 5).any(), "the example has something to find"
    assert torch.equal(quantized.scale, scale * torch.exp2(best.double() - 5).float())

    assert solution.inputs is not None
    errors = []
    for exponent in EXPONENTS:
        candidate = InputParameters(images.abs().max().reshape(1) / 448 * 2.0**exponent)
        read = quantize_dequantize(images, "float8_e4m3fn", candidate)
        errors.append((convolve(read, quantized.dequantize()) - target).square().sum())
    best = torch.stack(errors).argmin()
    expected = images.abs().max() / 448 * torch.exp2(best.double() - 5).float()
    torch.testing.assert_close(solution.inputs.scale, expected.reshape(1), rtol=0, atol=0)


def test_two_levels() -> None:
    # Its groups are within what the outer scale leaves room for, so larger inner scales are cut off.
    some = slice(0, 64, 32)
    weight, x = loud(random(6, 64, seed=1), some), quiet(random(100, 64, seed=5), some)
    inputs = InputScheme("float8_e4m3fn")
    (plain,) = solve("minmax", [weight], x, FP4, inputs).weights
    (quantized,) = solve("ofmr", [weight], x, FP4, inputs).weights
    assert quantized.channel_scale is not None
    assert torch.equal(nearest_inner_scale(quantized.scale), quantized.scale)
    errors = [((x @ (q.dequantize() - weight).t()) ** 2).sum(0) for q in (quantized, plain)]
    assert (errors[0] <= errors[1]).all() and (errors[0] < errors[1]).any()
    # Where only a group of very small weights counts, finer scales than there are would win.
    weight[:, 32:] *= 1e-4
    x[:, :32] *= 1e-9
    (quantized,) = solve("ofmr", [weight], x, FP4, inputs).weights
    assert quantized.scale.min() == 2.0**-6
    assert torch.equal(nearest_inner_scale(quantized.scale), quantized.scale)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_rows_that_overflowed_are_left_out(bad: float) -> None:
    some = slice(0, 64, 32)
    weight, x = loud(random(12, 64, seed=1), some), quiet(random(100, 64, seed=5), some)
    (expected,) = solve("ofmr", [weight], x, FP4).weights
    assert not same(expected, round_to_nearest(weight, FP4)), "the example has something to find"
    broken = torch.cat([x[:50], torch.full((2, 64), bad), x[50:]])
    assert same(solve("ofmr", [weight], broken, FP4).weights[0], expected)


def test_of_equal_errors_that_of_the_range_is_kept() -> None:
    # Powers of two are exact with many scales.
    weight = torch.tensor([[1.0, 2.0, -4.0, 0.5]])
    (quantized,) = solve("ofmr", [weight], torch.eye(4), WeightScheme("hifloat8")).weights
    assert quantized.scale.tolist() == [4 / 16]


def test_the_sample_is_all_it_reads() -> None:
    assert problem("ofmr", [random(4, 8)], None, FP8).statistics.needs == {"sample"}
    needs = problem("ofmr", [random(4, 8)], None, FP8, InputScheme("hifloat8")).statistics.needs
    assert needs == {"sample", "range"}
