"""npu_quantize lowers to Quantize, which divides, or AscendQuantV2, which multiplies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ascend._lowering import assert_dynamic, assert_near, lower_only
from tests.passes.test_quantize import inputs, spelled

LEADS = [(6,), (2, 3)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("static", ["x / vector", "x / scalar tensor", "x / literal", "x / vector + vector"])
def test_division_lowers(static: str, lead: tuple[int, ...], dynamic: bool) -> None:
    got = lower_only("quantize", spelled(static), inputs(torch.bfloat16, *lead), dynamic=dynamic)
    assert got.fused == {"npu_quantize": 1}
    assert got.graph.counts["Quantize"] == 1
    assert got.graph.counts["AscendQuantV2"] == 0
    fused = got.graph.only("Quantize")
    assert fused.attribute("dtype", None) == "torch.qint8"
    assert fused.attribute("axis", 1) == len(lead)
    assert ("zero_points" in fused.inputs) == ("+" in static)
    assert_near(got)
    if dynamic:
        assert_dynamic(got, "Quantize")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("lead", LEADS)
def test_multiplication_lowers(lead: tuple[int, ...], dynamic: bool) -> None:
    def multiplied(x: Tensor, factor: Tensor) -> Tensor:
        return (x * factor).round().clamp(-128, 127).to(torch.int8)

    x, scale = inputs(torch.bfloat16, *lead)
    got = lower_only("quantize", multiplied, [x, 1 / scale], dynamic=dynamic)
    assert got.fused == {"npu_quantize": 1}
    fused = got.graph.only("AscendQuantV2")
    assert (fused.attribute("axis", -1), fused.attribute("dst_type", 2)) == (-1, 2)
    assert fused.attribute("sqrt_mode", False) is False
    assert_near(got)
    if dynamic:
        assert_dynamic(got, "AscendQuantV2")
