from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion import formats
from tests.formats._numbers import rounded

mx_quant = torch.ops.npu.npu_dynamic_mx_quant
NAMES = {23: "float8_e5m2", 24: "float8_e4m3fn", 296: "float4_e2m1", 297: "float4_e1m2"}
LARGEST_EXPONENT = {"float8_e5m2": 15, "float8_e4m3fn": 8, "float4_e2m1": 2, "float4_e1m2": 0}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def values(y: Tensor, name: str) -> Tensor:
    """The numbers of ``y`` in float64, unpacked by plain arithmetic."""
    if name.startswith("float4"):
        y = torch.stack([y % 16, y // 16], -1).flatten(-2)
    return formats.decode(y, name).double()


def expected(
    x: Tensor, axis: int, name: str, block_size: int = 32, mode: str = "floor"
) -> tuple[Tensor, Tensor]:
    """Values and the exponents in the operator's order, block by block."""
    rows = x.double().movedim(axis, -1)
    flat = rows.reshape(-1, rows.size(-1))
    blocks = -(-flat.size(1) // block_size)
    y = torch.zeros_like(flat)
    scale = torch.full((flat.size(0), blocks + blocks % 2), -127.0)
    for row in range(flat.size(0)):
        for block in range(blocks):
            part = slice(block * block_size, (block + 1) * block_size)
            amax = Fraction(flat[row, part].abs().max().item())
            exponent = -127
            if mode == "floor":
                while exponent < 127 and amax >= Fraction(2) ** (exponent + LARGEST_EXPONENT[name] + 1):
                    exponent += 1
            else:
                while exponent < 127 and amax > Fraction(2) ** exponent * Fraction(formats.MAXIMUM[name]):
                    exponent += 1
            scale[row, block] = exponent
            y[row, part] = rounded(flat[row, part] * 2.0**-exponent, name)
    leading = rows.shape[:-1]
    scale = scale.reshape(*leading, -1, 2).movedim(-2, axis % x.dim())
    return y.reshape(rows.shape).movedim(-1, axis), scale


def check(x: Tensor, axis: int, dst_type: int, block_size: int = 32, mode: str = "floor") -> None:
    algorithm = 0 if mode == "floor" else 1
    y, scale = mx_quant(x, axis=axis, dst_type=dst_type, block_size=block_size, scale_alg=algorithm)
    wanted, exponents = expected(x, axis, NAMES[dst_type], block_size, mode)
    assert torch.equal(values(y, NAMES[dst_type]), wanted)
    assert scale.dtype == torch.uint8
    assert torch.equal(scale.float() - 127, exponents)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dst_type", NAMES)
@pytest.mark.parametrize("shape", [(2, 32), (3, 70), (2, 2, 96)])
def test_every_block_by_the_definition(shape: tuple[int, ...], dst_type: int, dtype: torch.dtype) -> None:
    x = torch.randn(shape) * torch.exp2(torch.randint(-12, 12, (*shape[:-1], 1)).float())
    check(x.to(dtype), -1, dst_type)


@pytest.mark.parametrize("dst_type", NAMES)
@pytest.mark.parametrize("axis", [0, 1, 2, -2])
def test_axes(axis: int, dst_type: int) -> None:
    check(torch.randn(40, 3, 6).half(), axis, dst_type)
    check(torch.randn(6, 70, 3).permute(2, 1, 0).bfloat16(), axis, dst_type)


@pytest.mark.parametrize("block_size", [64, 96, 1024])
def test_block_sizes(block_size: int) -> None:
    check(torch.randn(2, 200).bfloat16(), -1, 24, block_size)


@pytest.mark.parametrize("dst_type", [23, 24])
def test_nothing_saturates_with_the_other_algorithm(dst_type: int) -> None:
    check(torch.randn(4, 96).bfloat16(), -1, dst_type, mode="rceil")
    largest = formats.MAXIMUM[NAMES[dst_type]]
    x = torch.zeros(2, 32)
    x[:, 0] = torch.tensor([largest, largest * (1 + 2.0**-20)])
    assert mx_quant(x, dst_type=dst_type, scale_alg=1)[1].tolist() == [[[127, 0]], [[128, 0]]]
    assert mx_quant(x, dst_type=dst_type)[1].tolist() == [[[127, 0]], [[127, 0]]]


def test_pairs_of_scales() -> None:
    """Blocks of five different magnitudes: pairs along the axis in order, the last one filled up."""
    x = torch.exp2(torch.arange(5.0) + 8).repeat_interleave(32).bfloat16()
    assert mx_quant(x, dst_type=24)[1].tolist() == [[127, 128], [129, 130], [131, 0]]
    both = torch.stack([x, x * 2.0**10], 1)
    scale = mx_quant(both, axis=0, dst_type=24)[1]
    assert scale.shape == (3, 2, 2)
    assert scale[:, 0].tolist() == [[127, 128], [129, 130], [131, 0]]
    assert scale[:, 1].tolist() == [[137, 138], [139, 140], [141, 0]]


def test_bytes_hold_neighbours_of_the_last_dimension_for_every_axis() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0]]).repeat(32, 1).bfloat16()
    for axis in (0, 1):
        y, _ = mx_quant(x, axis=axis)
        # Along the rows each column has its own scale: all but 3 are powers of two, and 6 has the code of 3.
        assert y[0].tolist() == ([0x66, 0x77] if axis == 0 else [0x42, 0x75])


def test_rounding_is_half_to_even_and_saturates() -> None:
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([7.9, 0.25, 0.75, 2.5, 3.5, -5.0])
    y, scale = mx_quant(x)
    assert scale.tolist() == [[[127, 0]]]
    assert values(y, "float4_e2m1")[0, :6].tolist() == [6.0, 0.0, 1.0, 2.0, 4.0, -4.0]


def test_extremes() -> None:
    x = torch.zeros(5, 32)
    x[:, 0] = torch.tensor([2.0**-149, 2.0**-126, 3e38, math.inf, math.nan])
    x[3:, 1] = 5.0
    y, scale = mx_quant(x, dst_type=24)
    assert scale[:, 0, 0].tolist() == [0, 0, 246, 255, 255]
    numbers = values(y, "float8_e4m3fn")
    assert numbers[:3, 0].tolist() == [0.0, 2.0, 448.0]
    assert (numbers[3:] == 0).all()
    zeros, scale = mx_quant(torch.zeros(1, 64).half())
    assert (zeros == 0).all() and (scale == 0).all()


def test_results_are_fresh_and_contiguous() -> None:
    x = torch.randn(70, 4).t().half()
    before = x.clone()
    for axis in (0, 1):
        for result, same in zip(mx_quant(x, axis=axis), mx_quant(x.contiguous(), axis=axis), strict=True):
            assert torch.equal(result, same) and result.is_contiguous()
            result.zero_()
    assert torch.equal(x, before)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 3),
    pairs=st.integers(1, 50),
    dtype=st.sampled_from(DTYPES[:2]),
    dst_type=st.sampled_from(list(NAMES)),
    magnitude=st.integers(-20, 12),
    seed=st.integers(0, 999),
)
def test_dequantizing_gives_the_input_back_to_half_a_step(
    rows: int, pairs: int, dtype: torch.dtype, dst_type: int, magnitude: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, 2 * pairs, generator=generator) * 2.0**magnitude).to(dtype)
    y, scale = mx_quant(x, dst_type=dst_type)
    name = NAMES[dst_type]
    factor = torch.exp2(scale.flatten(1).double() - 127).repeat_interleave(32, 1)[:, : x.size(1)]
    limit = formats.MAXIMUM[name] * factor
    error = (values(y, name) * factor - x.double().clamp(-limit, limit)).abs()
    # Steps of the top binade, which are the coarsest: e4m3fn 32, e5m2 8192, e2m1 2, e1m2 1/4.
    step = {23: 8192.0, 24: 32.0, 296: 2.0, 297: 0.25}[dst_type]
    assert (error <= factor * step / 2).all()
    # Powers of two only move the scale.
    y_scaled, scale_scaled = mx_quant(x.float().bfloat16() * 4, dst_type=dst_type)
    y_same, scale_same = mx_quant(x.bfloat16(), dst_type=dst_type)
    blocks = -(-x.size(1) // 32)
    assert torch.equal(y_scaled.view(torch.uint8), y_same.view(torch.uint8))
    moved = (scale_scaled.int() - scale_same.int()).flatten(1)[:, :blocks]
    amax = x.bfloat16().float()
    assert ((moved == 2) | ((amax == 0).all())).all()
