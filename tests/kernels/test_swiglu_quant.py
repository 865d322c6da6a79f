from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from tests.kernels._swiglu import FP32_EPS, assert_rounded, groups_of_rows, swish

swiglu_quant = torch.ops.npu.npu_swiglu_quant
INF = float("inf")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def exact_swiglu_quant(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    offsets: Tensor | None = None,
    counts: list[int] | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    largest: float = 127.0,
) -> tuple[Tensor, Tensor]:
    """float64 values before rounding [T, H] and scale [T], row by row in plain Python."""
    rows = x.double().reshape(-1, x.shape[-1]).tolist()
    half = x.shape[-1] // 2
    groups = [0] * len(rows) if counts is None else groups_of_rows(counts, len(rows))
    values, scales = [], []
    for row, group in zip(rows, groups, strict=True):
        left, right = row[:half], row[half:]
        act, lin = (left, right) if activate_left else (right, left)
        s = [swish(a) * b for a, b in zip(act, lin, strict=True)]
        if smooth_scales is not None and group is not None:
            smooth = smooth_scales[group].double().expand(half).tolist()
            s = [v * m for v, m in zip(s, smooth, strict=True)]
        if quant_mode == 1:
            amax = max(map(abs, s))
            scale = largest / amax if amax else INF
            s = [v * scale if amax else 0.0 for v in s]
        else:
            scale = 0.0
            if offsets is not None and group is not None:
                s = [v + o for v, o in zip(s, offsets[group].double().expand(half).tolist(), strict=True)]
        values.append(s)
        scales.append(scale)
    exact = torch.tensor(values, dtype=torch.float64).reshape(len(rows), half)
    return exact, torch.tensor(scales, dtype=torch.float64)


def unpack(y: Tensor) -> Tensor:
    """Two signed nibbles of each byte, the lower first."""
    numbers = [((byte >> shift & 15) ^ 8) - 8 for byte in y.flatten().tolist() for shift in (0, 4)]
    return torch.tensor(numbers, dtype=torch.int8).reshape(*y.shape[:-1], -1)


def check_dynamic(x: Tensor, counts: list[int] | None = None, **options: Any) -> None:
    y, scale = swiglu_quant(x, quant_mode=1, **options)
    exact, exact_scale = exact_swiglu_quant(
        x,
        smooth_scales=options.get("smooth_scales"),
        counts=counts,
        activate_left=options.get("activate_left", False),
        quant_mode=1,
    )
    assert_rounded(y.reshape(exact.shape), exact, 127 * 8 * FP32_EPS)
    torch.testing.assert_close(scale.double().flatten(), exact_scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(7, 32), (2, 3, 16), (1, 2)])
@pytest.mark.parametrize("activate_left", [False, True])
def test_dynamic_matches_float64(dtype: torch.dtype, shape: tuple[int, ...], activate_left: bool) -> None:
    check_dynamic(torch.randn(shape).mul(3).to(dtype), activate_left=activate_left)


def test_activates_the_second_half_by_default() -> None:
    x = torch.tensor([[5.0, -3.0, -20.0, 1.0]])
    _, right = swiglu_quant(x, quant_mode=1)
    _, left = swiglu_quant(x, quant_mode=1, activate_left=True)
    torch.testing.assert_close(right, torch.tensor([127 / abs(swish(1.0) * -3.0)]))
    torch.testing.assert_close(left, torch.tensor([127 / (swish(5.0) * 20.0)]))


def test_scale_is_the_inverse_of_dequant_swiglu_quants() -> None:
    x = torch.randn(6, 32).bfloat16()
    y, scale = swiglu_quant(x, quant_mode=1)
    other_y, other_scale = torch.ops.npu.npu_dequant_swiglu_quant(x, quant_mode=1)
    torch.testing.assert_close(scale, 1 / other_scale)
    assert (y.to(torch.int16) - other_y).abs().max() <= 1


def test_static_multiplies_and_leaves_the_scale_zero() -> None:
    x = torch.randn(5, 16) * 3
    smooth, offsets = torch.full((1,), 4.0), torch.full((1,), -2.5)
    y, scale = swiglu_quant(x, smooth_scales=smooth, offsets=offsets)
    left, right = x.double().chunk(2, -1)
    s = right * right.sigmoid() * left
    assert_rounded(y, s * 4 - 2.5, 1e-4)
    assert not torch.equal(y, torch.round(s / 4 - 2.5).clamp(-128, 127).to(torch.int8))
    assert torch.equal(scale, torch.zeros(5))


def test_static_rounds_half_to_even_and_saturates() -> None:
    # silu(60) is 60.0 in fp32, so s is exactly 60 * lin.
    lin = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 200.0, -200.0, 126.5, 127.5, -128.5]) / 60
    act = torch.full_like(lin, 60.0)
    y, _ = swiglu_quant(
        torch.cat([lin * 0 + 1, act])[None],
        smooth_scales=(lin * 60)[None] / 60,
        offsets=torch.zeros(1, lin.numel()),
    )
    assert y.tolist() == [[0, 2, 2, 0, -2, -2, 127, -128, 126, 127, -128]]


def test_static_without_scales_rounds() -> None:
    x = torch.randn(4, 32) * 4
    y, _ = swiglu_quant(x, activate_left=True)
    exact, _ = exact_swiglu_quant(x, activate_left=True)
    assert_rounded(y, exact, 1e-4)


def test_zero_row_has_infinite_scale_and_zero_result() -> None:
    x = torch.randn(3, 16)
    x[1] = 0
    x[2, :8] = 0
    y, scale = swiglu_quant(x, quant_mode=1)
    assert scale[1:].tolist() == [INF, INF]
    assert y[1:].eq(0).all()
    assert y[0].abs().max() == 127


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 2, 4, 2], [8], [3, 5], [0, 0]])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("group_list_type", [0, 1])
@pytest.mark.parametrize("quant_mode", [0, 1])
def test_groups(counts: list[int], per_channel: bool, group_list_type: int, quant_mode: int) -> None:
    x = torch.randn(8, 16) * 3
    shape = (len(counts), 8) if per_channel else (len(counts),)
    smooth, offsets = torch.rand(shape) * 4 + 1, torch.randn(shape) * 9
    index = torch.tensor(counts, dtype=torch.int32)
    if group_list_type == 0:
        index = index.cumsum(0, dtype=torch.int32)
    y, scale = swiglu_quant(
        x,
        smooth_scales=smooth,
        offsets=offsets,
        group_index=index,
        group_list_type=group_list_type,
        quant_mode=quant_mode,
    )
    exact, exact_scale = exact_swiglu_quant(
        x, smooth_scales=smooth, offsets=offsets, counts=counts, quant_mode=quant_mode
    )
    assert_rounded(y, exact, 2e-4)
    torch.testing.assert_close(scale.double(), exact_scale, rtol=1e-6, atol=0)


def test_group_index_is_a_running_sum_by_default() -> None:
    x, smooth = torch.randn(4, 8), torch.tensor([[1.0], [3.0]]).expand(2, 4).contiguous()
    _, plain = swiglu_quant(x, quant_mode=1)
    _, scale = swiglu_quant(
        x, smooth_scales=smooth, group_index=torch.tensor([1, 3], dtype=torch.int32), quant_mode=1
    )
    factor = torch.tensor([1.0, 3.0, 3.0, 1.0])
    torch.testing.assert_close(scale * factor, plain)


def test_rows_beyond_the_groups_are_quantized_without_smooth_scale_and_offset() -> None:
    x = torch.randn(5, 16)
    index = torch.tensor([1, 2], dtype=torch.int32)
    smooth, offsets = torch.full((2, 8), 5.0), torch.full((2, 8), 40.0)
    plain_y, plain_scale = swiglu_quant(x, quant_mode=1)
    y, scale = swiglu_quant(x, smooth_scales=smooth, group_index=index, quant_mode=1)
    assert torch.equal(y[2:], plain_y[2:])
    assert torch.equal(scale[2:], plain_scale[2:])
    assert not torch.equal(scale[:2], plain_scale[:2])
    y, _ = swiglu_quant(x, smooth_scales=smooth, offsets=offsets, group_index=index)
    assert torch.equal(y[2:], swiglu_quant(x)[0][2:])


def test_groups_cover_the_flattened_rows() -> None:
    x, smooth = torch.randn(2, 3, 16), torch.rand(2, 8) + 0.5
    index = torch.tensor([4, 6], dtype=torch.int32)
    y, scale = swiglu_quant(x, smooth_scales=smooth, group_index=index, quant_mode=1)
    flat_y, flat_scale = swiglu_quant(x.view(6, 16), smooth_scales=smooth, group_index=index, quant_mode=1)
    assert torch.equal(y.view(6, 8), flat_y)
    assert torch.equal(scale.view(6), flat_scale)


def test_dynamic_ignores_offsets() -> None:
    x, smooth = torch.randn(4, 16), torch.rand(1, 8)
    y, scale = swiglu_quant(x, smooth_scales=smooth, offsets=torch.randn(1, 8), quant_mode=1)
    expected_y, expected_scale = swiglu_quant(x, smooth_scales=smooth, quant_mode=1)
    assert torch.equal(y, expected_y)
    assert torch.equal(scale, expected_scale)


def test_int4_dynamic_packs_two_values_per_byte() -> None:
    x = torch.randn(3, 2, 32) * 3
    y, scale = swiglu_quant(x, quant_mode=1, dst_type=torch.quint4x2)
    assert (y.shape, y.dtype) == ((3, 2, 8), torch.int8)
    exact, exact_scale = exact_swiglu_quant(x, quant_mode=1, largest=7.0)
    assert_rounded(unpack(y).reshape(exact.shape), exact, 1e-5, low=-8, high=7)
    torch.testing.assert_close(scale.double().flatten(), exact_scale, rtol=1e-6, atol=0)


def test_int4_low_nibble_holds_the_lower_index_and_saturates() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, -1.0, 60.0, 60.0, 60.0, 60.0]])
    smooth = torch.tensor([[1 / 20.0, 1 / 20.0, 1.0, 1.0]])
    y, _ = swiglu_quant(x, smooth_scales=smooth, offsets=torch.zeros(1, 4), dst_type=torch.quint4x2)
    # 3, -6 in one byte; 180 and -60 saturate to 7 and -8.
    assert [byte & 0xFF for byte in y[0].tolist()] == [0xA3, 0x87]
    assert unpack(y).tolist() == [[3, -6, 7, -8]]


def test_int4_zero_row() -> None:
    y, scale = swiglu_quant(torch.zeros(2, 8), quant_mode=1, dst_type=torch.quint4x2)
    assert torch.equal(y, torch.zeros(2, 2, dtype=torch.int8))
    assert scale.tolist() == [INF, INF]


@pytest.mark.parametrize("quant_mode", [0, 1])
def test_no_rows(quant_mode: int) -> None:
    y, scale = swiglu_quant(torch.empty(0, 3, 8), quant_mode=quant_mode)
    assert (y.shape, scale.shape) == ((0, 3, 4), (0, 3))


@pytest.mark.parametrize("quant_mode", [0, 1])
def test_strided_inputs_are_not_changed(quant_mode: int) -> None:
    x = torch.randn(16, 5).T
    smooth, offsets = torch.rand(8, 2).T, torch.randn(8, 2).T
    index = torch.tensor([2, 9, 5, 9], dtype=torch.int32)[::2]
    inputs = (x, smooth, offsets, index)
    before = [t.clone() for t in inputs]
    options = {"smooth_scales": smooth, "offsets": offsets, "group_index": index}
    y, scale = swiglu_quant(x, quant_mode=quant_mode, **options)
    plain = {name: tensor.contiguous() for name, tensor in options.items()}
    expected_y, expected_scale = swiglu_quant(x.contiguous(), quant_mode=quant_mode, **plain)
    assert torch.equal(y, expected_y)
    assert torch.equal(scale, expected_scale)
    assert y.is_contiguous()
    y.zero_()
    scale.zero_()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    rows=st.integers(1, 6),
    half=st.integers(1, 12),
    counts=st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=4),
    activate_left=st.booleans(),
    smoothed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_dynamic_property(
    rows: int, half: int, counts: list[int] | None, activate_left: bool, smoothed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    if counts is not None:
        rows = max(rows, sum(counts))
    x = torch.randn(rows, 2 * half, generator=generator) * 5
    options: dict[str, Any] = {"activate_left": activate_left}
    if smoothed:
        options["smooth_scales"] = torch.rand(len(counts or [0]), half, generator=generator) + 0.1
    if counts is not None:
        options["group_index"] = torch.tensor(counts, dtype=torch.int32)
        options["group_list_type"] = 1
    check_dynamic(x, counts, **options)
