"""npu_swiglu_quant has no converter to GE: SwiGLU and the quantization lower one by one."""

from __future__ import annotations

import pytest
import torch

from tests.ascend._lowering import assert_dynamic, assert_near, lower
from tests.passes.test_swiglu_quant import Chain


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("tail", ["rounded", "operators"])
def test_two_operators_lower(tail: str, dynamic: bool) -> None:
    chain = Chain(tail=tail)
    args = chain.inputs()
    torch._dynamo.mark_static(args[0], 1)  # with a width that could be odd, other reasons come first
    got = lower(chain, args, dynamic=dynamic)
    assert "npu_swiglu_quant" not in got.fused
    (reason,) = got.reasons("swiglu_quant")
    assert reason.endswith("torchair has no GE converter for npu.npu_swiglu_quant.default")
    assert (got.graph.counts["SwiGlu"], got.graph.counts["DynamicQuant"]) == (1, 1)
    assert_near(got)
    if dynamic:
        assert_dynamic(got, "SwiGlu", "DynamicQuant")
