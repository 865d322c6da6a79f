from __future__ import annotations

import pytest
import torch

from tests.ascend._lowering import assert_dynamic, assert_near, lower
from tests.passes.test_add_rms_norm_dynamic_quant import Quantizer, block, data, plain, smoothed


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("quantize", [plain, smoothed])
def test_it_lowers(quantize: Quantizer, dynamic: bool) -> None:
    got = lower(block(quantize), data(torch.bfloat16), dynamic=dynamic)
    assert got.fused == {"npu_add_rms_norm_dynamic_quant": 1}
    assert got.graph.counts["AddRmsNormDynamicQuant"] == 1
    assert not {"AddRmsNorm", "DynamicQuant", "Round", "ReduceMax", "Add"} & set(got.graph.counts)
    fused = got.graph.only("AddRmsNormDynamicQuant")
    assert fused.attribute("epsilon", 1e-6) == pytest.approx(1e-6)
    assert fused.attribute("output_mask", []) == [True, False]
    assert ("smooth_scale1" in fused.inputs) == (quantize is smoothed)
    assert "smooth_scale2" not in fused.inputs
    results = [got.graph.source(v) for v in got.graph.only("NetOutput").inputs.values()]
    assert {op.op.name for op in results} == {fused.op.name}
    assert_near(got)
    if dynamic:
        assert_dynamic(got, "AddRmsNormDynamicQuant")
