"""npu_add_rms_norm_dynamic_quant in Triton against the reference kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.reference.add_rms_norm_dynamic_quant import (
    npu_add_rms_norm_dynamic_quant as reference,
)
from npu_fusion.kernels.triton import add_rms_norm_dynamic_quant as family
from tests.kernels.triton._running import WAYS, assert_agree, only, run, runs

pytestmark = runs
kernel = family.npu_add_rms_norm_dynamic_quant


def arguments(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    g = torch.Generator().manual_seed(width)
    shapes = [(rows, width), (rows, width), (width,)]
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def check(x1: Tensor, x2: Tensor, gamma: Tensor, **call: Any) -> tuple[Tensor, ...]:
    result = run(kernel, x1, x2, gamma, **call)
    # Sums in another order: the norm is the reference's to its last bits.
    assert_agree(result, reference(x1, x2, gamma, **call))
    return result


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 64, 77])
@pytest.mark.parametrize("options", [(), (1,), (1, 2), ("beta",), ("second",)], ids=str)
def test_outputs(
    monkeypatch: pytest.MonkeyPatch, way: str, dtype: torch.dtype, width: int, options: tuple[Any, ...]
) -> None:
    only(monkeypatch, family.KERNEL, way)
    g = torch.Generator().manual_seed(5)
    vectors = [(torch.rand(width, generator=g) + 0.5).to(dtype) for _ in range(3)]
    call: dict[str, Any] = {}
    for number in (1, 2):
        if number in options:
            call[f"smooth_scale{number}"] = vectors[number]
    if "beta" in options:
        call["beta"] = vectors[0]
    if "second" in options:
        call["output_mask"] = [False, True]
    check(*arguments(4, width, dtype), **call)


def test_leading_dimensions_strides_and_no_rows() -> None:
    x1, x2, gamma = arguments(6, 40)
    check(x1.view(2, 3, 40), x2.view(2, 3, 40), gamma)
    check(x1.t().contiguous().t(), x2, gamma)
    check(torch.cat([x1, x1], dim=-1)[:, 1:41], x2, torch.cat([gamma, gamma])[::2])
    check(x1[:0], x2[:0], gamma)


@pytest.mark.parametrize("way", WAYS)
def test_extreme_rows(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    only(monkeypatch, family.KERNEL, way)
    x1, x2, gamma = arguments(5, 50)
    x1[0], x2[0] = 0, 0
    x1[1, 2], x1[2, 40] = float("nan"), float("inf")
    x1[3], x2[3] = 1e18, -3e17
    x1[4], x2[4] = 1e-30, 1e-30
    y1, _, _, scale1, _ = check(x1, x2, gamma)
    assert not y1[0].any() and scale1[0] == 0
    assert scale1[1].isnan() and not y1[1].any()


def test_leaves_int4_to_the_reference_kernel() -> None:
    assert kernel(*arguments(2, 16), y_dtype=16) is NotImplemented
