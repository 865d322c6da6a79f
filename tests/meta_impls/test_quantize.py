from __future__ import annotations

import pytest
import torch

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_quantize"
QINT8, QUINT8, QINT32, QUINT4X2 = 12, 13, 14, 16
FLOATS = {
    23: torch.float8_e5m2,
    24: torch.float8_e4m3fn,
    290: torch.uint8,
    torch.float8_e5m2: torch.float8_e5m2,
    torch.float8_e4m3fn: torch.float8_e4m3fn,
}
OF_TORCH_NPU = {291: torch.float8_e5m2, 292: torch.float8_e4m3fn}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("target", "result"), [(QINT8, torch.int8), (QUINT8, torch.uint8), (QINT32, torch.int32), (1, torch.int8)]
)
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 8), (0, 3)])
def test_fake_and_real_agree(
    dtype: torch.dtype, target: int, result: torch.dtype, shape: tuple[int, ...]
) -> None:
    zero_points = torch.ones(3, dtype=torch.int32)
    y = check_operator(NAME, torch.randn(shape).to(dtype), torch.ones(3), zero_points, target)
    assert (y.shape, y.dtype) == (shape, result)


@pytest.mark.parametrize("axis", [-2, -1, 1])
def test_without_div_mode(axis: int) -> None:
    x = torch.randn(8, 8, 2).permute(2, 1, 0)
    y = check_operator(NAME, x, torch.ones(8), torch.ones(8), QINT8, axis, False)
    assert y.dtype == torch.int8
    spread = torch.ones(1, 8, 1) if axis == -2 else torch.ones(1, 1, 8)
    y = check_operator(NAME, x, spread, spread, QUINT4X2, axis, False)
    assert (y.shape, y.dtype) == ((2, 8, 1), torch.int32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 8), (0, 3)])
def test_floats(dtype: int | torch.dtype, shape: tuple[int, ...]) -> None:
    x, zero_points = torch.randn(shape).bfloat16(), torch.ones(3, dtype=torch.int32)
    y = check_operator(NAME, x, torch.ones(3), zero_points, dtype)
    assert (y.shape, y.dtype) == (shape, FLOATS[dtype])
    check_operator(NAME, x.transpose(0, 1), torch.ones(1), None, dtype)


@pytest.mark.parametrize("dtype", FLOATS | OF_TORCH_NPU)
def test_floats_without_div_mode(dtype: int | torch.dtype) -> None:
    y = check_operator(NAME, torch.randn(2, 8), torch.ones(8), torch.ones(8), dtype, -1, False)
    assert (y.shape, y.dtype) == ((2, 8), (FLOATS | OF_TORCH_NPU)[dtype])


def test_one_dimension() -> None:
    check_operator(NAME, torch.randn(8), torch.ones(1), None, QINT8)
    check_operator(NAME, torch.randn(8), torch.ones(8), None, QINT8, 0)
    check_operator(NAME, torch.randn(8), torch.ones(8), None, QUINT4X2, -1, False)


@pytest.mark.parametrize("dtype", [QINT8, 24, 290])
@pytest.mark.parametrize("div_mode", [True, False])
def test_dynamic_rows_in_one_graph(div_mode: bool, dtype: int) -> None:
    compile_dynamic(
        lambda x: torch.ops.npu.npu_quantize(x, torch.ones(8), None, dtype, 1, div_mode),
        lambda t: [torch.randn(t, 8)],
        [2, 7, 3],
    )


def test_dynamic_axis_in_one_graph() -> None:
    compile_dynamic(
        lambda x, scales, zero: torch.ops.npu.npu_quantize(x, scales, zero, QINT8),
        lambda n: [torch.randn(3, n), torch.rand(n) + 0.1, torch.ones(n, dtype=torch.int32)],
        [5, 2, 9],
        dynamic=[(0, 1), (1, 0), (2, 0)],
    )


X, ONE = torch.ones(4, 3), torch.ones(1)


def test_refuses_dtypes() -> None:
    check_refused(
        NAME, "input has dtype int8; accepted: float16, bfloat16, float32", X.char(), ONE, None, QINT8
    )
    check_refused(NAME, "scales has dtype int32", X, ONE.int(), None, QINT8)
    check_refused(NAME, "zero_points has dtype float16; accepted: int8", X, ONE, ONE.half(), QINT8)
    check_refused(NAME, "zero_points has dtype int32; accepted: float32", X, ONE, ONE.int(), QINT8, 1, False)


@pytest.mark.parametrize("div_mode", [True, False])
@pytest.mark.parametrize("dtype", [2, 5, 21, 285, 296])
def test_refuses_result_dtypes(dtype: int, div_mode: bool) -> None:
    check_refused(
        NAME, rf"dtype is {dtype}; accepted: 1 \(int8\), 12 \(qint8\)", X, ONE, None, dtype, 1, div_mode
    )


@pytest.mark.parametrize(
    ("dtype", "div_mode"), [(QUINT8, False), (QINT32, False), (QUINT4X2, True), (291, True), (292, True)]
)
def test_refuses_result_dtypes_of_the_other_mode(dtype: int, div_mode: bool) -> None:
    check_refused(NAME, f"dtype is {dtype}; .*with div_mode={div_mode}", X, ONE, None, dtype, 1, div_mode)


def test_refuses_axes() -> None:
    check_refused(NAME, "axis is 2; accepted: -2 to 1", X, torch.ones(3), None, QINT8, 2)
    check_refused(NAME, "axis is -3; accepted: -2 to 1", X, torch.ones(3), None, QINT8, -3)
    check_refused(NAME, "axis is -3; accepted: -2 to 1 with div_mode=False", X, ONE, None, QINT8, -3, False)
    check_refused(NAME, "axis is 2; accepted: -2 to 1 with div_mode=False", X, ONE, None, QINT8, 2, False)
    check_refused(NAME, "axis is -2; accepted: -1 or 0", X[0], ONE, None, QINT8, -2, False)


def test_refuses_shapes() -> None:
    check_refused(NAME, r"scales has shape \[4\]; accepted: \[3\]", X, torch.ones(4), None, QINT8)
    check_refused(NAME, r"scales has shape \[3\]; accepted: \[4\]", X, torch.ones(3), None, QINT8, -2, False)
    check_refused(NAME, "scales is 2-dimensional; accepted: 1 dimension", X, torch.ones(1, 3), None, QINT8)
    check_refused(
        NAME, r"scales has shape \[4, 3\]; accepted: \[1, 3\]", X, torch.ones(4, 3), None, QINT8, -1, False
    )
    check_refused(NAME, r"zero_points has shape \[1\]; accepted: \[3\]", X, torch.ones(3), ONE.int(), QINT8)
    check_refused(NAME, "input has 0 dimensions; accepted: 1 to 8", torch.tensor(1.0), ONE, None, QINT8)
    check_refused(NAME, "input has 3 columns; accepted: a multiple of 8", X, ONE, None, QUINT4X2, 1, False)
