"""npu_dynamic_quant in Triton against the reference kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.reference.dynamic_quant import npu_dynamic_quant as reference
from npu_fusion.kernels.triton import dynamic_quant as family
from tests.kernels.triton._running import WAYS, assert_agree, only, run, runs

pytestmark = runs
kernel = family.npu_dynamic_quant
FLOATS = [torch.float16, torch.bfloat16, torch.float32]


def check(input: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    result = run(kernel, input, **call)
    assert_agree(result, reference(input, **call))
    return result


def rows(count: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(width)).to(dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 64, 77])
def test_tokens(monkeypatch: pytest.MonkeyPatch, way: str, dtype: torch.dtype, width: int) -> None:
    only(monkeypatch, family.KERNEL, way)
    x = rows(6, width, dtype)
    check(x)
    check(x.view(2, 3, width))
    check(x, smooth_scales=(torch.rand(width) + 0.5).to(dtype))


@pytest.mark.parametrize("way", WAYS)
def test_groups_of_tokens(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    only(monkeypatch, family.KERNEL, way)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    check(rows(7, 40), smooth_scales=torch.rand(3, 40) + 0.5, group_index=ends)


@pytest.mark.parametrize("way", WAYS)
def test_extreme_rows(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    only(monkeypatch, family.KERNEL, way)
    x = torch.ones(8, 50)
    x[0] = 0
    x[1, 3], x[2, 30] = float("nan"), -float("inf")
    x[3], x[4], x[5] = 3e38, 1e-44, 1e-38
    x[6] = torch.linspace(-3e-37, 3e-37, 50)
    x[7] = torch.linspace(-3e38, 3e38, 50)
    y, scale = check(x)
    assert not y[0].any() and scale[0] == 0
    assert not y[1].any() and scale[1].isnan()
    assert not y[2].any() and scale[2].isinf()
    assert y[5].eq(127).all()


def test_strided_unaligned_and_empty_inputs() -> None:
    x = rows(6, 40)
    check(x.t().contiguous().t())
    check(x[:, 1:34])
    check(x.flatten()[1:-39].view(5, 40))
    check(x[:0])
    check(x[:, :0])


@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 4), width=st.integers(1, 90), exponent=st.integers(-120, 120))
def test_any_sizes_and_magnitudes(count: int, width: int, exponent: int) -> None:
    check(rows(count, width, torch.float32) * 2.0**exponent)


@pytest.mark.parametrize(
    "other",
    [
        {"dst_type": 16},
        {"dst_type": 24},
        {"dst_type": 290, "dst_type_max": 15.0},
        {"quant_mode": "perchannel"},
        {"quant_mode": "pertensor"},
    ],
)
def test_leaves_the_rest_to_the_reference_kernel(other: dict[str, Any]) -> None:
    assert kernel(rows(2, 8), **other) is NotImplemented
