from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from npu_fusion import formats
from npu_fusion.quantization.algorithms import autoround
from npu_fusion.quantization.algorithms._loss import weight_error
from npu_fusion.quantization.algorithms.autoround import (
    Form,
    Rounded,
    State,
    _distance,
    apply_state,
    gradient,
    signround,
)
from npu_fusion.quantization.inner_scale import nearest_inner_scale
from npu_fusion.quantization.qparams import encode_numbers, round_to_nearest, spread, weight_range
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import InputScheme, WeightScheme
from tests.quantization.algorithms._problems import (
    FP4,
    INT4,
    INT4_ASYMMETRIC,
    INT4_GROUPS,
    INT8_TENSOR,
    WEIGHT_SCHEMES,
    correlated,
    exact_error,
    random,
    same,
    scheme_id,
    solve,
)

LOW_BITS = (INT4, INT4_GROUPS, INT4_ASYMMETRIC, WeightScheme("int4", strategy="tensor"))


@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES, ids=scheme_id)
def test_without_steps_it_is_rounding_to_nearest(scheme: WeightScheme) -> None:
    weight, x = random(20, 70), correlated(64, 70)
    assert same(signround(weight, x.t() @ x, scheme, steps=0), round_to_nearest(weight, scheme))


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("scheme", LOW_BITS, ids=scheme_id)
def test_better_than_nearest_at_low_bits(scheme: WeightScheme, bits: int) -> None:
    weight, x = random(48, 128, seed=1), correlated(1024, 128)
    quantized = signround(weight, x.t() @ x, scheme, bits=bits)
    limit = 2 ** (bits - 1)
    assert quantized.codes.min().item() >= -limit and quantized.codes.max().item() < limit
    nearest = round_to_nearest(weight, scheme, bits=bits)
    error, usual = (exact_error(q.dequantize(), weight, x).sum() for q in (quantized, nearest))
    assert error < 0.85 * usual


@pytest.mark.parametrize("inputs", [None, InputScheme("float8_e4m3fn")], ids=["alone", "float8_inputs"])
@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES, ids=scheme_id)
def test_no_row_is_worse_than_rounded_to_nearest(scheme: WeightScheme, inputs: InputScheme | None) -> None:
    weight, x = random(32, 70, seed=1), correlated(64, 70)
    gram = x.t() @ x
    # Few and large steps, most of which make things worse.
    quantized = signround(weight, gram, scheme, inputs, steps=12, rate=0.3)
    error = weight_error(quantized, weight, gram)
    usual = weight_error(round_to_nearest(weight, scheme, inputs), weight, gram)
    if scheme.strategy == "tensor":
        error, usual = error.sum(), usual.sum()
    assert (error <= usual * (1 + 1e-5)).all()
    quantized = signround(weight, gram, scheme, inputs, steps=60)
    assert weight_error(quantized, weight, gram).sum() < usual.sum()


def test_two_levels() -> None:
    weight, x = random(32, 96, seed=1), correlated(256, 96)
    quantized = signround(weight, x.t() @ x, FP4, InputScheme("float8_e4m3fn"), steps=50)
    nearest = round_to_nearest(weight, FP4, InputScheme("float8_e4m3fn"))
    assert quantized.channel_scale is not None and nearest.channel_scale is not None
    assert torch.equal(quantized.channel_scale, nearest.channel_scale)
    assert torch.equal(nearest_inner_scale(quantized.scale), quantized.scale)
    error, usual = (exact_error(q.dequantize(), weight, x).sum() for q in (quantized, nearest))
    assert error < 0.95 * usual


def test_the_scale_of_the_gram_matrix_does_not_matter() -> None:
    weight, x = random(32, 64, seed=1), correlated(256, 64)
    gram = x.t() @ x
    one, other = (signround(weight, factor * gram, INT4_GROUPS, steps=30) for factor in (1.0, 2.0**-20))
    assert same(one, other)


@pytest.mark.parametrize("scheme", [INT4_ASYMMETRIC, LOW_BITS[3], FP4], ids=scheme_id)
def test_the_best_of_all_states_is_kept(scheme: WeightScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random(32, 70, seed=1), correlated(64, 70)
    gram = x.t() @ x
    errors = []

    def record(target: Tensor, state: State, form: Form) -> Rounded:
        rounded = apply_state(target, state, form)
        values = QuantizedWeight(
            scheme, encode_numbers(rounded.numbers, scheme.type), rounded.scale, rounded.offset
        )
        errors.append(weight_error(values, weight, gram))
        return rounded

    monkeypatch.setattr(autoround, "apply_state", record)
    # Large steps: the error goes up and down.
    quantized = signround(weight, gram, scheme, steps=20, rate=0.2)
    table = torch.stack(errors)
    assert len(table) == 21
    if scheme.strategy == "tensor":
        table = table.sum(1, keepdim=True)
    best = table.argmin(0)
    assert (best > 0).any()
    assert scheme.strategy == "tensor" or (best < 20).any(), "the example is best on the way"
    error = weight_error(quantized, weight, gram)
    error = error.sum() if scheme.strategy == "tensor" else error
    torch.testing.assert_close(error.reshape(-1), table.amin(0))


def test_the_rate_falls_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    shifts = []

    def record(target: Tensor, state: State, form: Form) -> Rounded:
        shifts.append(state.shift.clone())
        return apply_state(target, state, form)

    monkeypatch.setattr(autoround, "apply_state", record)
    x = correlated(64, 32)
    signround(random(8, 32), x.t() @ x, INT4, steps=4)
    moved = [(after - before).abs().max().item() for before, after in pairwise(shifts)]
    assert moved == pytest.approx([1 / 4, 3 / 16, 2 / 16, 1 / 16])


def test_what_is_learned_stays_within_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(target: Tensor, state: State, form: Form) -> Rounded:
        assert state.shift.abs().max() <= 0.5
        for share in (state.low_share, state.high_share):
            assert share.min() >= 0 and share.max() <= 1
        return apply_state(target, state, form)

    monkeypatch.setattr(autoround, "apply_state", check)
    x = correlated(64, 32)
    signround(random(8, 32), x.t() @ x, INT4_ASYMMETRIC, steps=4, rate=2.0)


class Through(torch.autograd.Function):
    """Rounding, with the gradient of the identity."""

    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(context: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


def learned_state(weight: Tensor, scheme: WeightScheme) -> State:
    low, high = weight_range(weight, scheme)
    generator = torch.Generator().manual_seed(1)
    shares = [0.4 + 0.4 * torch.rand(low.shape, generator=generator) for _ in range(2)]
    return State(0.3 * random(*weight.shape, seed=9), low.clamp(max=0), high.clamp(min=0), *shares)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("scheme", [*LOW_BITS, INT8_TENSOR], ids=scheme_id)
def test_gradients_are_those_of_autograd(scheme: WeightScheme, bits: int) -> None:
    weight, x = random(12, 70, seed=1), correlated(100, 70)
    gram = x.t() @ x
    state = learned_state(weight, scheme)

    shift, low_share, high_share = (
        t.double().requires_grad_() for t in (state.shift, state.low_share, state.high_share)
    )
    half = 2 ** (bits - 1)
    low, high = low_share * state.low.double(), high_share * state.high.double()
    if scheme.symmetric:
        # The maximum of two numbers has the gradient of the larger one.
        scale = torch.where(high >= -low, high / (half - 1), -low / half)
        zero = torch.zeros_like(scale)
    else:
        scale = (high - low) / (2 * half - 1)
        zero = Through.apply(-half - low / scale)
    steps, zeros = (spread(t, scheme, 70) for t in (scale, zero))
    numbers = Through.apply(weight.double() / steps + zeros + shift).clamp(-half, half - 1)
    difference = (numbers - zeros) * steps - weight.double()
    ((difference @ gram.double()) * difference).sum().backward()

    form = Form(scheme, bits)
    rounded = apply_state(weight, state, form)
    torch.testing.assert_close(rounded.difference.double(), difference.detach(), rtol=1e-4, atol=1e-4)
    clipped = (~rounded.inside).float().mean().item()
    assert 0.005 < clipped < 0.5, "the example has clipped weights"
    ours = gradient(weight, state, rounded, rounded.difference @ gram, form)
    for name, got, leaf in zip("Vba", ours, (shift, low_share, high_share), strict=True):
        expected = leaf.grad
        assert expected is not None
        sure = expected.abs() > 1e-3 * expected.abs().max()
        assert torch.equal(got.sign()[sure].double(), expected.sign()[sure]), name
        assert (got[expected == 0] == 0).all(), name
    assert low_share.grad is not None and high_share.grad is not None
    assert (low_share.grad.abs() + high_share.grad.abs() > 0).all()


@pytest.mark.parametrize("name", ["float4_e2m1", "float4_e1m2"])
def test_the_gradient_of_floats_points_downhill(name: str) -> None:
    scheme = WeightScheme(name, strategy="group", group_size=32)
    weight, x = random(12, 64, seed=1), correlated(100, 64)
    gram = x.t() @ x
    state = learned_state(weight, scheme)
    form = Form(scheme)
    rounded = apply_state(weight, state, form)
    assert not rounded.inside.all()
    quotient = weight / spread(rounded.scale, scheme, 64)
    shifted = quotient + state.shift * _distance(quotient, name)
    assert torch.equal(rounded.numbers, formats.decode(formats.encode(shifted, name), name))
    assert torch.equal(rounded.inside, shifted.abs() <= formats.MAXIMUM[name])
    assert (shifted.abs()[rounded.inside] > 0.9 * formats.MAXIMUM[name]).any()
    shift, _, high_share = gradient(weight, state, rounded, rounded.difference @ gram, form)
    assert (shift[~rounded.inside] == 0).all()
    # dW_q/da by autograd: numbers in range follow W, those out of range the scale.
    share = state.high_share.double().requires_grad_()
    low, high = state.low.double() * state.low_share, state.high.double() * share
    scale = torch.where(high >= -low, high, -low) / {"float4_e2m1": 6.0, "float4_e1m2": 1.75}[name]
    steps = spread(scale, scheme, 64)
    offset = (rounded.numbers - weight.double() / steps).detach()
    smooth = torch.where(rounded.inside, weight.double() / steps + offset, rounded.numbers.double())
    difference = smooth * steps - weight.double()
    ((difference @ gram.double()) * difference).sum().backward()
    assert share.grad is not None
    sure = share.grad.abs() > 1e-3 * share.grad.abs().max()
    assert torch.equal(high_share.sign()[sure].double(), share.grad.sign()[sure])


@pytest.mark.parametrize("name", ["hifloat8", "float8_e4m3fn", "mxfp8_e4m3fn", "float4_e2m1", "float4_e1m2"])
def test_distance_of_neighbours(name: str) -> None:
    codes = torch.arange(16 if "float4" in name else 256, dtype=torch.uint8)
    numbers = formats.decode(codes.view(torch.float8_e4m3fn) if "e4m3" in name else codes, name)
    numbers = numbers[numbers.isfinite()].unique().double()
    x = torch.cat(
        [random(500) * torch.exp2(random(500, seed=1) * 4), numbers.float(), torch.tensor([1e9, -1e9])]
    )
    got = _distance(x, name).double()
    size, positive = x.abs().double(), numbers[numbers >= 0]
    above = torch.tensor([int((positive <= s).sum()) for s in size]).clamp(max=positive.numel() - 1)
    assert torch.equal(got, positive[above] - positive[above - 1])


def test_options_and_static_inputs() -> None:
    weight, x = random(16, 64, seed=1), correlated(64, 64)
    scheme = InputScheme("int8")
    solution = solve("autoround", [weight], x, INT4_GROUPS, scheme, options={"steps": 7, "lr": 0.1})
    assert same(solution.weights[0], signround(weight, x.t() @ x, INT4_GROUPS, steps=7, rate=0.1))
    assert solution.inputs is not None


def test_negative_steps() -> None:
    with pytest.raises(ValueError, match="signround: steps is -1; accepted: 0 or more"):
        signround(random(2, 4), torch.eye(4), INT4, steps=-1)
