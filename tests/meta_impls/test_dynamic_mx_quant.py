from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_dynamic_mx_quant"
E2M1, E1M2 = 296, 297
FLOAT8 = {
    23: torch.float8_e5m2,
    24: torch.float8_e4m3fn,
    291: torch.float8_e5m2,
    292: torch.float8_e4m3fn,
    torch.float8_e4m3fn: torch.float8_e4m3fn,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dst_type", FLOAT8)
def test_float8(dst_type: int | torch.dtype, dtype: torch.dtype) -> None:
    y, scale = check_operator(NAME, torch.randn(3, 70).to(dtype), dst_type=dst_type)
    assert (y.shape, y.dtype) == ((3, 70), FLOAT8[dst_type])
    assert (scale.shape, scale.dtype) == ((3, 2, 2), torch.uint8)


@pytest.mark.parametrize("kwargs", [{}, {"dst_type": E2M1}, {"dst_type": E1M2}])
def test_float4(kwargs: dict[str, Any]) -> None:
    y, scale = check_operator(NAME, torch.randn(3, 70).bfloat16(), **kwargs)
    assert (y.shape, y.dtype) == ((3, 35), torch.uint8)
    assert (scale.shape, scale.dtype) == ((3, 2, 2), torch.uint8)


@pytest.mark.parametrize(
    ("axis", "shape"),
    [(0, (2, 5, 8, 2)), (1, (70, 1, 8, 2)), (2, (70, 5, 1, 2)), (-1, (70, 5, 1, 2)), (-3, (2, 5, 8, 2))],
)
@pytest.mark.parametrize("dst_type", [24, E2M1])
def test_axes(dst_type: int, axis: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(8, 5, 70).permute(2, 1, 0).half()
    y, scale = check_operator(NAME, x, axis=axis, dst_type=dst_type)
    assert y.shape == (70, 5, 8 if dst_type == 24 else 4)
    assert scale.shape == shape


@pytest.mark.parametrize(
    ("columns", "block_size", "pairs"), [(1, 32, 1), (64, 32, 1), (65, 32, 2), (129, 64, 2), (5, 1024, 1)]
)
def test_block_sizes(columns: int, block_size: int, pairs: int) -> None:
    x = torch.randn(columns).bfloat16()
    _, scale = check_operator(NAME, x, dst_type=24, block_size=block_size, scale_alg=1)
    assert scale.shape == (pairs, 2)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0)])
@pytest.mark.parametrize("dst_type", [24, E2M1])
def test_empty(dst_type: int, shape: tuple[int, ...]) -> None:
    _, scale = check_operator(NAME, torch.randn(shape).bfloat16(), dst_type=dst_type)
    assert scale.shape == (shape[0], shape[1] // 64, 2)


@pytest.mark.parametrize("dst_type", [24, E2M1])
def test_dynamic_rows_in_one_graph(dst_type: int) -> None:
    operator = torch.ops.npu.npu_dynamic_mx_quant
    compile_dynamic(
        lambda x: operator(x, dst_type=dst_type), lambda t: [torch.randn(t, 70).bfloat16()], [2, 7, 3]
    )


# A single pair of scales is a graph of its own, as every size of 1 is in PyTorch.
@pytest.mark.parametrize("sizes", [[7, 16, 32], [33, 40, 100]])
def test_dynamic_blocks_in_one_graph(sizes: list[int]) -> None:
    operator = torch.ops.npu.npu_dynamic_mx_quant
    compile_dynamic(
        lambda x: operator(x), lambda t: [torch.randn(3, 2 * t).bfloat16()], sizes, dynamic=[(0, 1)]
    )
    compile_dynamic(
        lambda x: operator(x, axis=0, dst_type=24), lambda t: [torch.randn(2 * t, 3).bfloat16()], sizes
    )


def test_dynamic_blocks_of_float32_in_one_graph() -> None:
    operator = torch.ops.npu.npu_dynamic_mx_quant
    compile_dynamic(
        lambda x: operator(x, dst_type=24), lambda t: [torch.randn(3, t)], [65, 70, 200], dynamic=[(0, 1)]
    )


X = torch.ones(2, 64).bfloat16()


def test_refuses_inputs() -> None:
    check_refused(NAME, "input has dtype int32; accepted: float16, bfloat16, float32", X.int())
    check_refused(NAME, "input has 0 dimensions; accepted: 1 to 7", X[0, 0])
    check_refused(NAME, "input has 8 dimensions; accepted: 1 to 7", X.reshape(1, 1, 1, 1, 1, 1, 2, 64))
    check_refused(NAME, r"input has 63 columns; accepted: a multiple of 2 \(float4_e2m1\)", X[:, :63])
    check_refused(NAME, "input has 2 float32 entries along axis 0; accepted: at least 32", X.float(), axis=0)


@pytest.mark.parametrize("axis", [-3, 2])
def test_refuses_axes(axis: int) -> None:
    check_refused(NAME, f"axis is {axis}; accepted: -2 to 1", X, axis=axis)


@pytest.mark.parametrize("dst_type", [0, 1, 2, 290, 293, 999, torch.int8])
def test_refuses_dst_types(dst_type: int | torch.dtype) -> None:
    accepted = r"24 or 292 \(float8_e4m3fn\), 23 or 291"
    number = 1 if dst_type == torch.int8 else dst_type
    check_refused(NAME, f"dst_type is {number}; accepted: {accepted}", X, dst_type=number)


def test_refuses_what_is_not_implemented() -> None:
    check_refused(NAME, "round_mode is 'floor'; accepted: 'rint'", X, round_mode="floor")
    check_refused(NAME, "scale_alg is 2; accepted: None, 0$", X, scale_alg=2)
    check_refused(NAME, "scale_alg is 1; accepted: None, 0$", X, scale_alg=1)
    check_refused(NAME, "scale_alg is 2; accepted: None, 0, 1", X, scale_alg=2, dst_type=24)
    check_refused(NAME, "dst_type_max is 6.0; accepted: 0", X, dst_type_max=6.0)
    check_refused(NAME, "dst_type_max is nan; accepted: 0", X, dst_type_max=math.nan)
    check_refused(NAME, "max_low_bound is 1.0; accepted: 0", X, max_low_bound=1.0)


@pytest.mark.parametrize("block_size", [0, -32, 16, 33, 1056])
def test_refuses_block_sizes(block_size: int) -> None:
    check_refused(
        NAME, f"block_size is {block_size}; accepted: 32 to 1024 in steps", X, block_size=block_size
    )


def test_refuses_other_blocks_of_float32() -> None:
    check_refused(NAME, "block_size is 64; accepted: 32 for float32", X.float(), block_size=64)
