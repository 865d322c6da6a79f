from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from tests.kernels._swiglu import FP32_EPS, ROUNDINGS, assert_rounded, groups_of_rows, swish, swish_slope

dsq = torch.ops.npu.npu_dequant_swiglu_quant
DYNAMIC = 1


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@dataclass
class Exact:
    """What float64 gives: values before rounding [T, H] and scale [T]; and by how much fp32 may miss them."""

    values: Tensor
    scale: Tensor
    value_error: Tensor
    scale_error: Tensor


def exact_dsq(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    counts: list[int] | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
    largest: float = 127.0,
) -> Exact:
    """The formula, one row and one element at a time, in Python's float64 and integers."""
    width = x.shape[-1]
    rows = x.reshape(-1, width).tolist()
    groups = [0] * len(rows) if counts is None else groups_of_rows(counts, len(rows))
    number_of_groups = 1 if counts is None else len(counts)

    def of_group(tensor: Tensor, group: int, length: int, *, scalars: bool = False) -> list[float]:
        if tensor.dim() == 1 and not (scalars and len(tensor) == number_of_groups):
            return tensor.tolist()
        return tensor[group].expand(length).tolist()

    values, value_errors, scales, scale_errors = [], [], [], []
    for t, (row, group) in enumerate(zip(rows, groups, strict=True)):
        half = width // 2
        if group is None:
            values.append([0.0] * half)
            value_errors.append([0.0] * half)
            scales.append(0.0)
            scale_errors.append(0.0)
            continue
        # Each element with the largest magnitude in its sum: cancellation makes fp32 worse than its epsilon.
        d = [(v, abs(v)) for v in row]
        if weight_scale is not None:
            b = [0] * width if bias is None else of_group(bias, group, width)
            w = of_group(weight_scale, group, width)
            a = 1.0 if activation_scale is None else activation_scale.flatten()[t].item()
            if bias is not None and bias.dtype == torch.int32:
                scaled, b = [(v + n) * m * a for v, n, m in zip(row, b, w, strict=True)], [0.0] * width
            else:
                scaled = [v * m * a for v, m in zip(row, w, strict=True)]
            d = [(v + n, max(abs(v), abs(n))) for v, n in zip(scaled, b, strict=True)]
        if swiglu_mode == 1:
            act, lin = d[0::2], d[1::2]
        else:
            act, lin = (d[:half], d[half:]) if activate_left else (d[half:], d[:half])
        alpha = 1.0
        if swiglu_mode != 0:
            alpha = glu_alpha
            act = [(min(p, clamp_limit), reach) for p, reach in act]
            lin = [
                (min(max(q, -clamp_limit), clamp_limit) + glu_bias, reach + abs(glu_bias)) for q, reach in lin
            ]
        s, errors = [], []
        for (p, p_reach), (q, q_reach) in zip(act, lin, strict=True):
            s.append(swish(p, alpha) * q)
            spread = abs(swish_slope(p, alpha) * q) * p_reach + abs(swish(p, alpha)) * q_reach
            errors.append(2 * FP32_EPS * (spread + (3 + abs(alpha * p)) * abs(s[-1])))
        if quant_mode == DYNAMIC:
            if quant_scale is not None:
                smooth = of_group(quant_scale, group, half)
                s = [v * m for v, m in zip(s, smooth, strict=True)]
                errors = [e * abs(m) for e, m in zip(errors, smooth, strict=True)]
            scale, scale_error = max(map(abs, s)) / largest, max(errors) / largest
            if scale:
                s = [v / scale for v in s]
                relative = scale_error / scale + 2 * FP32_EPS
                errors = [e / scale + abs(v) * relative for v, e in zip(s, errors, strict=True)]
        else:
            scale, scale_error = 0.0, 0.0
            if quant_scale is not None:
                divisor = of_group(quant_scale, group, half, scalars=True)
                s = [v / m for v, m in zip(s, divisor, strict=True)]
                errors = [e / abs(m) for e, m in zip(errors, divisor, strict=True)]
            if quant_offset is not None:
                offset = of_group(quant_offset, group, half, scalars=True)
                s = [v + o for v, o in zip(s, offset, strict=True)]
                errors = [
                    e + 2 * FP32_EPS * (abs(v) + abs(o)) for v, e, o in zip(s, errors, offset, strict=True)
                ]
        values.append(s)
        value_errors.append(errors)
        scales.append(scale)
        scale_errors.append(scale_error)
    shape = (len(rows), width // 2)
    return Exact(
        values=torch.tensor(values, dtype=torch.float64).reshape(shape),
        scale=torch.tensor(scales, dtype=torch.float64),
        value_error=torch.tensor(value_errors, dtype=torch.float64).reshape(shape),
        scale_error=torch.tensor(scale_errors, dtype=torch.float64),
    )


def check(x: Tensor, counts: list[int] | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Run the operator, compare with float64 (int8: the same integer unless next to a tie; scale: 1e-6)."""
    round_mode = options.pop("round_mode", None)
    exact = exact_dsq(x, counts=counts, **options)
    index = None if counts is None else torch.tensor(counts)
    y, scale = dsq(x, group_index=index, round_mode=round_mode, **options)
    assert y.dtype == torch.int8
    assert y.shape == (*x.shape[:-1], x.shape[-1] // 2)
    assert scale.shape == x.shape[:-1]
    assert_rounded(y.reshape(exact.values.shape), exact.values, exact.value_error, ROUNDINGS[round_mode or 0])
    too_far = (scale.double().flatten() - exact.scale).abs() > 1e-6 * exact.scale + exact.scale_error
    assert not too_far.any()
    return y, scale


def dequant(rows: int, width: int, groups: int = 1) -> dict[str, Tensor]:
    """int32 x and scales such that the dequantized values are of the order of 1."""
    return {
        "x": torch.randint(-20000, 20000, (rows, width), dtype=torch.int32),
        "weight_scale": (torch.rand(groups, width) + 0.5) / 1000,
        "activation_scale": (torch.rand(rows) + 0.5) / 4,
    }


# --- what is activated -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activate_left", [True, False])
@pytest.mark.parametrize("quant_mode", [0, 1])
def test_a_left_and_right_halves_differ(activate_left: bool, quant_mode: int) -> None:
    args = dequant(6, 32)
    args["x"][:, :16] = args["x"][:, :16].abs()
    y, _ = check(**args, activate_left=activate_left, quant_mode=quant_mode)
    other, _ = dsq(**args, activate_left=not activate_left, quant_mode=quant_mode)
    assert not torch.equal(y, other)


def test_a_default_activates_the_second_half_and_npu_swiglu_the_first() -> None:
    x = torch.tensor([[3.0, -2.0]], dtype=torch.float16)
    _, scale = dsq(x, quant_mode=DYNAMIC)
    torch.testing.assert_close(scale, torch.tensor([abs(3 * swish(-2.0)) / 127]))
    _, scale = dsq(x, quant_mode=DYNAMIC, activate_left=True)
    torch.testing.assert_close(scale, torch.ops.npu.npu_swiglu(x.float()).abs()[:, 0] / 127)


# --- zero rows, groups -----------------------------------------------------------------------------------


def test_b_zero_row_has_scale_zero_and_result_zero() -> None:
    args = dequant(4, 16)
    args["x"][1] = 0
    args["activation_scale"][2] = 0
    y, scale = check(**args, quant_mode=DYNAMIC)
    assert scale[1:3].tolist() == [0, 0]
    assert y[1:3].eq(0).all()


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 2, 4, 2], [8], [3], [0, 0], [1] * 8, [0, 8, 0]])
@pytest.mark.parametrize("quant_mode", [0, 1])
@pytest.mark.parametrize("bias_dtype", [None, torch.int32, torch.float32, torch.bfloat16])
def test_c_groups(counts: list[int], quant_mode: int, bias_dtype: torch.dtype | None) -> None:
    args: dict[str, Any] = dequant(8, 16, len(counts))
    if bias_dtype is not None:
        spread = 3000 if bias_dtype == torch.int32 else 3
        args["bias"] = (torch.randn(len(counts), 16) * spread).to(bias_dtype)
    args["quant_scale"] = (torch.rand(len(counts), 8) + 0.5) / 10
    if quant_mode == 0:
        args["quant_offset"] = torch.randn(len(counts), 8) * 20
    y, scale = check(counts=counts, quant_mode=quant_mode, **args)
    used = sum(counts)
    assert y[used:].eq(0).all()
    assert scale[used:].eq(0).all()
    if used:
        assert y[:used].ne(0).any()


def test_c_group_index_holds_counts_and_not_running_sums() -> None:
    args = dequant(5, 16, 3)
    y, scale = dsq(**args, group_index=torch.tensor([2, 0, 3]), quant_mode=DYNAMIC)
    for rows, group in ((slice(0, 2), 0), (slice(2, 5), 2)):
        part = {
            "x": args["x"][rows],
            "weight_scale": args["weight_scale"][group],
            "activation_scale": args["activation_scale"][rows],
        }
        y_part, scale_part = dsq(**part, quant_mode=DYNAMIC)
        assert torch.equal(y[rows], y_part)
        assert torch.equal(scale[rows], scale_part)


def test_c_unused_rows_do_not_leak_nan() -> None:
    x = torch.randn(4, 8).half()
    x[2:] = float("nan")
    y, scale = dsq(x, group_index=torch.tensor([2]), quant_mode=DYNAMIC)
    assert y[2:].eq(0).all()
    assert scale[2:].tolist() == [0, 0]


def test_c_counts_beyond_the_rows_are_refused() -> None:
    with pytest.raises(
        ValueError, match="npu_dequant_swiglu_quant: the counts in group_index sum to 6; accepted: at most 5"
    ):
        dsq(torch.randn(5, 8).half(), group_index=torch.tensor([2, 4]), quant_mode=DYNAMIC)


@pytest.mark.parametrize("quant_mode", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_groups_of_floating_point_x(quant_mode: int, dtype: torch.dtype) -> None:
    check(
        torch.randn(7, 16).mul(3).to(dtype),
        counts=[3, 0, 2],
        quant_scale=(torch.rand(3, 8) + 0.5) / 10,
        quant_mode=quant_mode,
    )


# --- spellings of the scales -----------------------------------------------------------------------------


@pytest.mark.parametrize("weight_shape", [(16,), (1, 16)])
@pytest.mark.parametrize("activation_shape", [(6,), (6, 1), (2, 3), (2, 3, 1), None])
@pytest.mark.parametrize("grouped", [False, True])
def test_d_spellings_of_the_dequantization_scales(
    weight_shape: tuple[int, ...], activation_shape: tuple[int, ...] | None, grouped: bool
) -> None:
    args = dequant(6, 16)
    counts = [6] if grouped else None
    reference = check(counts=counts, quant_mode=DYNAMIC, **args) if activation_shape else None
    activation = args["activation_scale"].reshape(activation_shape) if activation_shape else None
    y, scale = check(
        args["x"].reshape(2, 3, 16),
        counts=counts,
        weight_scale=args["weight_scale"].reshape(weight_shape),
        activation_scale=activation,
        quant_mode=DYNAMIC,
    )
    if reference:
        assert torch.equal(y.reshape(6, 8), reference[0])
        assert torch.equal(scale.reshape(6), reference[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("counts", "shape"),
    [
        (None, (1,)),
        (None, (1, 1)),
        (None, (8,)),
        (None, (1, 8)),
        ([5], (8,)),
        ([5], (1,)),
        ([2, 3], (2,)),
        ([2, 3], (2, 1)),
        ([2, 3], (2, 8)),
    ],
)
@pytest.mark.parametrize("with_offset", [True, False])
def test_d_spellings_of_static_quant_scale(
    counts: list[int] | None, shape: tuple[int, ...], dtype: torch.dtype, with_offset: bool
) -> None:
    options: dict[str, Tensor] = {"quant_scale": (torch.rand(shape) + 0.5).div(10).to(dtype)}
    if with_offset:
        options["quant_offset"] = (torch.randn(shape) * 20).to(dtype)
    check(torch.randn(5, 16).bfloat16(), counts=counts, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("counts", "shape"), [(None, (8,)), (None, (1, 8)), ([4], (8,)), ([2, 3], (2, 8))])
def test_d_spellings_of_dynamic_quant_scale(
    counts: list[int] | None, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    scale = (torch.rand(shape) + 0.5).to(dtype)
    check(torch.randn(5, 16).bfloat16(), counts=counts, quant_scale=scale, quant_mode=DYNAMIC)


def test_d_static_scale_as_long_as_the_groups_is_a_scalar_per_group_even_if_it_fits_the_channels() -> None:
    x = torch.randn(8, 8).half()
    scale = torch.tensor([0.01, 0.02, 0.03, 0.04])
    index = torch.tensor([2, 2, 2, 2])
    y, _ = dsq(x, quant_scale=scale, group_index=index)
    assert torch.equal(y, dsq(x, quant_scale=scale[:, None], group_index=index)[0])
    assert not torch.equal(y, dsq(x, quant_scale=scale.expand(4, 4).contiguous(), group_index=index)[0])


# --- bias ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16,), (1, 16)])
def test_e_bias(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    spread = 3000 if dtype == torch.int32 else 3
    bias = (torch.randn(shape) * spread).to(dtype)
    args = dequant(5, 16)
    y, _ = check(**args, bias=bias, quant_mode=DYNAMIC)
    assert not torch.equal(y, dsq(**args, quant_mode=DYNAMIC)[0])


def test_e_int32_bias_is_scaled_and_floating_point_bias_is_not() -> None:
    args = dequant(5, 16)
    bias = torch.randint(1, 5, (16,), dtype=torch.int32)
    before, _ = dsq(**args, bias=bias, quant_mode=DYNAMIC)
    after, _ = dsq(**args, bias=bias.float(), quant_mode=DYNAMIC)
    assert not torch.equal(before, after)


# --- static mode -----------------------------------------------------------------------------------------


def test_f_static_divides_saturates_and_rounds_half_to_even() -> None:
    # silu(60) is exactly 60 in fp32, so s / 60 is exactly the first half.
    lin = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 500.0, -500.0, 127.5, -128.5, 126.5])
    x = torch.cat([lin, torch.full_like(lin, 60.0)])[None].half()
    y, scale = dsq(x, quant_scale=torch.tensor([60.0]))
    assert y.tolist() == [[0, 2, 2, 0, -2, -2, 127, -128, 127, -128, 126]]
    assert scale.tolist() == [0]


def test_f_offset_is_added_after_the_division() -> None:
    x = torch.tensor([[2.0, -4.0, 60.0, 60.0]]).half()
    y, _ = dsq(x, quant_scale=torch.tensor([[30.0, 60.0]]), quant_offset=torch.tensor([[-1.0, 7.0]]))
    assert y.tolist() == [[3, 3]]


def test_static_divides_where_swiglu_quant_multiplies() -> None:
    x, scale = torch.randn(4, 16).bfloat16(), torch.full((1,), 0.125)
    y, _ = dsq(x, quant_scale=scale)
    inverse, _ = torch.ops.npu.npu_swiglu_quant(x, smooth_scales=1 / scale, offsets=torch.zeros(1))
    assert torch.equal(y, inverse)
    assert not torch.equal(y, dsq(x, quant_scale=1 / scale)[0])


def test_static_without_scale_rounds() -> None:
    _, scale = check(torch.randn(4, 16).mul(5).half())
    assert torch.equal(scale, torch.zeros(4))


def test_dynamic_multiplies_by_the_smooth_scale() -> None:
    x, smooth = torch.randn(4, 16).half(), torch.full((8,), 8.0)
    y, scale = dsq(x, quant_scale=smooth, quant_mode=DYNAMIC)
    plain_y, plain_scale = dsq(x, quant_mode=DYNAMIC)
    assert torch.equal(y, plain_y)
    assert torch.equal(scale, plain_scale * 8)


@pytest.mark.parametrize("round_mode", [None, 0, 1, 2, 3, 4])
@pytest.mark.parametrize("quant_mode", [0, 1])
def test_round_modes(round_mode: int | None, quant_mode: int) -> None:
    check(torch.randn(6, 32).half() * 3, round_mode=round_mode, quant_mode=quant_mode)


def test_round_modes_at_ties() -> None:
    lin = torch.tensor([0.5, 1.5, 2.5, -0.5, -2.5, 0.25, -0.75, 200.5, -200.5])
    x = torch.cat([lin, torch.full_like(lin, 60.0)])[None].half()
    expected = {
        0: [0, 2, 2, 0, -2, 0, -1, 127, -128],
        1: [1, 2, 3, -1, -3, 0, -1, 127, -128],
        2: [0, 1, 2, -1, -3, 0, -1, 127, -128],
        3: [1, 2, 3, 0, -2, 1, 0, 127, -128],
        4: [0, 1, 2, 0, -2, 0, 0, 127, -128],
    }
    for mode, values in expected.items():
        assert dsq(x, quant_scale=torch.tensor([60.0]), round_mode=mode)[0].tolist() == [values], mode


def test_half_away_does_not_round_up_what_is_just_below_a_half() -> None:
    # 0.49999997 + 0.5 is 1.0 in fp32.
    below = torch.nextafter(torch.tensor([0.5]), torch.tensor([0.0]))
    assert below + 0.5 == 1
    y, _ = dsq(torch.zeros(1, 2).half(), quant_scale=torch.ones(1), quant_offset=below, round_mode=1)
    assert y.item() == 0


# --- swiglu modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("swiglu_mode", [1, 2])
@pytest.mark.parametrize("activate_left", [True, False])
@pytest.mark.parametrize("quant_mode", [0, 1])
def test_g_clipped_modes(swiglu_mode: int, activate_left: bool, quant_mode: int) -> None:
    x = torch.randn(6, 32).half() * 5
    x[0, 0:4] = torch.tensor([20.0, 20.0, -20.0, -20.0])
    options = {"activate_left": activate_left, "quant_mode": quant_mode, "swiglu_mode": swiglu_mode}
    check(x, **options)
    check(x, **options, clamp_limit=2.5, glu_alpha=0.8, glu_bias=-0.25)


def test_g_clipping_in_numbers() -> None:
    # act above the limit is clipped, far below it is not; lin is clipped on both sides, then shifted.
    act, lin = torch.tensor([10.0, -10.0, 10.0]), torch.tensor([10.0, 3.0, -10.0])
    expected = torch.tensor([swish(7.0, 1.702) * 8, swish(-10.0, 1.702) * 4, swish(7.0, 1.702) * -6])
    interleaved = torch.stack([act, lin], -1).reshape(1, 6).half()
    halves = torch.cat([act, lin])[None].half()
    for x, mode, left in ((interleaved, 1, False), (interleaved, 1, True), (halves, 2, True)):
        y, _ = dsq(x, swiglu_mode=mode, activate_left=left, quant_scale=torch.tensor([0.5]))
        assert torch.equal(y, torch.round(expected / 0.5)[None].to(torch.int8)), mode
    swapped, _ = dsq(halves, swiglu_mode=2, activate_left=False, quant_scale=torch.tensor([0.5]))
    assert not torch.equal(swapped, y)


def test_g_mode_0_ignores_the_clipping_arguments() -> None:
    x = torch.randn(3, 16).half() * 10
    y, scale = dsq(x, quant_mode=DYNAMIC, clamp_limit=0.5, glu_alpha=3.0, glu_bias=2.0)
    expected_y, expected_scale = dsq(x, quant_mode=DYNAMIC)
    assert torch.equal(y, expected_y)
    assert torch.equal(scale, expected_scale)


# --- shapes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_mode", [0, 1])
@pytest.mark.parametrize("counts", [None, [0, 0]])
def test_h_no_rows(quant_mode: int, counts: list[int] | None) -> None:
    args = dequant(0, 16, len(counts or [0]))
    y, scale = check(**args, counts=counts, quant_mode=quant_mode)
    assert (y.shape, scale.shape) == ((0, 8), (0,))


@pytest.mark.parametrize("counts", [None, [4, 2], [1, 3]])
@pytest.mark.parametrize("leading", [(2, 3), (1, 6, 1), (1, 1, 2, 3)])
def test_i_leading_dimensions_are_rows(counts: list[int] | None, leading: tuple[int, ...]) -> None:
    args = dequant(6, 16, len(counts or [0]))
    flat_y, flat_scale = check(**args, counts=counts, quant_mode=DYNAMIC)
    args["x"] = args["x"].reshape(*leading, 16)
    args["activation_scale"] = args["activation_scale"].reshape(leading)
    y, scale = check(**args, counts=counts, quant_mode=DYNAMIC)
    assert torch.equal(y.reshape(6, 8), flat_y)
    assert torch.equal(scale.reshape(6), flat_scale)


@pytest.mark.parametrize("dim", [0, 1, -2, -3])
@pytest.mark.parametrize("swiglu_mode", [0, 1, 2])
def test_activate_dim_not_last(dim: int, swiglu_mode: int) -> None:
    x = torch.randint(-20000, 20000, (4, 6, 5), dtype=torch.int32)
    weight_scale, activation_scale = (torch.rand(5) + 0.5) / 1000, torch.rand(4, 6) + 0.5
    quant_scale, quant_offset = torch.rand(5) + 0.5, torch.randn(5)
    y, scale = dsq(
        x,
        weight_scale=weight_scale,
        activation_scale=activation_scale,
        quant_scale=quant_scale,
        quant_offset=quant_offset,
        activate_dim=dim,
        activate_left=True,
        swiglu_mode=swiglu_mode,
    )
    shape = [4, 6, 5]
    shape[dim] //= 2
    assert list(y.shape) == shape
    assert torch.equal(scale, torch.zeros(shape[:-1]))
    # The same with the activated dimension moved last, quantized by hand.
    d = (x.double() * weight_scale.double() * activation_scale.double()[..., None]).movedim(dim, -1)
    half = d.shape[-1] // 2
    act, lin = (d[..., 0::2], d[..., 1::2]) if swiglu_mode == 1 else (d[..., :half], d[..., half:])
    if swiglu_mode:
        act, lin = act.clamp(max=7.0), lin.clamp(-7.0, 7.0) + 1
    s = act * (act * (1.702 if swiglu_mode else 1.0)).sigmoid() * lin
    exact = s.movedim(-1, dim) / quant_scale.double() + quant_offset.double()
    assert_rounded(y, exact, 1e-3)


@pytest.mark.parametrize("activate_dim", [None, -1, 2])
def test_activate_dim_last_is_the_default(activate_dim: int | None) -> None:
    x = torch.randn(2, 3, 8).half()
    y, scale = dsq(x, quant_mode=DYNAMIC, activate_dim=activate_dim)
    expected_y, expected_scale = dsq(x, quant_mode=DYNAMIC)
    assert torch.equal(y, expected_y)
    assert torch.equal(scale, expected_scale)


# --- arithmetic ------------------------------------------------------------------------------------------


def test_j_int32_beyond_24_bits_is_rounded_to_fp32_after_the_int32_bias_and_before_the_scales() -> None:
    x = torch.tensor([[2**24 + 1, 60]], dtype=torch.int32)
    ones, bias = torch.ones(2), torch.tensor([-(2**24), 0], dtype=torch.int32)
    exact, _ = dsq(x, weight_scale=ones, bias=bias, quant_scale=torch.tensor([60.0]))
    rounded, _ = dsq(x, weight_scale=ones, bias=bias.float(), quant_scale=torch.tensor([60.0]))
    assert (exact.item(), rounded.item()) == (1, 0)


def test_weight_scale_is_applied_before_the_activation_scale() -> None:
    args = dequant(64, 128)
    _, scale = dsq(**args, quant_mode=DYNAMIC)
    x, weight, token = args["x"].float(), args["weight_scale"], args["activation_scale"][:, None]
    scales = []
    for d in (x * weight * token, x * token * weight):
        lin, act = d.chunk(2, -1)
        scales.append((act / (1 + torch.exp(-act)) * lin).abs().amax(-1) / 127)
    assert torch.equal(scale, scales[0])
    assert not torch.equal(scale, scales[1])


@pytest.mark.parametrize(("dst_type", "dtype"), [(24, torch.float8_e4m3fn), (292, torch.float8_e4m3fn)])
@pytest.mark.parametrize("spelled", ["int", "dtype"])
def test_float8_e4m3fn_dynamic(dst_type: int, dtype: torch.dtype, spelled: str) -> None:
    check_float8(dst_type if spelled == "int" else dtype, dtype, 448.0)


@pytest.mark.parametrize("dst_type", [23, 291, torch.float8_e5m2])
def test_float8_e5m2_dynamic(dst_type: int | torch.dtype) -> None:
    check_float8(dst_type, torch.float8_e5m2, 57344.0)


def check_float8(dst_type: int | torch.dtype, dtype: torch.dtype, largest: float) -> None:
    x = torch.randn(6, 32).half()
    x[2] = 0
    y, scale = dsq(x, quant_mode=DYNAMIC, dst_type=dst_type)
    exact = exact_dsq(x, quant_mode=DYNAMIC, largest=largest)
    assert y.dtype == dtype
    torch.testing.assert_close(scale.double(), exact.scale, rtol=1e-6, atol=0)
    # Correctly rounded, up to what fp32 missed before: rounding is monotone.
    least = (exact.values - exact.value_error).clamp(-largest, largest).to(dtype).float()
    most = (exact.values + exact.value_error).clamp(-largest, largest).to(dtype).float()
    assert ((y.float() >= least) & (y.float() <= most)).all()
    assert y.float().abs().amax(-1)[[0, 1, 3, 4, 5]].eq(largest).all()
    assert y[2].float().eq(0).all()


@pytest.mark.parametrize(("dst_type", "largest"), [(24, 448.0), (23, 57344.0)])
def test_float8_static_saturates_instead_of_becoming_nan_or_infinite(dst_type: int, largest: float) -> None:
    x = torch.tensor([[60.0, -60.0, 1.0, 60.0, 60.0, 60.0]]).half()
    y, _ = dsq(x, quant_scale=torch.tensor([[1e-3, 1e-3, 60.0]]), dst_type=dst_type)
    assert y.float().tolist() == [[largest, -largest, 1.0]]


def test_int8_dst_type_spellings() -> None:
    x = torch.randn(3, 8).half()
    expected, _ = dsq(x, quant_mode=DYNAMIC)
    for dst_type in (1, torch.int8):
        assert torch.equal(dsq(x, quant_mode=DYNAMIC, dst_type=dst_type)[0], expected)


def test_large_negative_activation_gives_zero_and_not_nan() -> None:
    x = torch.tensor([[2.0, 1.0, -1000.0, 5.0]]).half()
    y, _ = dsq(x, quant_mode=DYNAMIC)
    assert y.tolist() == [[0, 127]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_mode", [0, 1])
def test_floating_point_x(dtype: torch.dtype, quant_mode: int) -> None:
    check(torch.randn(5, 32).mul(3).to(dtype), quant_mode=quant_mode)


# --- the chains this operator replaces -------------------------------------------------------------------


def test_l_equals_the_fp32_chain_up_to_ties() -> None:
    args = dequant(128, 256)
    y, scale = dsq(**args, activate_left=True, quant_mode=DYNAMIC)
    d = args["x"].float() * args["weight_scale"] * args["activation_scale"][:, None]
    act, lin = d.chunk(2, -1)
    s = torch.nn.functional.silu(act) * lin
    chain_scale = s.abs().amax(-1) / 127
    chain = torch.round(s / chain_scale[:, None]).to(torch.int8)
    difference = (y.to(torch.int16) - chain).abs()
    assert difference.max() <= 1
    assert difference.ne(0).float().mean() < 1e-3
    torch.testing.assert_close(scale, chain_scale, rtol=1e-6, atol=0)


def test_l_differs_from_the_bf16_chain_within_its_roundings_and_is_closer_to_exact() -> None:
    args = dequant(64, 4096)
    args["x"] = torch.randn(64, 4096).mul(4000).to(torch.int32)
    y, scale = dsq(**args, activate_left=True, quant_mode=DYNAMIC)
    d = args["x"].float() * args["weight_scale"] * args["activation_scale"][:, None]
    s = torch.ops.npu.npu_swiglu(d.bfloat16()).float()
    chain_scale = s.abs().amax(-1) / 127
    chain = torch.round(s / chain_scale[:, None])
    difference = (y.float() - chain).abs()
    assert difference.max() <= 2
    # How many differ depends on how far the largest value of a row is from the others: 1 to 3 percent.
    assert 0 < difference.ne(0).float().mean() < 0.04
    torch.testing.assert_close(scale, chain_scale, rtol=1e-2, atol=0)
    act, lin = d.double().chunk(2, -1)
    exact = act * act.sigmoid() * lin
    fused_error = (y.double() * scale.double()[:, None] - exact).square().mean()
    chain_error = (chain.double() * chain_scale.double()[:, None] - exact).square().mean()
    assert fused_error < chain_error


# --- inputs are only read --------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_mode", [0, 1])
@pytest.mark.parametrize("swiglu_mode", [0, 1, 2])
def test_strided_inputs_are_not_changed(quant_mode: int, swiglu_mode: int) -> None:
    plain: dict[str, Tensor] = dequant(6, 16, 2)
    plain["bias"] = torch.randint(-99, 99, (2, 16), dtype=torch.int32)
    plain["quant_scale"] = torch.rand(2, 8) + 0.5
    plain["group_index"] = torch.tensor([2, 3])
    strided = {
        name: t.T.contiguous().T if t.dim() == 2 else t.repeat_interleave(2)[::2] for name, t in plain.items()
    }
    options = {"quant_mode": quant_mode, "swiglu_mode": swiglu_mode}
    expected = dsq(**plain, **options)
    results = dsq(**strided, **options)
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)
        assert result.is_contiguous()
        result.zero_()
    assert all(torch.equal(strided[name], plain[name]) for name in plain)


@pytest.mark.parametrize("quant_mode", [0, 1])
def test_results_never_alias_the_inputs(quant_mode: int) -> None:
    x = torch.zeros(2, 4).half()
    results = dsq(x, quant_mode=quant_mode)
    pointers = {t.untyped_storage().data_ptr() for t in (x, *results)}
    assert len(pointers) == 3


# --- everything at once ----------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of any valid int8 call along the last dimension, small enough for a Python loop."""
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) + 0.5

    counts = draw(st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=4))
    groups = 1 if counts is None else len(counts)
    rows = sum(counts or [0]) + draw(st.integers(1, 3))
    half = draw(st.integers(1, 9))
    width = 2 * half
    call: dict[str, Any] = {"counts": counts, "activate_left": draw(st.booleans())}
    call["quant_mode"] = draw(st.integers(0, 1))
    call["round_mode"] = draw(st.none() | st.integers(0, 4))
    call["swiglu_mode"] = draw(st.integers(0, 2))
    if draw(st.booleans()):
        call["clamp_limit"], call["glu_alpha"], call["glu_bias"] = 1.5, 0.9, 0.5

    one_row = draw(st.booleans()) and groups == 1

    def per_channel(columns: int) -> tuple[int, ...]:
        return (columns,) if one_row else (groups, columns)

    dtype = draw(st.sampled_from([torch.int32, torch.float16, torch.bfloat16]))
    if dtype == torch.int32:
        call["x"] = torch.randint(-30000, 30000, (rows, width), dtype=dtype, generator=generator)
        call["weight_scale"] = uniform(*per_channel(width)) / 10000
        if draw(st.booleans()):
            call["activation_scale"] = uniform(rows, 1) if draw(st.booleans()) else uniform(rows)
        bias_dtype = draw(st.sampled_from([None, torch.int32, torch.float32, torch.float16, torch.bfloat16]))
        if bias_dtype is not None:
            spread = 5000 if bias_dtype == torch.int32 else 1
            bias = torch.randn(per_channel(width), generator=generator) * spread
            call["bias"] = bias.to(bias_dtype)
    else:
        call["x"] = (torch.randn(rows, width, generator=generator) * 3).to(dtype)
    shapes: list[tuple[int, ...]] = [per_channel(half)]
    if call["quant_mode"] == 0:
        shapes += [(groups,), (groups, 1)]
    shape = draw(st.none() | st.sampled_from(shapes))
    if shape is not None:
        scale_dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        call["quant_scale"] = (uniform(*shape) / 4).to(scale_dtype)
        if call["quant_mode"] == 0 and draw(st.booleans()):
            call["quant_offset"] = (torch.randn(shape, generator=generator) * 10).to(scale_dtype)
    return call


@settings(deadline=None, derandomize=True, max_examples=150)
@given(call=calls())
def test_property_matches_float64(call: dict[str, Any]) -> None:
    exact = exact_dsq(**{name: value for name, value in call.items() if name != "round_mode"})
    # Where scale and bias cancel almost completely, the row is noise in fp32 and nothing can be told.
    assume(bool(exact.value_error.lt(0.25).all()))
    check(**call)
