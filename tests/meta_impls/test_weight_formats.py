"""npu_weight_quant_batchmatmul with weights of floating-point numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion import _compat
from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_weight_quant_batchmatmul"
HIFLOAT8, E2M1, E1M2 = 290, 296, 297
M, K, N, G = 3, 96, 16, 32
X = torch.ones(M, K).bfloat16()
SCALE, GROUPS = torch.ones(N).bfloat16(), torch.ones(K // G, N).bfloat16()
FLOAT8 = torch.ones(K, N).to(torch.float8_e4m3fn)
POWERS = torch.full((K // G, N), 127, dtype=torch.uint8)
FLOAT32 = torch.zeros(K, N // 8)


def u8(*shape: int) -> Tensor:
    return torch.full(shape, 0x21, dtype=torch.uint8)


def grouped(weight_dtype: int | None = None, **changes: Any) -> dict[str, Any]:
    return {"antiquant_group_size": G, "weight_dtype": weight_dtype, **changes}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hifloat8", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_8_bit_floats(dtype: torch.dtype, hifloat8: bool, transposed: bool) -> None:
    weight = u8(K, N) if hifloat8 else FLOAT8
    if transposed:
        weight = weight.t().contiguous().t()
    number = HIFLOAT8 if hifloat8 else None
    scale, bias = SCALE.to(dtype), SCALE[None].to(dtype)
    y = check_operator(NAME, X.to(dtype), weight, scale, bias=bias, weight_dtype=number)
    assert (y.shape, y.dtype) == ((M, N), dtype)


def test_no_rows_and_a_scale_of_two_dimensions() -> None:
    assert check_operator(NAME, X[:0], FLOAT8, SCALE[None]).shape == (0, N)


@pytest.mark.parametrize(
    ("weight", "number"),
    [
        (FLOAT32, None),
        (torch.zeros(N, K // 8).t(), None),
        (u8(K, N // 2), E2M1),
        (u8(N, K // 2).t(), E2M1),
        (u8(K, N // 2), E1M2),
        (u8(N, K // 2).t(), E1M2),
    ],
)
def test_4_bit_floats(weight: Tensor, number: int | None) -> None:
    scale = GROUPS if weight.is_contiguous() else GROUPS.t().contiguous().t()
    y = check_operator(NAME, X, weight, scale, bias=SCALE, **grouped(number))
    assert (y.shape, y.dtype) == ((M, N), torch.bfloat16)


@pytest.mark.parametrize(
    ("weight", "number"), [(FLOAT32, None), (torch.zeros(N, K // 8).t(), None), (u8(K, N // 2), E2M1)]
)
@pytest.mark.parametrize("own_dtype", [False, True])
def test_powers_of_two(weight: Tensor, number: int | None, own_dtype: bool) -> None:
    scale = POWERS
    if own_dtype:
        if _compat.E8M0 is None:
            pytest.skip("torch has no float8_e8m0fnu")
        scale = scale.view(_compat.E8M0)
    if not weight.is_contiguous():
        scale = scale.t().contiguous().t()
    assert check_operator(NAME, X, weight, scale, **grouped(number)).shape == (M, N)


def test_groups_need_not_divide_the_rows() -> None:
    x, weight, scale = X[:, :80], u8(80, N // 2), GROUPS
    assert check_operator(NAME, x, weight, scale, **grouped(E2M1)).shape == (M, N)


def test_dynamic_rows_in_one_graph() -> None:
    def call(x: Tensor) -> tuple[Tensor, ...]:
        op = torch.ops.npu.npu_weight_quant_batchmatmul
        return (
            op(x, FLOAT8, SCALE),
            op(x, u8(K, N), SCALE, weight_dtype=HIFLOAT8),
            op(x, FLOAT32, POWERS, antiquant_group_size=G),
            op(x, u8(N, K // 2).t(), GROUPS.t().contiguous().t(), antiquant_group_size=G, weight_dtype=E1M2),
        )

    compile_dynamic(call, lambda t: [torch.randn(t, K).bfloat16()], [2, 7, 3])


def test_refuses_numbers_of_types() -> None:
    accepted = r"accepted: 290 \(hifloat8\) or 296 \(float4_e2m1\) or 297 \(float4_e1m2\) for uint8"
    check_refused(NAME, f"weight_dtype is None; {accepted}", X, u8(K, N), SCALE)
    check_refused(NAME, f"weight_dtype is 285; {accepted}", X, u8(K, N), SCALE, weight_dtype=285)
    message = "weight_dtype is 292; accepted: None for float8_e4m3fn"
    check_refused(NAME, message, X, FLOAT8, SCALE, weight_dtype=292)


def test_refuses_8_bit_floats() -> None:
    def refused(message: str, scale: Tensor = SCALE, **arguments: Any) -> None:
        check_refused(NAME, message, X, FLOAT8, scale, **arguments)

    refused("antiquant_scale has dtype float16; accepted: bfloat16", SCALE.half())
    refused("antiquant_scale has dtype uint8; accepted: bfloat16", POWERS)
    refused(r"antiquant_scale has shape \[1\]; accepted: \[16\]", SCALE[:1])
    refused(r"antiquant_scale has shape \[3, 16\]; accepted: \[1, 16\]", GROUPS)
    refused("antiquant_group_size is 32; accepted: 0 with weights of float8_e4m3fn", **grouped())
    refused("antiquant_offset is given; accepted: None with weights of", antiquant_offset=SCALE)
    refused("quant_scale is given; accepted: None with weights of", quant_scale=SCALE.float())
    refused("bias has dtype float32; accepted: bfloat16", bias=SCALE.float())
    check_refused(NAME, "x has 96 columns, weight 95 rows", X, FLOAT8[:95], SCALE)


def test_refuses_4_bit_floats() -> None:
    weight = u8(K, N // 2)

    def refused(message: str, scale: Tensor = GROUPS, number: int = E2M1, **changes: Any) -> None:
        check_refused(NAME, message, X, weight, scale, **grouped(number, **changes))

    also = "accepted: bfloat16, uint8, float8_e8m0fnu"
    refused(f"antiquant_scale has dtype float16; {also}", GROUPS.half())
    refused("antiquant_scale has dtype uint8; accepted: bfloat16$", POWERS, E1M2)
    accepted = "accepted: a multiple of 32 below the 96 rows"
    for size in (0, 16, 48, 96):
        refused(f"antiquant_group_size is {size}; {accepted}", antiquant_group_size=size)
    refused("antiquant_group_size is 64; accepted: 32 with e8m0 scales", POWERS, antiquant_group_size=64)
    refused(r"antiquant_scale has shape \[16\]; accepted: \[3, 16\]", SCALE)
    refused(r"antiquant_scale has shape \[2, 16\]; accepted: \[3, 16\]", GROUPS[:2])
    transposed = GROUPS.t().contiguous().t()
    refused("antiquant_scale is not contiguous; accepted: contiguous, as the weight", transposed)
    refused("bias has dtype float32; accepted: bfloat16", bias=SCALE.float())
    refused("antiquant_offset is given; accepted: None with weights of float4", antiquant_offset=GROUPS)
    message = "antiquant_scale is contiguous; accepted: not contiguous, as the weight is"
    check_refused(NAME, message, X, u8(N, K // 2).t(), GROUPS, **grouped(E2M1))
    message = "weight is float4_e2m1 in uint8 with strides .*; accepted: contiguous, or the transpose"
    check_refused(NAME, message, X, u8(K, N)[:, ::2], GROUPS, **grouped(E2M1))
    check_refused(NAME, "x has 96 columns, weight 48 rows", X, u8(K // 2, N), GROUPS, **grouped(E2M1))
