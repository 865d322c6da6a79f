"""The building blocks in npu_fusion/kernels/reference/_quant.py."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npu_fusion.kernels.reference._quant import (
    dequantize,
    divide_rows,
    group_counts,
    group_rows,
    pack_int4,
    saturate,
    symmetric_rows,
    unpack_int4,
    unpack_quant_param,
)
from npu_fusion.meta_impls._dtypes import HIFLOAT8_DTYPE

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("dtype", "given_values", "expected"),
    [
        (torch.int8, [0.5, 1.5, 2.5, -0.5, -1.5], [0, 2, 2, 0, -2]),
        (torch.int8, [127.4, 127.5, 300.0, -128.5, -129.0, -1e30], [127, 127, 127, -128, -128, -128]),
        (torch.uint8, [-0.6, 0.0, 254.5, 255.5, 1e9], [0, 0, 254, 255, 255]),
        (torch.int32, [2.0**31, 3e9, -(2.0**31), -3e9], [2**31 - 1, 2**31 - 1, -(2**31), -(2**31)]),
        (torch.int8, [NAN, INF, -INF], [0, 127, -128]),
        (torch.int32, [NAN, INF, -INF], [0, 2**31 - 1, -(2**31)]),
    ],
)
def test_saturate_rounds_half_to_even_and_never_wraps(
    dtype: torch.dtype, given_values: list[float], expected: list[int]
) -> None:
    result = saturate(torch.tensor(given_values), dtype)
    assert result.dtype == dtype
    assert result.tolist() == expected


def test_saturate_integers_and_float8() -> None:
    assert saturate(torch.tensor([200, -300, 5]), torch.int8).tolist() == [127, -128, 5]
    assert saturate(torch.tensor([1e9, -1e9, 1.0]), torch.float8_e4m3fn).float().tolist() == [
        448.0,
        -448.0,
        1.0,
    ]
    assert saturate(torch.tensor([NAN, INF, 57344.0]), torch.float8_e5m2).float().nan_to_num(-1).tolist() == [
        -1.0,
        57344.0,
        57344.0,
    ]


def test_saturate_to_hifloat8_rounds_ties_away_and_gives_bytes() -> None:
    result = saturate(torch.tensor([0.0, 1.0, 1.0625, -1e9, INF, NAN]), HIFLOAT8_DTYPE)
    assert (result.dtype, result.tolist()) == (torch.uint8, [0, 0x08, 0x09, 0xEE, 0x6F, 0x80])


def test_saturate_to_int4_clamps_before_packing() -> None:
    values = torch.tensor([[9.0, -9.0, 7.4, -8.4, 0.5, 1.5, NAN, -1.0]])
    assert unpack_int4(saturate(values, torch.quint4x2)).tolist() == [[7, -8, 7, -8, 0, 2, 0, -1]]


def test_saturate_returns_a_new_tensor() -> None:
    x = torch.ones(3, dtype=torch.int8)
    saturate(x, torch.int8).zero_()
    assert x.tolist() == [1, 1, 1]


def test_symmetric_rows_of_zero_subnormal_and_empty_rows() -> None:
    y, scale = symmetric_rows(torch.tensor([[0.0, 0.0], [1e-45, 0.0], [1.0, -2.0]]), 127.0, torch.int8)
    assert y.tolist() == [[0, 0], [0, 0], [64, -127]]
    assert scale[:2].tolist() == [0.0, 0.0]
    y, scale = symmetric_rows(torch.empty(3, 0), 127.0, torch.int8)
    assert y.shape == (3, 0)
    assert scale.tolist() == [0.0] * 3
    quotient, scale = divide_rows(torch.empty(0, 4), 127.0)
    assert quotient.shape == (0, 4)
    assert scale.shape == (0,)


def test_pack_int4_puts_the_first_value_into_the_lowest_nibble() -> None:
    packed = pack_int4(torch.tensor([[1, 2, 3, 4, 5, 6, 7, -1]], dtype=torch.int8))
    assert packed.dtype == torch.int32
    assert packed.item() & 0xFFFFFFFF == 0xF7654321


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(-8, 7), min_size=16, max_size=16), max_size=4))
def test_pack_and_unpack_int4_are_inverse(rows: list[list[int]]) -> None:
    x = torch.tensor(rows, dtype=torch.int8).reshape(-1, 16)
    packed = pack_int4(x)
    assert packed.shape == (len(rows), 2)
    assert torch.equal(unpack_int4(packed), x)


@settings(deadline=None, max_examples=50)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(-256, 255))
def test_unpack_quant_param(scale: float, offset: int) -> None:
    bits = struct.unpack("<I", struct.pack("<f", scale))[0] & 0xFFFFE000
    truncated = struct.unpack("<f", struct.pack("<I", bits))[0]
    packed = bits | (1 << 46) | ((offset & 0x1FF) << 37)
    got_scale, got_offset = unpack_quant_param(torch.tensor([packed]))
    assert got_scale.tolist() == [truncated]
    assert got_offset.tolist() == [float(offset)]


def test_dequantize_adds_an_integer_bias_before_and_a_float_bias_after_the_scales() -> None:
    acc = torch.tensor([[10, -20]], dtype=torch.int32)
    channel, row = torch.tensor([0.5, 2.0]), torch.tensor([4.0])
    assert dequantize(acc, channel, row, torch.tensor([2, 4], dtype=torch.int32)).tolist() == [[24.0, -128.0]]
    assert dequantize(acc, channel, row, torch.tensor([2.0, 4.0])).tolist() == [[22.0, -156.0]]
    assert dequantize(acc, channel[:1], None, None).tolist() == [[5.0, -10.0]]


def test_groups() -> None:
    counts = torch.tensor([2, 0, 3, -1])
    assert group_rows(counts, 7).tolist() == [0, 0, 2, 2, 2, -1, -1]
    assert group_rows(counts, 3).tolist() == [0, 0, 2]
    assert group_rows(torch.tensor([], dtype=torch.int64), 2).tolist() == [-1, -1]
    assert group_rows(counts, 0).tolist() == []
    assert group_counts(torch.tensor([2, 2, 5], dtype=torch.int32)).tolist() == [2, 0, 3]
