"""npu_swiglu_quant in Triton against the reference kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.reference.swiglu_quant import npu_swiglu_quant as reference
from npu_fusion.kernels.triton import swiglu_quant as family
from tests.kernels.triton._running import WAYS, assert_agree, only, run, runs

pytestmark = runs
kernel = family.npu_swiglu_quant
FLOATS = [torch.float16, torch.bfloat16, torch.float32]


def check(**call: Any) -> tuple[Tensor, Tensor]:
    result = run(kernel, **call)
    assert_agree(result, reference(**call))
    return result


def halves(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 32, 45])
@pytest.mark.parametrize("activate_left", [False, True])
def test_dynamic(
    monkeypatch: pytest.MonkeyPatch, way: str, dtype: torch.dtype, width: int, activate_left: bool
) -> None:
    only(monkeypatch, family.DYNAMIC_KERNEL, way)
    check(x=halves(3, width, dtype), quant_mode=1, activate_left=activate_left)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("quant_mode", [0, 1])
@pytest.mark.parametrize("group_list_type", [0, 1])
@pytest.mark.parametrize("scalar", [False, True])
def test_groups(
    monkeypatch: pytest.MonkeyPatch, way: str, quant_mode: int, group_list_type: int, scalar: bool
) -> None:
    only(monkeypatch, family.DYNAMIC_KERNEL, way)
    g = torch.Generator().manual_seed(3)
    shape = (3,) if scalar else (3, 20)
    groups = torch.tensor([2, 2, 5] if group_list_type == 0 else [2, 0, 3], dtype=torch.int32)
    check(
        x=halves(7, 20),
        smooth_scales=torch.rand(shape, generator=g) * 30,
        offsets=torch.randn(shape, generator=g),
        group_index=groups,
        quant_mode=quant_mode,
        group_list_type=group_list_type,
    )


def test_static_without_scales_gives_no_scale() -> None:
    _, scale = check(x=halves(2, 20) * 10)
    assert not scale.any()


@pytest.mark.parametrize("way", WAYS)
def test_extreme_rows(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    only(monkeypatch, family.DYNAMIC_KERNEL, way)
    x = torch.ones(6, 2 * 20)
    x[0] = 0
    x[1, 3], x[2, 3], x[3, 25] = float("nan"), float("inf"), -float("inf")
    x[4], x[5] = 1e-22, 1e18
    y, scale = check(x=x, quant_mode=1)
    assert not y[0].any() and scale[0].isinf()
    assert scale[1].isnan()


def test_strided_and_empty_inputs() -> None:
    x = halves(5, 24)
    check(x=x.t().contiguous().t(), quant_mode=1)
    check(x=torch.cat([x, x], dim=-1)[:, 1:49], quant_mode=1)
    check(x=x[:0], quant_mode=1)


def test_leaves_int4_to_the_reference_kernel() -> None:
    assert kernel(halves(1, 8), quant_mode=1, dst_type=torch.quint4x2) is NotImplemented
