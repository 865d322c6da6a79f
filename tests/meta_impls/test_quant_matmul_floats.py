from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion import _compat
from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_quant_matmul"
OP = torch.ops.npu.npu_quant_matmul
FP16, FP32, BF16 = 5, 6, 15
HIFLOAT8, E8M0, FLOAT4 = 290, 293, 296
DTYPE = {FP16: torch.float16, FP32: torch.float32, BF16: torch.bfloat16}
M, K, N = 3, 96, 8
PAIRS = 2  # of blocks of 32; the last is not used

HIF = {"x1_dtype": HIFLOAT8, "x2_dtype": HIFLOAT8}
MX = {"pertoken_scale_dtype": E8M0, "scale_dtype": E8M0, "group_sizes": [1, 1, 32]}


def e4m3(*shape: int) -> Tensor:
    return torch.ones(shape).to(torch.float8_e4m3fn)


def u8(*shape: int) -> Tensor:
    return torch.full(shape, 127, dtype=torch.uint8)


X1, X2, SCALE, ROWS = e4m3(M, K), e4m3(N, K).t(), torch.ones(N), torch.ones(M)
CODES = u8(M, K), u8(N, K).t()
PACKED, X2_FLOAT4 = torch.ones(N, dtype=torch.int64), u8(N, K // 2).t()
BLOCKS1, BLOCKS2 = u8(M, PAIRS, 2), u8(N, PAIRS, 2).transpose(0, 1)
MX_CALL: dict[str, Any] = {"pertoken_scale": BLOCKS1, "output_dtype": BF16, **MX}
FLOAT4_CALL: dict[str, Any] = {**MX_CALL, "x2_dtype": FLOAT4}
TWO_LEVEL: dict[str, Any] = {
    "x2_dtype": FLOAT4,
    "group_sizes": [0, 0, 32],
    "output_dtype": BF16,
    "y_scale": PACKED[None],
}
GROUPS = torch.ones(N, K // 32).bfloat16()


@pytest.mark.parametrize("output", [FP16, FP32, BF16])
@pytest.mark.parametrize("hifloat8", [False, True])
def test_8_bit_floats(output: int, hifloat8: bool) -> None:
    x1, x2 = CODES if hifloat8 else (X1, X2)
    y = check_operator(NAME, x1, x2, SCALE, output_dtype=output, **(HIF if hifloat8 else {}))
    assert (y.shape, y.dtype) == ((M, N), DTYPE[output])


@pytest.mark.parametrize(
    ("x1_shape", "x2_shape", "shape"),
    [
        ((2, 3, 8), (8, 4), (2, 3, 4)),
        ((2, 1, 3, 8), (5, 8, 4), (2, 5, 3, 4)),
        ((0, 8), (8, 4), (0, 4)),
    ],
)
def test_batches(x1_shape: tuple[int, ...], x2_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    y = check_operator(NAME, e4m3(*x1_shape), e4m3(*x2_shape), torch.ones(4), output_dtype=FP16)
    assert y.shape == shape


@pytest.mark.parametrize(
    ("scale", "rows", "bias"),
    [
        (SCALE, ROWS, SCALE),
        (SCALE, ROWS[:1], None),
        (SCALE[:1], ROWS, None),
        (SCALE[:1], None, SCALE),
        (PACKED, None, SCALE),
        (PACKED[:1], None, None),
    ],
)
def test_scales_of_8_bit_floats(scale: Tensor, rows: Tensor | None, bias: Tensor | None) -> None:
    check_operator(NAME, X1, X2, scale, pertoken_scale=rows, bias=bias, output_dtype=BF16)


def test_batched_bias() -> None:
    check_operator(NAME, e4m3(2, M, K), X2, SCALE, bias=torch.ones(2, 1, N), output_dtype=FP16)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("inner", "output"), [(32, FP16), (64, FP32), (80, BF16), (96, BF16)])
def test_microscaled(output: int, inner: int, transposed: bool) -> None:
    pairs = (inner + 63) // 64
    x2 = e4m3(N, inner).t() if transposed else e4m3(inner, N)
    scale = u8(N, pairs, 2).transpose(0, 1) if transposed else u8(pairs, N, 2)
    arguments = {**MX, "pertoken_scale": u8(M, pairs, 2), "bias": SCALE, "output_dtype": output}
    y = check_operator(NAME, e4m3(M, inner), x2, scale, **arguments)
    assert (y.shape, y.dtype) == ((M, N), DTYPE[output])


def test_microscaled_batches() -> None:
    x2, scale = e4m3(2, N, K).mT, u8(2, N, PAIRS, 2).transpose(1, 2)
    y = check_operator(
        NAME, e4m3(5, 1, M, K), x2, scale, **{**MX_CALL, "pertoken_scale": u8(5, 1, M, PAIRS, 2)}
    )
    assert y.shape == (5, 2, M, N)


def test_scales_of_their_own_dtype() -> None:
    if _compat.E8M0 is None:
        pytest.skip("torch has no float8_e8m0fnu")
    dtype = _compat.E8M0
    rows, columns = BLOCKS1.view(dtype), u8(N, PAIRS, 2).view(dtype).transpose(0, 1)
    check_operator(NAME, X1, X2, columns, **{**MX_CALL, "pertoken_scale": rows})


@pytest.mark.parametrize("output", [FP16, BF16])
@pytest.mark.parametrize("sizes", [[1, 1, 32], [0, 0, 32]])
def test_microscaled_float4(output: int, sizes: list[int]) -> None:
    arguments = {**FLOAT4_CALL, "output_dtype": output, "group_sizes": sizes}
    y = check_operator(NAME, X1, X2_FLOAT4, BLOCKS2, bias=torch.ones(1, N).to(DTYPE[output]), **arguments)
    assert (y.shape, y.dtype) == ((M, N), DTYPE[output])


@pytest.mark.parametrize("output", [FP16, BF16])
@pytest.mark.parametrize("sizes", [[1, 1, 32], [0, 0, 32]])
def test_two_levels(output: int, sizes: list[int]) -> None:
    arguments = {**TWO_LEVEL, "output_dtype": output, "group_sizes": sizes}
    y = check_operator(NAME, X1, X2_FLOAT4, GROUPS.to(DTYPE[output]), **arguments)
    assert (y.shape, y.dtype) == ((M, N), DTYPE[output])


def test_dynamic_rows_in_one_graph() -> None:
    compile_dynamic(
        lambda x1, rows: OP(x1, X2, SCALE, pertoken_scale=rows, output_dtype=BF16),
        lambda t: [e4m3(t, K), torch.rand(t)],
        [2, 7, 3],
        dynamic=[(0, 0), (1, 0)],
    )
    compile_dynamic(
        lambda x1, rows: OP(x1, X2, BLOCKS2, **{**MX_CALL, "pertoken_scale": rows}),
        lambda t: [e4m3(t, K), u8(t, PAIRS, 2)],
        [2, 7, 3],
        dynamic=[(0, 0), (1, 0)],
    )
    compile_dynamic(lambda x1: OP(x1, X2_FLOAT4, GROUPS, **TWO_LEVEL), lambda t: [e4m3(t, K)], [2, 7, 3])


def test_refuses_operands() -> None:
    accepted = r"accepted: int8, float8_e4m3fn, or uint8 with x1_dtype 290 \(hifloat8\)"
    check_refused(NAME, f"x1 has dtype float8_e5m2; {accepted}", X1.to(torch.float8_e5m2), X2, SCALE)
    check_refused(NAME, f"x1 has dtype float16; {accepted}", X1.half(), X2, SCALE)
    check_refused(NAME, "x1_dtype is None; accepted: 290", *CODES, SCALE)
    check_refused(NAME, "x1_dtype is 296; accepted: 290", *CODES, SCALE, x1_dtype=FLOAT4, x2_dtype=FLOAT4)
    check_refused(NAME, "x1_dtype is 292; accepted: None for float8_e4m3fn", X1, X2, SCALE, x1_dtype=292)
    check_refused(NAME, "x2_dtype is 292; accepted: None for float8_e4m3fn", X1, X2, SCALE, x2_dtype=292)
    check_refused(NAME, "x2 has dtype int8; accepted: float8_e4m3fn, or uint8", X1, X2.to(torch.int8), SCALE)
    check_refused(NAME, "x2 has dtype float8_e4m3fn; accepted: int8", X1.to(torch.int8), X2, SCALE)
    check_refused(NAME, "x2 has dtype float8_e4m3fn; accepted: uint8", CODES[0], X2, SCALE, **HIF)
    check_refused(
        NAME, r"x2_dtype is 296; accepted: 290 \(hifloat8\)", *CODES, SCALE, **{**HIF, "x2_dtype": FLOAT4}
    )
    check_refused(
        NAME, r"x2_dtype is 290; accepted: 296 \(float4_e2m1\)", X1, X2_FLOAT4, SCALE, x2_dtype=HIFLOAT8
    )
    check_refused(NAME, r"x2_dtype is 297; accepted: 296", X1, X2_FLOAT4, SCALE, x2_dtype=297)
    check_refused(NAME, "x1 has 1 dimensions; accepted: 2 to 6", X1[0], X2, SCALE, output_dtype=BF16)
    check_refused(NAME, "x1 has 96 columns, x2 95 rows", X1, X2[:95], SCALE, output_dtype=BF16)
    check_refused(NAME, "batches of x1 and x2", e4m3(2, M, K), e4m3(3, K, N), SCALE, output_dtype=BF16)


@pytest.mark.parametrize("output", [None, 1, 3, 24, HIFLOAT8])
def test_refuses_results(output: int | None) -> None:
    message = r"output_dtype is .*; accepted: 5 \(float16\), 6 \(float32\), 15 \(bfloat16\)"
    check_refused(NAME, message, X1, X2, SCALE, output_dtype=output)
    check_refused(NAME, message, X1, X2, BLOCKS2, **{**MX_CALL, "output_dtype": output})


def test_refuses_float32_with_float4() -> None:
    message = r"output_dtype is 6; accepted: 5 \(float16\), 15 \(bfloat16\)"
    check_refused(NAME, message, X1, X2_FLOAT4, BLOCKS2, **{**FLOAT4_CALL, "output_dtype": FP32})
    check_refused(NAME, message, X1, X2_FLOAT4, GROUPS.float(), **{**TWO_LEVEL, "output_dtype": FP32})


@pytest.mark.parametrize(
    "kwargs",
    [{"offset": SCALE}, {"group_sizes": [1, 128, 128]}, {"y_scale": PACKED[None]}],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_refuses_what_8_bit_floats_have_no_use_for(kwargs: dict[str, Any]) -> None:
    message = f"{next(iter(kwargs))} is given; accepted: None with 8-bit floats"
    check_refused(NAME, message, X1, X2, SCALE, output_dtype=BF16, **kwargs)


def test_refuses_scales_of_8_bit_floats() -> None:
    def refused(message: str, scale: Tensor = SCALE, **arguments: Any) -> None:
        check_refused(NAME, message, X1, X2, scale, output_dtype=BF16, **arguments)

    refused("scale has dtype bfloat16; accepted: float32, int64", SCALE.bfloat16())
    refused("pertoken_scale is given; accepted: None with an int64 scale", PACKED, pertoken_scale=ROWS)
    refused(r"scale has shape \[1, 8\]; accepted: \[8\]", SCALE[None])
    refused(r"scale has shape \[7\]; accepted: \[8\]", SCALE[:7])
    refused("pertoken_scale has dtype bfloat16; accepted: float32", pertoken_scale=ROWS.bfloat16())
    refused(r"pertoken_scale has shape \[2\]; accepted: \[3\]", pertoken_scale=ROWS[:2])
    refused(r"pertoken_scale has shape \[3, 1\]; accepted: \[3\]", pertoken_scale=ROWS[:, None])
    refused("bias has dtype int32; accepted: float32", bias=SCALE.int())
    refused("bias has dtype bfloat16; accepted: float32", bias=SCALE.bfloat16())
    refused(r"bias has shape \[1, 8\]; accepted: \[8\]", bias=SCALE[None])


def test_refuses_microscaled_calls() -> None:
    def refused(message: str, scale: Tensor = BLOCKS2, **changes: Any) -> None:
        check_refused(NAME, message, X1, X2, scale, **{**MX_CALL, **changes})

    refused("scale_dtype is None; accepted: 293", scale_dtype=None)
    refused("pertoken_scale_dtype is 44; accepted: 293", pertoken_scale_dtype=44)
    refused("pertoken_scale is None; accepted: a tensor", pertoken_scale=None)
    refused("group_sizes is None; accepted: .1, 1, 32", group_sizes=None)
    refused("group_sizes is .0, 0, 32.; accepted: .1, 1, 32", group_sizes=[0, 0, 32])
    refused("offset is given", offset=SCALE)
    refused("y_scale is given", y_scale=PACKED[None])
    refused("bias has dtype bfloat16; accepted: float32", bias=SCALE.bfloat16())
    refused(r"bias has shape \[1, 8\]; accepted: \[8\]", bias=SCALE[None])
    refused("scale has dtype float32; accepted: uint8, float8_e8m0fnu", BLOCKS2.float())
    refused("pertoken_scale has dtype int8; accepted: uint8", pertoken_scale=BLOCKS1.to(torch.int8))
    refused(r"pertoken_scale has shape \[3, 3\]; accepted: \[3, 2, 2\]", pertoken_scale=u8(M, 3))
    refused(r"pertoken_scale has shape \[3, 1, 2\]; accepted: \[3, 2, 2\]", pertoken_scale=BLOCKS1[:, :1])
    refused(r"scale has shape \[8, 2, 2\]; accepted: \[2, 8, 2\]", BLOCKS2.transpose(0, 1))


def test_refuses_scales_in_another_order_than_the_operand() -> None:
    contiguous = BLOCKS2.contiguous()
    message = "scale is not transposed in memory; accepted: transposed, as x2 is"
    check_refused(NAME, message, X1, X2, contiguous, **MX_CALL)
    message = "scale is transposed in memory; accepted: not transposed, as x2 is"
    check_refused(NAME, message, X1, X2.contiguous(), BLOCKS2, **MX_CALL)
    message = "pertoken_scale is not transposed in memory; accepted: transposed, as x1 is"
    check_refused(NAME, message, X1.t().contiguous().t(), X2, BLOCKS2, **MX_CALL)
    # Where both sizes are 1 there is no order.
    one = {**MX_CALL, "pertoken_scale": u8(1, 1, 2)}
    check_operator(NAME, e4m3(1, 32), e4m3(1, 32).t(), u8(1, 1, 2), **one)


def test_refuses_microscaled_float4() -> None:
    def refused(message: str, x2: Tensor = X2_FLOAT4, x1: Tensor = X1, **changes: Any) -> None:
        check_refused(NAME, message, x1, x2, BLOCKS2, **{**FLOAT4_CALL, **changes})

    refused("float4_e2m1 with strides .* accepted: the transpose of a contiguous", X2_FLOAT4.contiguous())
    refused("x1 has 3 dimensions; accepted: 2", x1=X1[None])
    refused("x1 has 92 columns; accepted: a multiple of 8", u8(N, 46).t(), e4m3(M, 92))
    refused("x1 has 96 columns, x2 80 rows", u8(N, 40).t())
    refused("group_sizes is .1, 1, 64", group_sizes=[1, 1, 64])
    refused("bias has dtype float32; accepted: bfloat16", bias=SCALE[None])
    refused(r"bias has shape \[8\]; accepted: \[1, 8\]", bias=SCALE.bfloat16())
    refused("y_scale is given", y_scale=PACKED[None])


def test_refuses_two_levels() -> None:
    def refused(message: str, scale: Tensor = GROUPS, **changes: Any) -> None:
        check_refused(NAME, message, X1, X2_FLOAT4, scale, **{**TWO_LEVEL, **changes})

    refused("scale has dtype float16; accepted: bfloat16", GROUPS.half())
    refused("scale has dtype float32; accepted: bfloat16", GROUPS.float())
    refused(r"scale has shape \[3, 8\]; accepted: \[8, 3\]", GROUPS.t())
    refused("group_sizes is .0, 0, 64.; accepted: .0, 0, 32", group_sizes=[0, 0, 64])
    refused("group_sizes is None", group_sizes=None)
    refused("y_scale is None; accepted: a tensor", y_scale=None)
    refused("y_scale has dtype float32; accepted: int64", y_scale=SCALE[None])
    refused(r"y_scale has shape \[8\]; accepted: \[1, 8\]", y_scale=PACKED)
    refused("bias is given", bias=SCALE[None].bfloat16())
    refused("pertoken_scale is given", pertoken_scale=ROWS)
    message = "x1 has 80 columns; accepted: a multiple of 32"
    check_refused(NAME, message, e4m3(M, 80), u8(N, 40).t(), GROUPS, **TWO_LEVEL)
