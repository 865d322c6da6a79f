"""npu_add_rms_norm lowers, and torchair's own patterns go on working on what is left of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ascend._lowering import Lowered, assert_dynamic, assert_near, lower, lower_only
from tests.passes.test_add_rms_norm import data, pre_norm
from tests.passes.test_add_rms_norm_dynamic_quant import data as with_smooth
from tests.passes.test_rms_norm import H

npu = torch.ops.npu


def norm(x: Tensor, g: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    return g * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_lowers(dynamic: bool) -> None:
    got = lower_only("add_rms_norm", pre_norm, data(torch.bfloat16), dynamic=dynamic)
    assert got.fused == {"npu_add_rms_norm": 1}
    assert got.graph.counts["AddRmsNorm"] == 1
    assert not {"Add", "Rsqrt", "ReduceMean", "RmsNorm"} & set(got.graph.counts)
    fused = got.graph.only("AddRmsNorm")
    assert fused.attribute("epsilon", 1e-6) == pytest.approx(1e-6)
    assert list(fused.inputs) == ["x1", "x2", "gamma"]
    assert set(got.graph.only("NetOutput").inputs.values()) == {f"{fused.op.name}:{i}" for i in (0, 2)}
    assert_near(got)
    if dynamic:
        assert_dynamic(got, "AddRmsNorm")


def quantized(epsilon: float, smooth: bool) -> Callable[..., Any]:
    """What torchair's pattern add_rms_norm_dynamic_quant looks for, once the norm is fused."""

    def block(a: Tensor, b: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        total = a + b
        y = norm(total, g, epsilon)
        if smooth:
            return (*npu.npu_dynamic_quant(y, smooth_scales=s), total)
        values, scale = npu.npu_dynamic_quant(y.flatten(0, 1))
        return values, scale.view(-1, 1), total

    return block


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-5])
@pytest.mark.parametrize("smooth", [False, True])
def test_torchair_quantizes_what_is_left(smooth: bool, epsilon: float, dynamic: bool) -> None:
    args = with_smooth(torch.bfloat16)
    for tensor in args:
        torch._dynamo.mark_static(tensor, tensor.dim() - 1)
    got = lower(quantized(epsilon, smooth), args, dynamic=dynamic, add_rms_norm_dynamic_quant=False)
    assert got.fused == {"npu_add_rms_norm": 1}
    union(got, AddRmsNormDynamicQuant=1)
    fused = got.graph.only("AddRmsNormDynamicQuant")
    assert fused.attribute("epsilon", 1e-6) == pytest.approx(epsilon)
    assert ("smooth_scale1" in fused.inputs) == smooth
    assert_near(got)


@pytest.mark.parametrize("smooth", [False, True])
def test_nothing_is_left_for_torchair_with_everything_on(smooth: bool) -> None:
    got = lower(quantized(1e-5, smooth), with_smooth(torch.bfloat16))
    assert got.fused == {"npu_add_rms_norm_dynamic_quant": 1}
    union(got, AddRmsNormDynamicQuant=1)
    assert_near(got)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("viewed", [False, True])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-5])
def test_torchair_adds_a_cast(epsilon: float, viewed: bool, dynamic: bool) -> None:
    def block(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        total = a + b
        y = norm(total, g, epsilon)
        wide = y.view(-1, H).float() if viewed else y.float()
        return y, wide * 2, total

    args = data(torch.bfloat16)
    for tensor in args:
        torch._dynamo.mark_static(tensor, tensor.dim() - 1)
    got = lower(block, args, dynamic=dynamic)
    assert got.fused == {"npu_add_rms_norm": 1}
    union(got, AddRmsNormCast=1)
    assert got.graph.only("AddRmsNormCast").attribute("epsilon", 1e-6) == pytest.approx(epsilon)
    assert_near(got)


def union(got: Lowered, **expected: int) -> None:
    """These norms and quantizations are in the graph, by whomever they were fused, and no others."""
    kinds = ("AddRmsNorm", "AddRmsNormCast", "AddRmsNormDynamicQuant", "RmsNorm", "DynamicQuant")
    assert {k: n for k, n in got.graph.counts.items() if k in kinds} == expected
