"""npu_add_rms_norm_quant has no converter to GE: its two parts lower instead."""

from __future__ import annotations

import pytest
import torch

from tests.ascend._lowering import assert_dynamic, assert_near, lower
from tests.passes.test_add_rms_norm_quant import Quantizer, block, data, divided, multiplied


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("quantize", "operator"), [(divided, "Quantize"), (multiplied, "AscendQuantV2")])
def test_two_operators_lower(quantize: Quantizer, operator: str, dynamic: bool) -> None:
    got = lower(block(quantize), data(torch.float16), dynamic=dynamic)
    assert got.fused == {"npu_add_rms_norm": 1, "npu_quantize": 1}
    (reason,) = got.reasons("add_rms_norm_quant")
    assert reason.endswith("torchair has no GE converter for npu.npu_add_rms_norm_quant.default")
    assert (got.graph.counts["AddRmsNorm"], got.graph.counts[operator]) == (1, 1)
    assert_near(got)
    if dynamic:
        assert_dynamic(got, "AddRmsNorm", operator)
