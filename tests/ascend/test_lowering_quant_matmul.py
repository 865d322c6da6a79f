from __future__ import annotations

import pytest
import torch

from tests.ascend._lowering import assert_dynamic, assert_near, lower
from tests.passes.test_quant_matmul import Chain
from tests.passes.test_quant_matmul_int8 import Chain as Requantized

GE_DTYPE = {torch.float16: 1, torch.bfloat16: 27}
"""ge.DataType"""


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "chain",
    [
        Chain(),
        Chain(output=torch.float16),
        Chain(bias="before"),
        Chain(bias="after", rank=3),
        Chain(scaled="channel"),
        Chain(product="mm"),
    ],
    ids=lambda c: f"{c.scaled}-{c.product}-{c.output}-{c.bias}",
)
def test_it_lowers(chain: Chain, dynamic: bool) -> None:
    got = lower(chain, chain.inputs(), dynamic=dynamic)
    assert got.fused == {"npu_quant_matmul": 1}
    assert got.graph.counts["QuantBatchMatmulV3"] == 1
    assert not {"MatMul", "BatchMatMul", "Mul", "Add", "Cast"} & set(got.graph.counts)
    fused = got.graph.only("QuantBatchMatmulV3")
    assert fused.attribute("dtype", None) == GE_DTYPE[chain.output]
    assert not fused.attribute("transpose_x1", False) and not fused.attribute("transpose_x2", False)
    assert got.graph.maker(fused.inputs["x2"]).op.type == "Transpose"  # [out, in] as it is stored
    assert ("bias" in fused.inputs) == (chain.bias != "none")
    # float16 needs a scale per token, if only of ones
    token = "token" in chain.scaled or chain.output == torch.float16
    assert ("pertoken_scale" in fused.inputs) == token
    assert_near(got)
    if dynamic:
        assert_dynamic(got, "QuantBatchMatmulV3")


@pytest.mark.parametrize("dynamic", [False, True])
def test_int_mm_that_nothing_takes_lowers_to_its_int32_product(dynamic: bool) -> None:
    """torchair's converter of aten._int_mm raises."""
    q, w, *_ = Chain().inputs()
    got = lower(lambda q, w: torch._int_mm(q, w.t()), [q, w], dynamic=dynamic)
    fused = got.graph.only("QuantBatchMatmulV3")
    assert fused.attribute("dtype", None) == 3
    assert torch.equal(got.result, got.expected)
    if dynamic:
        assert_dynamic(got, "QuantBatchMatmulV3")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("between", [None, torch.bfloat16])
def test_an_int8_result_takes_two_operators(between: torch.dtype | None, dynamic: bool) -> None:
    """GE takes no float32 scale for it: a product, in int32 or 16 bits, and its quantization."""
    chain = Requantized(bias=True, offset="int32", between=between)
    got = lower(chain, chain.inputs(), dynamic=dynamic)
    assert got.fused == {"npu_quant_matmul": 1, "npu_quantize": 1}
    expected = 3 if between is None else GE_DTYPE[between]
    assert got.graph.only("QuantBatchMatmulV3").attribute("dtype", None) == expected
    assert not {"MatMul", "BatchMatMul", "Round", "Rint", "ClipByValue"} & set(got.graph.counts)
    (reason, *_) = [r for r in got.report.refused if r.fusion == "quant_matmul"]
    assert reason.detail == "in graph mode npu_quant_matmul takes no float32 scale for a result in int8"
    assert torch.equal(got.result, got.expected)
    if dynamic:
        assert_dynamic(got, "QuantBatchMatmulV3")
