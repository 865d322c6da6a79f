from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ascend._lowering import assert_dynamic, assert_near, lower_only
from tests.passes.test_dynamic_quant import spelled, value

INT8 = 2
"""ge.DataType.DT_INT8"""


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smooth", [False, True])
def test_it_lowers(smooth: bool, dtype: torch.dtype, dynamic: bool) -> None:
    quantize = spelled()

    def fn(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.float() * s.float() if smooth else x.float()
        return quantize(wide)

    got = lower_only("dynamic_quant", fn, [value(dtype, 4, 32), value(dtype, 32).abs()], dynamic=dynamic)
    assert got.fused == {"npu_dynamic_quant": 1}
    assert got.graph.counts["DynamicQuant"] == 1
    assert not {"Abs", "Round", "RealDiv", "Mul", "Cast"} & set(got.graph.counts)
    fused = got.graph.only("DynamicQuant")
    assert fused.attribute("dst_type", INT8) == INT8
    assert set(fused.inputs) == {"x", "smooth_scales"} if smooth else {"x"}
    assert_near(got)
    if dynamic:
        assert_dynamic(got, "DynamicQuant")
