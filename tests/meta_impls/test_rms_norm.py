from __future__ import annotations

import pytest
import torch

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_rms_norm"


@pytest.mark.parametrize(
    ("shape", "gamma_shape"),
    [((16,), (16,)), ((3, 16), (16,)), ((2, 3, 16), (16,)), ((2, 1, 3, 16), (3, 16)), ((0, 16), (16,))],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fake_and_real_agree(
    shape: tuple[int, ...], gamma_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    y, rstd = check_operator(NAME, torch.randn(shape).to(dtype), torch.ones(gamma_shape, dtype=dtype), 1e-5)
    normalized = len(gamma_shape)
    assert (y.shape, y.dtype) == (shape, dtype)
    assert (rstd.shape, rstd.dtype) == ((*shape[:-normalized], *[1] * normalized), torch.float32)


def test_strided_input_and_float32_gamma() -> None:
    check_operator(NAME, torch.randn(16, 5).bfloat16().T, torch.ones(16))


def test_dynamic_rows_in_one_graph() -> None:
    gamma = torch.randn(16)
    compile_dynamic(
        lambda x, g: torch.ops.npu.npu_rms_norm(x, g, epsilon=1e-5),
        lambda t: (torch.randn(t, 16), gamma),
        [2, 7, 3],
    )


def test_dynamic_width_in_one_graph() -> None:
    compile_dynamic(
        torch.ops.npu.npu_rms_norm.default,
        lambda h: (torch.randn(4, h), torch.randn(h)),
        [8, 5, 12],
        dynamic=[(0, 1), (1, 0)],
    )


def test_refuses_dtypes() -> None:
    check_refused(
        NAME, "input has dtype float64; accepted: float16", torch.ones(2, 4).double(), torch.ones(4)
    )
    check_refused(
        NAME, "gamma has dtype float16; accepted: bfloat16", torch.ones(2, 4).bfloat16(), torch.ones(4).half()
    )
    check_refused(NAME, "gamma has dtype bfloat16", torch.ones(2, 4), torch.ones(4).bfloat16())


def test_refuses_ranks() -> None:
    check_refused(NAME, "input has 9 dimensions; accepted: 1 to 8", torch.ones([1] * 9), torch.ones(1))
    check_refused(NAME, "input has 0 dimensions", torch.tensor(1.0), torch.ones(1))
    check_refused(NAME, "gamma has 0 dimensions; accepted: 1 to 2", torch.ones(2, 4), torch.tensor(1.0))
    check_refused(NAME, "gamma has 2 dimensions; accepted: 1", torch.ones(4), torch.ones(1, 4))


def test_refuses_gamma_of_another_shape() -> None:
    check_refused(NAME, r"gamma has shape \[5\]; accepted: \[4\]", torch.ones(2, 4), torch.ones(5))
    check_refused(
        NAME, r"gamma has shape \[1, 4\]; accepted: \[2, 4\]", torch.ones(3, 2, 4), torch.ones(1, 4)
    )


def test_refuses_nothing_to_normalize() -> None:
    check_refused(NAME, "accepted: normalized sizes above 0", torch.ones(2, 0), torch.ones(0))
