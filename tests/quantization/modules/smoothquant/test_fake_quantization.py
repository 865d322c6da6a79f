from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npu_fusion.quantization.modules import quantize_rows
from npu_fusion.quantization.modules.smoothquant import (
    quantize_activation_per_tensor_absmax,
    quantize_activation_per_token_absmax,
    quantize_weight_per_channel_absmax,
    quantize_weight_per_tensor_absmax,
)
from tests.quantization.modules.smoothquant._trace import traced

Fake = Callable[..., Tensor]
BY_ROW: tuple[Fake, ...] = (quantize_weight_per_channel_absmax, quantize_activation_per_token_absmax)
BY_TENSOR: tuple[Fake, ...] = (quantize_weight_per_tensor_absmax, quantize_activation_per_tensor_absmax)
ALL = BY_ROW + BY_TENSOR
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = ((3, 8), (2, 3, 8), (2, 1, 3, 8), (1, 2, 1, 2, 8), (2, 1, 2, 1, 2, 8))

numbers = st.floats(
    width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100
)
rows = st.lists(st.lists(numbers, min_size=5, max_size=5), min_size=2, max_size=4).map(torch.tensor)


def oracle(x: Tensor, by_row: bool, n_bits: int) -> tuple[Tensor, Tensor]:
    """The nearest multiples of the step in float64, and the step."""
    x = x.double()
    step = (x.abs().amax(-1, keepdim=True) if by_row else x.abs().amax()) / (2 ** (n_bits - 1) - 1)
    return torch.where(step == 0, 0.0, (x / step).round() * step), step


@settings(max_examples=60, deadline=None)
@given(x=rows, n_bits=st.sampled_from((2, 3, 4, 8, 16)), index=st.integers(0, 3))
def test_each_value_becomes_a_multiple_of_the_step_next_to_it(x: Tensor, n_bits: int, index: int) -> None:
    before = x.clone()
    y = ALL[index](x, n_bits)
    assert torch.equal(x, before)
    exact, step = oracle(x, index < 2, n_bits)
    # Half a step, what fp32 loses in quotient and product, and where the step is no normal number.
    tiny = torch.finfo(torch.float32).tiny
    bound = step / 2 + x.double().abs() * 2.0**-21 + 2**n_bits * tiny
    assert ((y.double() - x.double()).abs() <= bound).all()
    normal = (step > tiny).expand_as(exact)
    halfway = ((x.double() / step).frac().abs() - 0.5).abs() < 1e-3  # fp32 may go to the other side
    sure = normal & ~halfway
    assert ((y.double() - exact).abs()[sure] <= (exact.abs() * 2.0**-22)[sure] + tiny).all()


@pytest.mark.parametrize("fake", ALL)
def test_eight_bits_are_the_default(fake: Fake) -> None:
    x = torch.randn(4, 32)
    assert torch.equal(fake(x), fake(x, n_bits=8))
    assert fake(x).unique().numel() > 40
    assert fake(x, n_bits=2).unique().numel() <= 3 * 4


@pytest.mark.parametrize("fake", BY_ROW)
def test_rows_are_those_of_the_int8_layers(fake: Fake) -> None:
    x = torch.randn(7, 33) * torch.logspace(-30, 30, 7).unsqueeze(1)
    q, scale = quantize_rows(x)
    assert torch.equal(fake(x), q.float() * scale)


@pytest.mark.parametrize("fake", ALL)
def test_halves_go_to_even_and_the_largest_stays(fake: Fake) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]])
    assert fake(x).tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]]


@pytest.mark.parametrize("fake", ALL)
def test_scales_are_of_rows_or_of_all(fake: Fake) -> None:
    x = torch.tensor([[1.0, 1000.0], [1.0, 0.25]])
    assert fake(x)[0].tolist() == pytest.approx([0.0, 1000.0])
    assert (fake(x)[1] == 0).all().item() is (fake in BY_TENSOR)


@pytest.mark.parametrize("fake", ALL)
def test_no_code_is_out_of_range_where_the_step_is_denormal(fake: Fake) -> None:
    x = torch.tensor([[2e-43, 1e-43]])  # 143 steps of the smallest number, which the scale rounds to
    step = torch.tensor(2e-43) / 127
    assert (fake(x) / step).tolist()[0][0] == 127


@pytest.mark.parametrize("fake", ALL)
def test_zeros_stay_zero(fake: Fake) -> None:
    x = torch.randn(3, 8)
    x[1] = 0
    y = fake(x)
    assert not y[1].any()
    assert y.isfinite().all()
    assert not fake(torch.zeros(2, 8)).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fake", ALL)
def test_the_dtype_stays_and_one_rounding_is_made(fake: Fake, dtype: torch.dtype) -> None:
    x = (torch.randn(5, 16) * 100).to(dtype)
    y = fake(x)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    assert torch.equal(y, fake(x.float()).to(dtype))


def test_float16_does_not_overflow() -> None:
    x = torch.tensor([[65504.0, -65504.0, 1.0]]).half()
    for fake in ALL:
        assert fake(x).tolist() == [[65504, -65504, 0]]


@pytest.mark.parametrize("fake", ALL)
@pytest.mark.parametrize("shape", SHAPES)
def test_leading_dimensions_and_strides(fake: Fake, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    assert not x.is_contiguous()
    y = fake(x)
    assert y.shape == x.shape
    assert torch.equal(y.reshape(-1, 8), fake(x.reshape(-1, 8)))


@pytest.mark.parametrize("fake", ALL)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_nothing_to_quantize(fake: Fake, shape: tuple[int, ...]) -> None:
    assert fake(torch.empty(shape)).shape == shape


def test_a_vector_is_one_token() -> None:
    x = torch.randn(8)
    for fake in (quantize_activation_per_token_absmax, quantize_activation_per_tensor_absmax):
        assert torch.equal(fake(x), fake(x.unsqueeze(0))[0])


@pytest.mark.parametrize("fake", ALL)
def test_nan_is_not_hidden(fake: Fake) -> None:
    x = torch.randn(2, 8)
    x[0, 3] = torch.nan
    assert fake(x)[0].isnan().all()
    assert fake(x)[1].isnan().any().item() is (fake in BY_TENSOR)


@pytest.mark.parametrize("fake", ALL)
def test_no_gradient_and_no_write(fake: Fake) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    version = x._version
    y = fake(x)
    assert not y.requires_grad
    assert x._version == version
    y.fill_(7)
    assert not (x == 7).any()


@pytest.mark.parametrize("fake", ALL)
def test_traces_as_one_graph(fake: Fake) -> None:
    sizes = (2, 5, 40)
    graphs = traced(fake, [[torch.randn(1, n, 16).bfloat16()] for n in sizes], dynamic=True)
    assert len(graphs) == 1


@pytest.mark.parametrize("fake", ALL)
def test_refusals(fake: Fake) -> None:
    name = "w" if "weight" in fake.__name__ else "t"
    with pytest.raises(
        ValueError, match=rf"{fake.__name__}: {name} has dtype torch.float64; accepted: torch.f"
    ):
        fake(torch.randn(2, 8).double())
    with pytest.raises(ValueError, match=rf"{fake.__name__}: {name} has shape \[\]; accepted: \d or more"):
        fake(torch.tensor(1.0))
    for bits in (1, 17):
        with pytest.raises(ValueError, match=f"n_bits is {bits}; accepted: 2 to 16"):
            fake(torch.randn(2, 8), bits)
    for wrong in (True, 8.0):
        with pytest.raises(TypeError, match="n_bits must be an int, got"):
            fake(torch.randn(2, 8), wrong)


def test_a_weight_has_two_dimensions() -> None:
    for fake in (quantize_weight_per_channel_absmax, quantize_weight_per_tensor_absmax):
        with pytest.raises(ValueError, match=r"w has shape \[8\]; accepted: 2 or more dimensions"):
            fake(torch.randn(8))
