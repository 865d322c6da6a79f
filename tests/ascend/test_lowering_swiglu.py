from __future__ import annotations

import pytest
import torch

from tests.ascend._lowering import assert_dynamic, assert_near, lower_only
from tests.passes.test_swiglu import spelled, value


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_lowers(dtype: torch.dtype, dynamic: bool) -> None:
    got = lower_only("swiglu", spelled("chunk", "x * sigmoid(x)"), [value(dtype, 3, 5, 32)], dynamic=dynamic)
    assert got.fused == {"npu_swiglu": 1}
    assert got.graph.counts["SwiGlu"] == 1
    assert not {"Sigmoid", "Swish", "Mul", "SplitD", "Split"} & set(got.graph.counts)
    swiglu = got.graph.only("SwiGlu")
    assert swiglu.attribute("dim", -1) == -1
    assert got.graph.source(swiglu.inputs["x"]).op.type == "Data"
    assert_near(got)
    if dynamic:
        assert_dynamic(got, "SwiGlu")
