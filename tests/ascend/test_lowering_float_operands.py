"""Products and convolutions of 8-bit and 4-bit floats, as deployed layers call them, lowered for Ascend 950.

Each call is run from the GE graph, before and after torchair's own passes over it, and beside the FX graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch_npu
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses import FakeTensorMode

from npu_fusion import formats
from npu_fusion.config import fusion_flags
from npu_fusion.hosts._ge_limits import why_not
from npu_fusion.kernels.reference._quant import pack_quant_param
from tests.ascend._lowering import Lowered, lower

npu = torch.ops.npu
M, K, N = 4, 128, 16
BF16, HIFLOAT8, E8M0, E2M1, E1M2 = 15, 290, 293, 296, 297
MX = {"pertoken_scale_dtype": E8M0, "scale_dtype": E8M0, "group_sizes": [1, 1, 32], "output_dtype": BF16}
TWO_LEVEL = {"x2_dtype": E2M1, "group_sizes": [0, 0, 32], "output_dtype": BF16}


@pytest.fixture(autouse=True)
def _ascend_950() -> Iterator[None]:
    torch.manual_seed(0)
    with mock.patch.object(torch_npu.npu, "get_device_name", return_value="Ascend950PR_9599"):
        yield


def e4m3(*shape: int) -> Tensor:
    return formats.encode(torch.randn(shape), "float8_e4m3fn")


def hif8(*shape: int) -> Tensor:
    return formats.encode(torch.randn(shape), "hifloat8")


def codes(*shape: int) -> Tensor:
    return torch.randint(120, 130, shape, dtype=torch.uint8)


def eights(*shape: int) -> Tensor:
    """Eight numbers of 4 bits in an int32."""
    return torch.randint(0, 2**31 - 1, shape, dtype=torch.int32)


def halves(*shape: int) -> Tensor:
    return torch.randn(shape).half()


def untouched(fn: Callable[..., Any], *args: Any, **options: Any) -> Lowered:
    flags: dict[str, Any] = dict.fromkeys(fusion_flags(), False)
    return lower(fn, args, **flags, **options)


def float8(x: Tensor, w: Tensor, scale: Tensor, token: Tensor, bias: Tensor) -> Tensor:
    return npu.npu_quant_matmul(x, w.t(), scale, pertoken_scale=token, bias=bias, output_dtype=BF16)


def float8_packed(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return npu.npu_quant_matmul(x, w.t(), scale, bias=bias, output_dtype=BF16)


def hifloat8(x: Tensor, w: Tensor, scale: Tensor, token: Tensor) -> Tensor:
    numbers = {"x1_dtype": HIFLOAT8, "x2_dtype": HIFLOAT8}
    return npu.npu_quant_matmul(x, w.t(), scale, pertoken_scale=token, output_dtype=BF16, **numbers)


def microscaled(x: Tensor, w: Tensor, scale: Tensor, token: Tensor) -> Tensor:
    return npu.npu_quant_matmul(x, w.t(), scale.transpose(0, 1), pertoken_scale=token, **MX)


def microscaled_float4(x: Tensor, w: Tensor, scale: Tensor, token: Tensor) -> Tensor:
    return npu.npu_quant_matmul(x, w.t(), scale.transpose(0, 1), pertoken_scale=token, x2_dtype=E2M1, **MX)


def two_levels(x: Tensor, w: Tensor, scale: Tensor, outer: Tensor) -> Tensor:
    return npu.npu_quant_matmul(x, w.t(), scale, y_scale=outer, **TWO_LEVEL)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("product", "args", "group_size"),
    [
        (float8, [e4m3(M, K), e4m3(N, K), torch.rand(N), torch.rand(M), torch.rand(N)], 0),
        (float8, [e4m3(M, K), e4m3(N, K), torch.rand(N), torch.rand(1), torch.rand(N)], 0),
        (float8_packed, [e4m3(M, K), e4m3(N, K), pack_quant_param(torch.rand(N)), torch.rand(N)], 0),
        (hifloat8, [hif8(M, K), hif8(N, K), torch.rand(N), torch.rand(1)], 0),
        (microscaled, [e4m3(M, K), e4m3(N, K), codes(N, 2, 2), codes(M, 2, 2)], (1 << 32) + (1 << 16) + 32),
        (microscaled_float4, [e4m3(M, K), codes(N, K // 2), codes(N, 2, 2), codes(M, 2, 2)], 32),
        (
            two_levels,
            [
                e4m3(M, K),
                codes(N, K // 2),
                torch.rand(N, K // 32).bfloat16(),
                pack_quant_param(torch.rand(1, N)),
            ],
            32,
        ),
    ],
)
def test_products(product: Callable[..., Any], args: list[Tensor], group_size: int, dynamic: bool) -> None:
    got = untouched(product, *args, dynamic=dynamic)
    assert got.graph.only("QuantBatchMatmulV4").attribute("group_size", 0) == group_size
    assert torch.equal(got.result, got.expected)
    (call,) = got.fx_graph.find_nodes(op="call_function", target=npu.npu_quant_matmul.default)
    assert why_not(call.target, call.args, call.kwargs) is None


def weight_float8(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    return npu.npu_weight_quant_batchmatmul(x, w.t(), scale, bias=scale)


def weight_hifloat8(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    return npu.npu_weight_quant_batchmatmul(x, w.t(), scale, weight_dtype=HIFLOAT8)


def weight_float4(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    return npu.npu_weight_quant_batchmatmul(x, w.view(torch.float32), scale, antiquant_group_size=32)


def weight_float4_transposed(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    weight, scale = w.view(torch.float32).t(), scale.t()
    return npu.npu_weight_quant_batchmatmul(x, weight, scale, antiquant_group_size=32)


@pytest.mark.parametrize(
    ("product", "args"),
    [
        (weight_float8, [halves(M, K), e4m3(N, K), halves(N)]),
        (weight_hifloat8, [halves(M, K), hif8(N, K), halves(N)]),
        (weight_float4, [halves(M, K), eights(K, N // 8), halves(K // 32, N)]),
        (weight_float4, [halves(M, K), eights(K, N // 8), codes(K // 32, N)]),
        (weight_float4_transposed, [halves(M, K), eights(N, K // 8), codes(N, K // 32)]),
    ],
)
def test_weight_only_products(product: Callable[..., Any], args: list[Tensor]) -> None:
    got = untouched(product, *args)
    assert got.graph.counts["WeightQuantBatchMatmulV2"] == 1
    assert torch.equal(got.result, got.expected)
    (call,) = got.fx_graph.find_nodes(op="call_function", target=npu.npu_weight_quant_batchmatmul.default)
    assert why_not(call.target, call.args, call.kwargs) is None


@pytest.mark.parametrize("of", [e4m3, hif8])
def test_convolutions(of: Callable[..., Tensor]) -> None:
    numbers = {"input_dtype": HIFLOAT8, "weight_dtype": HIFLOAT8} if of is hif8 else {}

    def convolved(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        attributes = [2, 1], [1, 0], [1, 2], 2
        return npu.npu_quant_conv2d(x, w, scale, *attributes, output_dtype=BF16, bias=bias, **numbers)

    args = [of(1, 4, 9, 8), of(6, 2, 3, 3), pack_quant_param(torch.rand(6)), torch.rand(6)]
    got = untouched(convolved, *args)
    found = got.graph.only("QuantConv2D")
    assert found.attribute("pads", None) == [1, 1, 0, 0]
    assert torch.equal(got.result, got.expected)
    (call,) = got.fx_graph.find_nodes(op="call_function", target=npu.npu_quant_conv2d.default)
    # Torch gives all of them by position: the converter has other names for some.
    assert why_not(call.target, call.args, call.kwargs) is None
    reason = "torchair's GE converter of npu.npu_quant_conv2d.default has no argument 'input_dtype'"
    assert why_not(call.target, call.args[:3], {"input_dtype": HIFLOAT8}) == reason


def node(*shape: int, dtype: torch.dtype) -> fx.Node:
    with FakeTensorMode():
        value = torch.empty(shape, dtype=dtype)
    made = fx.Graph().placeholder("x")
    made.meta["val"] = value
    return made


X, W = node(M, K, dtype=torch.float8_e4m3fn), node(K, N, dtype=torch.float8_e4m3fn)
SCALE, TOKEN = node(N, dtype=torch.float32), node(M, dtype=torch.float32)


def test_products_of_floats_are_for_ascend_950() -> None:
    call = (X, W, SCALE), {"pertoken_scale": TOKEN, "output_dtype": BF16}
    assert why_not(npu.npu_quant_matmul.default, *call) is None
    with mock.patch.object(torch_npu.npu, "get_device_name", return_value="Ascend910B1"):
        reason = "torchair lowers npu_quant_matmul of 8-bit and 4-bit floats for Ascend 950 only"
        assert why_not(npu.npu_quant_matmul.default, *call) == reason
        args = [e4m3(M, K), e4m3(N, K), torch.rand(N), torch.rand(M), torch.rand(N)]
        with pytest.raises(BackendCompilerFailed, match="only supports int8 or int32"):
            untouched(float8, *args)


@pytest.mark.parametrize("output", [5, 6, BF16])
def test_a_float32_scale_is_taken_beside_one_for_rows(output: int) -> None:
    reason = "in graph mode npu_quant_matmul takes no float32 scale of 8-bit floats without one per token"
    assert why_not(npu.npu_quant_matmul.default, (X, W, SCALE), {"output_dtype": output}) == reason
    packed = node(N, dtype=torch.int64)
    assert why_not(npu.npu_quant_matmul.default, (X, W, packed), {"output_dtype": output}) is None


def test_microscaled_float4_of_few_rows() -> None:
    for inner, reason in (
        (64, "torchair lowers npu_quant_matmul of microscaled float4 for more than 64 rows only"),
        (72, None),
    ):
        x, w = node(M, inner, dtype=torch.float8_e4m3fn), node(inner // 2, N, dtype=torch.uint8)
        rows = node(M, 1, 2, dtype=torch.uint8)
        call = {**MX, "x2_dtype": E2M1, "pertoken_scale": rows}
        assert why_not(npu.npu_quant_matmul.default, (x, w, rows), call) == reason
        call = {**TWO_LEVEL, "y_scale": rows}
        assert why_not(npu.npu_quant_matmul.default, (x, w, node(N, 2, dtype=torch.bfloat16)), call) is None
    args = [e4m3(M, 64), codes(N, 32), codes(N, 1, 2), codes(M, 1, 2)]
    with pytest.raises(BackendCompilerFailed, match="does not support k<=64 in graph mode"):
        untouched(microscaled_float4, *args)


@pytest.mark.parametrize("number", [E2M1, E1M2])
def test_a_weight_of_float4_in_bytes_gets_a_wrong_shape(number: int) -> None:
    def product(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        call = {"antiquant_group_size": 32, "weight_dtype": number}
        return npu.npu_weight_quant_batchmatmul(x, w, scale, **call)

    reason = "torchair gives a weight of 4-bit floats in uint8 a wrong shape"
    operands = X, node(K, N // 2, dtype=torch.uint8), SCALE
    assert why_not(npu.npu_weight_quant_batchmatmul.default, operands, {"weight_dtype": number}) == reason
    with pytest.raises(ValueError, match="weight has 3 dimensions"):  # of the GE graph
        untouched(product, halves(M, K), codes(K, N // 2), halves(K // 32, N))
