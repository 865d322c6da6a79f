"""npu_dequant_swiglu_quant in Triton against the reference kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.reference.dequant_swiglu_quant import npu_dequant_swiglu_quant as reference
from npu_fusion.kernels.triton import dequant_swiglu_quant as family
from tests.kernels.triton._running import WAYS, assert_agree, only, run, runs

pytestmark = runs
kernel = family.npu_dequant_swiglu_quant


def arguments(rows: int, width: int, seed: int = 0, groups: int = 0) -> dict[str, Any]:
    """An int32 call with every scale, in the sizes that follow from rows, width and groups."""
    g = torch.Generator().manual_seed(seed)
    table = (groups, 2 * width) if groups else (2 * width,)
    a: dict[str, Any] = {
        "x": torch.randint(-4000, 4000, (rows, 2 * width), dtype=torch.int32, generator=g),
        "weight_scale": torch.rand(table, generator=g) * 2e-3,
        "activation_scale": torch.rand(rows, generator=g) + 0.1,
        "quant_mode": 1,
    }
    if groups:
        a["group_index"] = torch.tensor([rows // (2 * groups)] * groups)
    return a


def check(**call: Any) -> tuple[Tensor, Tensor]:
    """The result on the device, after comparing it."""
    result = run(kernel, **call)
    assert_agree(result, reference(**call))
    return result


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("width", [1, 16, 48, 61])
@pytest.mark.parametrize("swiglu_mode", [0, 1, 2])
@pytest.mark.parametrize("activate_left", [False, True])
def test_dynamic(
    monkeypatch: pytest.MonkeyPatch, way: str, width: int, swiglu_mode: int, activate_left: bool
) -> None:
    only(monkeypatch, family.DYNAMIC_KERNEL, way)
    check(**arguments(3, width), swiglu_mode=swiglu_mode, activate_left=activate_left)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [0, 3])
def test_bias_smoothing_and_groups(
    monkeypatch: pytest.MonkeyPatch, way: str, dtype: torch.dtype, groups: int
) -> None:
    only(monkeypatch, family.DYNAMIC_KERNEL, way)
    call = arguments(13, 33, groups=groups)
    call["bias"] = (torch.randn(call["weight_scale"].shape) * (300 if dtype == torch.int32 else 1)).to(dtype)
    call["quant_scale"] = torch.rand((groups, 33) if groups else (33,)) + 0.5
    y, scale = check(**call)
    if groups:
        assert not y[-1].any() and scale[-1] == 0  # a row of no group


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_input(monkeypatch: pytest.MonkeyPatch, way: str, dtype: torch.dtype) -> None:
    only(monkeypatch, family.DYNAMIC_KERNEL, way)
    x = torch.randn(2, 3, 2 * 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    check(x=x, quant_mode=1)
    check(x=x, quant_mode=1, quant_scale=torch.rand(40), activate_left=True)


@pytest.mark.parametrize("round_mode", [None, 0, 1, 2, 3, 4])
@pytest.mark.parametrize("quant_mode", [0, 1])
def test_roundings(round_mode: int | None, quant_mode: int) -> None:
    call = arguments(4, 50) | {"quant_mode": quant_mode, "round_mode": round_mode}
    check(**call, quant_scale=torch.full((50,), 0.05))


def test_roundings_of_exact_halves() -> None:
    # A static scale turns 16-bit inputs, gated by a large one (whose sigmoid is 1), into chosen numbers.
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.25, -0.75, 126.5, 127.5, -127.5, -128.5, 300.0])
    x = torch.cat([values, torch.full((13,), 64.0)])[None].half()
    for round_mode in range(5):
        check(x=x, quant_scale=torch.tensor([64.0]), round_mode=round_mode, quant_mode=0)


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static(groups: int, scalar: bool, offset: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    width = 1 if scalar else 34
    shape = (groups, width) if groups else (width,)
    call = arguments(9, 34, groups=groups) | {"quant_mode": 0}
    call["quant_scale"] = (torch.rand(shape, generator=g) * 0.1 + 0.01).to(dtype)
    if offset:
        call["quant_offset"] = torch.randn(shape, generator=g).to(dtype)
    _, scale = check(**call)
    assert not scale.any()


def test_a_scalar_for_each_group_even_where_there_are_as_many_groups_as_columns() -> None:
    call = arguments(16, 4, groups=4) | {"quant_mode": 0, "quant_scale": torch.tensor([0.1, 0.2, 0.4, 0.8])}
    check(**call)


@pytest.mark.parametrize("way", WAYS)
def test_extreme_rows(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    only(monkeypatch, family.DYNAMIC_KERNEL, way)
    nan, inf = float("nan"), float("inf")
    x = torch.ones(8, 2 * 20, dtype=torch.bfloat16)
    x[0] = 0
    x[1, 3], x[2, 3], x[3, 25] = nan, inf, -inf
    x[4] = 1e-38
    x[5, :20], x[5, 20:] = 1e-30, torch.linspace(-1e-9, 1e-9, 20)
    x[6] = 1e19
    x[7] = -100
    y, scale = check(x=x, quant_mode=1)
    assert not y[0].any() and scale[0] == 0
    assert not y[1].any() and scale[1].isnan()
    extremes = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32).repeat(2, 10)
    check(x=extremes, weight_scale=torch.full((20,), 1e-8), quant_mode=1)
    check(x=extremes, weight_scale=torch.ones(20), bias=torch.full((20,), 9, dtype=torch.int32), quant_mode=1)


def test_strided_unaligned_and_empty_inputs() -> None:
    call = arguments(6, 24)
    wide = torch.zeros(6, 100, dtype=torch.int32)
    wide[:, 1:49] = call["x"]
    check(**call | {"x": wide[:, 1:49]})
    check(**call | {"x": call["x"].t().contiguous().t()})
    check(**call | {"activation_scale": torch.rand(12)[::2]})
    flat = torch.zeros(6 * 48 + 1, dtype=torch.int32)
    flat[1:] = call["x"].flatten()
    check(**call | {"x": flat[1:].view(6, 48)})
    check(**arguments(0, 24))


@pytest.mark.parametrize("width", [9216, 18432])
@pytest.mark.parametrize("choice", [0, -1])
def test_wide_rows_by_the_choices_that_they_have(
    monkeypatch: pytest.MonkeyPatch, width: int, choice: int
) -> None:
    choices = family.DYNAMIC_KERNEL.choices
    monkeypatch.setattr(family.DYNAMIC_KERNEL, "choices", lambda constants: [choices(constants)[choice]])
    check(**arguments(2, width))


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 4),
    width=st.integers(1, 70),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e12]),
)
def test_any_sizes_and_magnitudes(rows: int, width: int, seed: int, scale: float) -> None:
    call = arguments(rows, width, seed)
    check(**call | {"weight_scale": call["weight_scale"] * scale})


@pytest.mark.parametrize(
    "other", [{"dst_type": 24}, {"dst_type": 23}, {"activate_dim": 0, "quant_mode": 0}], ids=str
)
def test_leaves_the_rest_to_the_reference_kernel(other: dict[str, Any]) -> None:
    assert kernel(**arguments(2, 8) | other) is NotImplemented
