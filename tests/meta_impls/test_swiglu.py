from __future__ import annotations

import pytest
import torch

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_swiglu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "dim", "result"),
    [
        ((8,), -1, (4,)),
        ((3, 8), -1, (3, 4)),
        ((4, 3), 0, (2, 3)),
        ((2, 6, 5), 1, (2, 3, 5)),
        ((0, 8), -1, (0, 4)),
        ((2, 6, 5), -2, (2, 3, 5)),
    ],
)
def test_fake_and_real_agree(
    shape: tuple[int, ...], dim: int, result: tuple[int, ...], dtype: torch.dtype
) -> None:
    y = check_operator(NAME, torch.randn(shape).to(dtype), dim)
    assert (y.shape, y.dtype) == (result, dtype)


def test_strided_input() -> None:
    check_operator(NAME, torch.randn(16, 5).bfloat16().T)


def test_dynamic_rows_in_one_graph() -> None:
    compile_dynamic(torch.ops.npu.npu_swiglu.default, lambda t: (torch.randn(t, 8),), [2, 7, 3])


def test_dynamic_activated_dimension_in_one_graph() -> None:
    compile_dynamic(
        lambda x: torch.ops.npu.npu_swiglu(x), lambda h: (torch.randn(3, 2 * h),), [4, 7], dynamic=[(0, 1)]
    )


def test_refuses_dtypes() -> None:
    check_refused(NAME, "input has dtype float64; accepted: float16", torch.ones(2, 4).double())
    check_refused(NAME, "input has dtype int32", torch.ones(2, 4, dtype=torch.int32))


def test_refuses_an_odd_size_that_torch_npu_would_round_down() -> None:
    check_refused(NAME, r"input has shape \[2, 5\]; accepted: an even dimension -1", torch.ones(2, 5))
    check_refused(NAME, r"input has shape \[3, 4\]; accepted: an even dimension 0", torch.ones(3, 4), 0)


def test_refuses_dimensions_out_of_range() -> None:
    check_refused(NAME, "dim is 2; accepted: -2 to 1", torch.ones(2, 4), 2)
    check_refused(NAME, "dim is -3; accepted: -2 to 1", torch.ones(2, 4), -3)
    check_refused(NAME, "input has 0 dimensions; accepted: at least 1", torch.tensor(1.0))
