from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion import formats
from npu_fusion.kernels.reference._quant import pack_quant_param
from tests.kernels._numerics import assert_correctly_rounded

quant_conv2d = torch.ops.npu.npu_quant_conv2d
FP16, FP32, BF16, HIFLOAT8 = 5, 6, 15, 290
HIF = {"input_dtype": HIFLOAT8, "weight_dtype": HIFLOAT8}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def convolved(
    x: Tensor,
    w: Tensor,
    strides: tuple[int, int],
    pads: tuple[int, int],
    dilations: tuple[int, int],
    groups: int,
) -> Tensor:
    """The sums in float64: for every tap of the kernel a product of channels at shifted positions."""
    (dh, dw), (sh, sw), (ph, pw) = dilations, strides, pads
    x = torch.nn.functional.pad(x.double(), (pw, pw, ph, ph))
    outputs, of_group, kh, kw = w.shape
    rows = (x.size(2) - dh * (kh - 1) - 1) // sh + 1
    columns = (x.size(3) - dw * (kw - 1) - 1) // sw + 1
    y = torch.zeros(x.size(0), outputs, rows, columns, dtype=torch.float64)
    for group in range(groups):
        inside = x[:, group * of_group : (group + 1) * of_group]
        mine = slice(group * outputs // groups, (group + 1) * outputs // groups)
        for i in range(kh):
            for j in range(kw):
                down, right = i * dh, j * dw
                seen = inside[
                    :, :, down : down + sh * (rows - 1) + 1 : sh, right : right + sw * (columns - 1) + 1 : sw
                ]
                y[:, mine] += torch.einsum("nchw,oc->nohw", seen, w[mine, :, i, j].double())
    return y


def kept(scale: Tensor) -> Tensor:
    """What packing leaves of a scale."""
    return (scale.view(torch.int32) & ~0x1FFF).view(torch.float32).double()


def assert_close(y: Tensor, exact: Tensor) -> None:
    far = exact.abs() > 1e-2 * exact.abs().max()
    if y.dtype == torch.float32:
        torch.testing.assert_close(y[far].double(), exact[far], rtol=2e-5, atol=0)
    else:
        assert_correctly_rounded(y[far], exact[far])


SHAPES: list[tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]] = [
    ((1, 1), (0, 0), (1, 1), 1),
    ((2, 1), (1, 2), (1, 1), 1),
    ((1, 3), (2, 0), (2, 1), 2),
    ((2, 2), (1, 1), (1, 2), 4),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("output", [FP16, FP32, BF16])
@pytest.mark.parametrize("element", ["float8_e4m3fn", "hifloat8"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_8_bit_floats(shape: Any, output: int, element: str, with_bias: bool) -> None:
    groups = shape[3]
    x = formats.encode(torch.randn(2, 8, 9, 7), element)
    w = formats.encode(torch.randn(12, 8 // groups, 3, 2), element)
    scale, bias = torch.rand(12) * 0.1 + 0.01, torch.randn(12) * 10 if with_bias else None
    call = HIF if element == "hifloat8" else {}
    y = quant_conv2d(x, w, pack_quant_param(scale), *shape, output_dtype=output, bias=bias, **call)
    sums = convolved(formats.decode(x, element), formats.decode(w, element), *shape)
    sums = sums if bias is None else sums + bias.double().view(-1, 1, 1)
    assert y.is_contiguous()
    assert_close(y, sums * kept(scale).view(-1, 1, 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_int8(shape: Any, with_bias: bool) -> None:
    x = torch.randint(-128, 128, (2, 8, 9, 7), dtype=torch.int8)
    w = torch.randint(-128, 128, (12, 8 // shape[3], 3, 2), dtype=torch.int8)
    scale = torch.rand(12) * 1e-3 + 1e-5
    bias = torch.randint(-1000, 1000, (12,), dtype=torch.int32) if with_bias else None
    y = quant_conv2d(x, w, pack_quant_param(scale), *shape, output_dtype=FP16, bias=bias)
    sums = convolved(x, w, *shape)
    sums = sums if bias is None else sums + bias.double().view(-1, 1, 1)
    # Exact but for two roundings, to float32 and to the result: as if by hand.
    expected = (sums.float() * kept(scale).float().view(-1, 1, 1)).half()
    assert torch.equal(y, expected)


def test_the_bias_is_scaled() -> None:
    one = torch.ones(1, 1, 1, 1)
    scale = pack_quant_param(torch.tensor([2.0]))
    eight = one.to(torch.float8_e4m3fn)
    assert quant_conv2d(eight, eight, scale, output_dtype=FP16, bias=torch.tensor([3.0])).item() == 8.0
    eight = one.to(torch.int8)
    bias = torch.tensor([3], dtype=torch.int32)
    assert quant_conv2d(eight, eight, scale, output_dtype=FP16, bias=bias).item() == 8.0


def test_large_sums_of_int8_are_exact() -> None:
    """With 127 * 127 * 1200 > 2^24 a sum in float32 would lose its last bits."""
    x = torch.full((1, 1200, 1, 1), 127, dtype=torch.int8)
    w = torch.full((1, 1200, 1, 1), 127, dtype=torch.int8)
    x[0, 0], w[0, 0] = 1, 1
    total = 127 * 127 * 1199 + 1
    bias = torch.tensor([1 - total], dtype=torch.int32)
    y = quant_conv2d(x, w, pack_quant_param(torch.ones(1)), output_dtype=FP16, bias=bias)
    assert y.item() == 1.0


def test_a_result_in_hifloat8_rounds_halves_away() -> None:
    x = torch.tensor([1.0625, -1.0625, 1e6, 3.0]).view(1, 1, 2, 2)
    codes = formats.encode(torch.ones(1, 1, 2, 2), "hifloat8")
    one = formats.encode(torch.ones(1, 1, 1, 1), "hifloat8")
    call = {"output_dtype": HIFLOAT8, "round_mode": "round", **HIF}
    # The bias makes the sums; one at a time, as there is one for a channel.
    got = []
    for value in x.flatten():
        y = quant_conv2d(codes, one, pack_quant_param(torch.ones(1)), bias=value[None] - 1, **call)
        assert y.dtype == torch.uint8
        got.append(formats.decode(y, "hifloat8").flatten()[0].item())
    assert got == [1.125, -1.125, 32768.0, 3.0]


def test_pads_are_zeros_and_strides_of_memory_do_not_matter() -> None:
    x = torch.ones(1, 2, 2, 3, dtype=torch.int8).contiguous(memory_format=torch.channels_last)
    w = torch.ones(1, 2, 1, 1, dtype=torch.int8)
    y = quant_conv2d(x, w, pack_quant_param(torch.ones(1)), 1, (1, 0), output_dtype=FP16)
    assert y.is_contiguous()
    assert y[0, 0].tolist() == [[0.0] * 3, [2.0] * 3, [2.0] * 3, [0.0] * 3]


def test_no_images() -> None:
    x, w = torch.ones(0, 2, 4, 4, dtype=torch.int8), torch.ones(3, 2, 2, 2, dtype=torch.int8)
    assert quant_conv2d(x, w, pack_quant_param(torch.ones(3)), output_dtype=FP16).shape == (0, 3, 3, 3)


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(3, 8),
    width=st.integers(3, 8),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    groups=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    height: int,
    width: int,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int],
    groups: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x = torch.randint(-128, 128, (1, 4, height, width), dtype=torch.int8)
    w = torch.randint(-128, 128, (6, 4 // groups, *kernel), dtype=torch.int8)
    y = quant_conv2d(
        x, w, pack_quant_param(torch.full((6,), 2.0**-6)), strides, pads, 1, groups, output_dtype=FP16
    )
    sums = convolved(x, w, strides, pads, (1, 1), groups)
    assert torch.equal(y, (sums.float() * 2.0**-6).half())
