from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npu_fusion.quantization.algorithms._loss import weight_error
from npu_fusion.quantization.algorithms.gptq import gptq_numbers, gptq_weight, prepare
from npu_fusion.quantization.qparams import (
    all_parameters,
    encode_numbers,
    nearest_numbers,
    round_to_nearest,
    spread,
    step,
)
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import InputScheme, WeightScheme
from tests.quantization.algorithms._problems import (
    FP4,
    INT4,
    INT4_ASYMMETRIC,
    INT4_GROUPS,
    INT8,
    WEIGHT_SCHEMES,
    correlated,
    exact_error,
    random,
    same,
    scheme_id,
    solve,
)


def gptq(
    weight: Tensor,
    gram: Tensor,
    scheme: WeightScheme,
    bits: int | None = None,
    inputs: InputScheme | None = None,
    act_order: bool = True,
    percdamp: float = 0.01,
    block_size: int = 128,
) -> QuantizedWeight:
    """GPTQ alone, without falling back to rounding to nearest."""
    hessian = prepare(gram, percdamp, act_order)
    assert hessian is not None
    scale, offset, channel_scale = all_parameters(weight, scheme, inputs, bits)
    numbers = gptq_numbers(weight, hessian, scheme, step(scale, channel_scale), offset, bits, block_size)
    return QuantizedWeight(scheme, encode_numbers(numbers, scheme.type, bits), scale, offset, channel_scale)


@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES, ids=scheme_id)
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("factor", [1.0, 1e-6, 4096.0])
def test_independent_inputs_are_rounded_to_nearest(
    scheme: WeightScheme, act_order: bool, factor: float
) -> None:
    weight = random(20, 70)
    expected = round_to_nearest(weight, scheme)
    assert same(gptq(weight, factor * torch.eye(70), scheme, act_order=act_order), expected)
    # Whatever their sizes.
    gram = torch.diag(factor * (1 + torch.arange(70) % 5))
    assert same(gptq(weight, gram, scheme, act_order=act_order), expected)


def test_two_levels_of_independent_inputs_are_rounded_to_nearest() -> None:
    weight, inputs = random(20, 70), InputScheme("float8_e4m3fn")
    assert same(gptq(weight, torch.eye(70), FP4, inputs=inputs), round_to_nearest(weight, FP4, inputs))


def by_definition(weight: Tensor, gram: Tensor, scheme: WeightScheme, act_order: bool) -> Tensor:
    """One column after the other, in float64: what is left is then moved to the minimum of the error, by the
    inverse of the part of H that is left."""
    columns = weight.size(1)
    h = gram.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(columns)
    left = list(range(columns))
    if act_order:
        left.sort(key=lambda k: -gram[k, k].item())
    scale, offset, _ = all_parameters(weight, scheme)
    steps = spread(scale, scheme, columns).expand_as(weight).double()
    zeros = torch.zeros_like(steps) if offset is None else spread(offset, scheme, columns).expand_as(weight)
    w, numbers = weight.double(), torch.zeros_like(weight)
    while left:
        k = left[0]
        inverse = torch.linalg.inv(h[left][:, left])
        numbers[:, k] = nearest_numbers((w[:, k] / steps[:, k] + zeros[:, k]).float(), scheme.type)
        error = (w[:, k] - (numbers[:, k] - zeros[:, k]) * steps[:, k]) / inverse[0, 0]
        w[:, left] -= error.unsqueeze(1) * inverse[0]
        left.pop(0)
    return numbers


@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES, ids=scheme_id)
@pytest.mark.parametrize("act_order", [True, False])
def test_columns_are_rounded_as_the_paper_says(scheme: WeightScheme, act_order: bool) -> None:
    weight, x = random(16, 70, seed=3), correlated(300, 70)
    gram = x.t() @ x
    quantized = gptq(weight, gram, scheme, act_order=act_order, block_size=16)
    different = quantized.numbers() != by_definition(weight, gram, scheme, act_order)
    # fp32 against float64: once in a while something falls on the other side, and the rest of its row moves.
    assert different.any(1).sum() <= 1
    assert not torch.equal(quantized.numbers(), round_to_nearest(weight, scheme).numbers())


@pytest.mark.parametrize("block_size", [1, 7, 70, 1000])
def test_blocks_are_only_about_speed(block_size: int) -> None:
    weight, x = random(16, 70, seed=3), correlated(300, 70)
    hessian = prepare(x.t() @ x)
    assert hessian is not None
    scheme = INT4_ASYMMETRIC
    scale, offset, _ = all_parameters(weight, scheme)
    one, other = (
        gptq_numbers(weight, hessian, scheme, scale, offset, block_size=size) for size in (16, block_size)
    )
    assert (one != other).any(1).sum() <= 1


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("scheme", [INT4, INT4_GROUPS, INT4_ASYMMETRIC], ids=scheme_id)
def test_better_than_nearest_on_correlated_inputs(scheme: WeightScheme, bits: int) -> None:
    weight, x = random(48, 128, seed=1), correlated(1024, 128)
    quantized = gptq(weight, x.t() @ x, scheme, bits)
    limit = 2 ** (bits - 1)
    assert quantized.codes.min().item() >= -limit and quantized.codes.max().item() < limit
    nearest = round_to_nearest(weight, scheme, bits=bits)
    error, usual = (exact_error(q.dequantize(), weight, x).sum() for q in (quantized, nearest))
    assert error < 0.7 * usual


@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES, ids=scheme_id)
def test_solution_is_better_for_every_type(scheme: WeightScheme) -> None:
    weights, x = [random(48, 128, seed=1), random(16, 128, seed=2)], correlated(1024, 128)
    solution = solve("gptq", weights, x, scheme)
    for weight, quantized in zip(weights, solution.weights, strict=True):
        nearest = round_to_nearest(weight, scheme)
        assert torch.equal(quantized.scale, nearest.scale)
        error, usual = (exact_error(q.dequantize(), weight, x).sum() for q in (quantized, nearest))
        assert error < 0.7 * usual


def test_no_row_is_worse_than_rounded_to_nearest() -> None:
    weight, x = random(200, 40, seed=1), correlated(20, 40) + random(20, 40, seed=5)
    gram = x.t() @ x
    hessian = prepare(gram)
    assert hessian is not None
    nearest = weight_error(round_to_nearest(weight, INT4_GROUPS, bits=2), weight, gram)
    alone = weight_error(gptq(weight, gram, INT4_GROUPS, bits=2), weight, gram)
    assert (alone > nearest).any(), "the example has rows where the greedy order fails"
    kept = weight_error(gptq_weight(weight, gram, hessian, INT4_GROUPS, bits=2), weight, gram)
    assert torch.equal(kept, torch.minimum(alone, nearest))


def test_act_order_helps_where_channels_differ() -> None:
    weight, x = random(64, 128, seed=1), correlated(1024, 128)
    x[:, 100:] *= 20
    gram = x.t() @ x
    ordered, plain = (
        exact_error(gptq(weight, gram, INT4_GROUPS, act_order=order).dequantize(), weight, x).sum()
        for order in (True, False)
    )
    assert ordered < plain


def test_dead_columns_are_zero_and_their_number_does_not_matter() -> None:
    weight, x = random(16, 64, seed=1), correlated(256, 64)
    x[:, 32:] = 0
    alive, _ = solve("gptq", [weight[:, :32], weight[:, :32]], x[:, :32], INT4_GROUPS).weights
    for factor in (1.0, 2.0**-10, 2.0**10):
        (quantized,) = solve("gptq", [weight], factor * x, INT4_GROUPS).weights
        assert (quantized.codes[:, 32:] == 0).all()
        # Damping is relative to the inputs that there are, however small.
        assert torch.equal(quantized.codes[:, :32], alive.codes)


def test_singular_gram_matrices_are_damped_more() -> None:
    weight, x = random(16, 64, seed=1), correlated(3, 64)
    gram = x.t() @ x
    for percdamp in (0.0, 1e-9):
        hessian = prepare(gram, percdamp)
        assert hessian is not None
        nearest = round_to_nearest(weight, INT4)
        quantized = gptq(weight, gram, INT4, percdamp=percdamp)
        error, usual = (exact_error(q.dequantize(), weight, x).sum() for q in (quantized, nearest))
        assert error < 0.5 * usual


@pytest.mark.parametrize("size", [1, 4])
def test_inverses_beyond_fp32_are_damped_more(size: int) -> None:
    hessian = prepare(1e-39 * torch.eye(size))
    assert hessian is not None and hessian.factor.isfinite().all()


def test_matrices_that_cannot_be_inverted() -> None:
    assert prepare(torch.full((4, 4), torch.nan)) is None
    assert prepare(-1000 * torch.ones(4, 4) + torch.eye(4)) is None


def test_bad_arguments() -> None:
    hessian = prepare(torch.eye(8))
    assert hessian is not None
    scale, _, _ = all_parameters(random(4, 6), INT8)
    with pytest.raises(ValueError, match="gptq: weight has 6 columns; accepted: 8"):
        gptq_numbers(random(4, 6), hessian, INT8, scale)
    with pytest.raises(ValueError, match="gptq: block_size is 0; accepted: at least 1"):
        gptq_numbers(random(4, 8), hessian, INT8, scale, block_size=0)
    with pytest.raises(ValueError, match=r"gptq: gram has shape \[2, 3\]; accepted: \[K, K\]"):
        prepare(torch.ones(2, 3))
    with pytest.raises(ValueError, match="gptq: percdamp is -1; accepted: 0 or more"):
        prepare(torch.eye(2), -1)
