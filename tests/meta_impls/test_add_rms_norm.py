from __future__ import annotations

import pytest
import torch

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_add_rms_norm"


@pytest.mark.parametrize(
    ("shape", "gamma_shape"), [((16,), (16,)), ((3, 16), (16,)), ((2, 1, 3, 16), (3, 16)), ((0, 16), (16,))]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fake_and_real_agree(
    shape: tuple[int, ...], gamma_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x1, x2 = (torch.randn(shape).to(dtype) for _ in range(2))
    y, rstd, x = check_operator(NAME, x1, x2, torch.ones(gamma_shape, dtype=dtype), epsilon=1e-5)
    normalized = len(gamma_shape)
    assert (y.shape, y.dtype) == (x.shape, x.dtype) == (shape, dtype)
    assert (rstd.shape, rstd.dtype) == ((*shape[:-normalized], *[1] * normalized), torch.float32)


def test_strided_inputs() -> None:
    x = torch.randn(16, 5)
    check_operator(NAME, x.T, x.T.contiguous(), torch.ones(16))


def test_dynamic_rows_in_one_graph() -> None:
    gamma = torch.randn(16)
    compile_dynamic(
        torch.ops.npu.npu_add_rms_norm.default,
        lambda t: (torch.randn(t, 16), torch.randn(t, 16), gamma),
        [2, 7, 3],
        dynamic=[(0, 0), (1, 0)],
    )


def test_refuses_different_addends() -> None:
    ones = torch.ones(2, 4)
    check_refused(NAME, "x2 has dtype bfloat16; accepted: float32", ones, ones.bfloat16(), torch.ones(4))
    check_refused(NAME, r"x2 has shape \[1, 4\]; accepted: \[2, 4\]", ones, ones[:1], torch.ones(4))
    check_refused(NAME, r"x2 has shape \[4\]; accepted: \[2, 4\]", ones, ones[0], torch.ones(4))


def test_refuses_dtypes() -> None:
    ones = torch.ones(2, 4)
    check_refused(NAME, "x1 has dtype int32", ones.int(), ones.int(), torch.ones(4))
    check_refused(NAME, "gamma has dtype float32; accepted: float16", ones.half(), ones.half(), torch.ones(4))


def test_refuses_shapes() -> None:
    ones = torch.ones(2, 4)
    check_refused(NAME, "x1 has 9 dimensions", torch.ones([1] * 9), torch.ones([1] * 9), torch.ones(1))
    check_refused(NAME, r"gamma has shape \[2\]; accepted: \[4\]", ones, ones, torch.ones(2))
    check_refused(NAME, "gamma has 3 dimensions", ones, ones, torch.ones(1, 2, 4))
    check_refused(NAME, "accepted: normalized sizes above 0", ones[:, :0], ones[:, :0], torch.ones(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_cast_fake_and_real_agree(dtype: torch.dtype) -> None:
    x1, x2 = (torch.randn(2, 3, 16).to(dtype) for _ in range(2))
    wide, y, rstd, x = check_operator("npu_add_rms_norm_cast", x1, x2, torch.ones(16, dtype=dtype))
    assert (wide.shape, wide.dtype) == (x.shape, torch.float32)
    assert (y.dtype, rstd.dtype, x.dtype) == (dtype, torch.float32, dtype)


def test_cast_refuses_other_addends() -> None:
    ones = torch.ones(2, 4)
    check_refused(
        "npu_add_rms_norm_cast", r"x2 has shape \[1, 4\]; accepted: \[2, 4\]", ones, ones[:1], torch.ones(4)
    )
