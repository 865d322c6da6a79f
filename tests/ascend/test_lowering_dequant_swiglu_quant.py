from __future__ import annotations

import dataclasses

import pytest

from tests.ascend._lowering import assert_dynamic, assert_near, lower
from tests.passes._w8a8 import Spelling, described

INT8, INT32 = 2, 3
"""ge.DataType"""
PLAIN = Spelling()
SPELLINGS = [
    PLAIN,
    *(dataclasses.replace(PLAIN, product=p) for p in ("quant_matmul", "mm", "out_dtype")),
    dataclasses.replace(PLAIN, left=False, bias="int32", smooth=True),
    dataclasses.replace(PLAIN, rank=3),
    dataclasses.replace(PLAIN, static="x / vector + vector", left=False),
    dataclasses.replace(PLAIN, static="x * literal", rank=3),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=described)
def test_it_lowers(spelling: Spelling, dynamic: bool) -> None:
    got = lower(spelling.function(), spelling.inputs(), dynamic=dynamic)
    assert got.fused["npu_dequant_swiglu_quant"] == 1
    counts = got.graph.counts
    assert (counts["QuantBatchMatmulV3"], counts["DequantSwigluQuant"]) == (1, 1)
    assert not {"SwiGlu", "Swish", "DynamicQuant", "Quantize", "AscendQuantV2"} & set(counts)
    fused = got.graph.only("DequantSwigluQuant")
    assert fused.attribute("activate_left", False) == spelling.left
    assert fused.attribute("quant_mode", "static") == ("static" if spelling.static else "dynamic")
    assert fused.attribute("dst_type", INT8) == INT8
    assert fused.attribute("activate_dim", -1) == -1
    named = {"weight_scale", "activation_scale", "x"}
    named |= {"bias"} if spelling.bias != "none" else set()
    named |= {"quant_scale"} if spelling.smooth or spelling.static else set()
    named |= {"quant_offset"} if spelling.static else set()
    assert set(fused.inputs) == named
    product = got.graph.source(fused.inputs["x"])
    assert (product.op.type, product.attribute("dtype", None)) == ("QuantBatchMatmulV3", INT32)
    assert_near(got)
    if dynamic:
        assert_dynamic(got, "QuantBatchMatmulV3", "DequantSwigluQuant")
