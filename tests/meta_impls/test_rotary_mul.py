from __future__ import annotations

import pytest
import torch

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_rotary_mul"
X = torch.arange(240.0).view(2, 3, 5, 8)
R = torch.arange(40.0).view(1, 1, 5, 8)


@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (0, 3, 5, 8), (1, 1, 1, 2)])
def test_fake_and_real_agree(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> None:
    r = torch.randn(1, *shape[1:]).to(dtype)
    y = check_operator(NAME, torch.randn(shape).to(dtype), r, r.clone(), mode)
    assert (y.shape, y.dtype) == (shape, dtype)


def test_rotate_and_strided_inputs() -> None:
    check_operator(NAME, X.transpose(1, 2), R.transpose(1, 2), R.transpose(1, 2), rotate=torch.eye(8).half())


@pytest.mark.parametrize("rotary_mode", ["half", "interleave"])
def test_dynamic_batch_and_sequence_in_one_graph(rotary_mode: str) -> None:
    compile_dynamic(
        lambda x, r1, r2: torch.ops.npu.npu_rotary_mul(x, r1, r2, rotary_mode=rotary_mode),
        lambda t: (torch.randn(t + 1, 3, t, 8), torch.randn(1, 1, t, 8), torch.randn(1, 1, t, 8)),
        [2, 7, 3],
        dynamic=[(0, 0), (0, 2), (1, 2), (2, 2)],
    )


def test_dynamic_batch_of_the_cosine_in_one_graph() -> None:
    compile_dynamic(
        torch.ops.npu.npu_rotary_mul.default,
        lambda t: (torch.randn(t, 3, 5, 8), torch.randn(t, 1, 5, 8), torch.randn(t, 1, 5, 8)),
        [2, 7, 3],
        dynamic=[(0, 0), (1, 0), (2, 0)],
    )


def test_refuses_modes() -> None:
    for mode in ("quarter", "interleave-half", ""):
        check_refused(NAME, f"rotary_mode is '{mode}'; accepted: 'half', 'interleave'", X, R, R, mode)


def test_refuses_dtypes() -> None:
    check_refused(NAME, "input has dtype float64", X.double(), R.double(), R.double())
    check_refused(NAME, "r1 has dtype float32; accepted: bfloat16", X.bfloat16(), R, R)
    check_refused(NAME, "r2 has dtype float16; accepted: float32", X, R, R.half())
    check_refused(
        NAME, "rotate has dtype int8; accepted: float16", X, R, R, "half", torch.eye(8).to(torch.int8)
    )


def test_refuses_shapes() -> None:
    check_refused(NAME, "input has 3 dimensions; accepted: 4", X[0], R, R)
    check_refused(NAME, "accepted: an even last dimension", X[..., :7], R[..., :7], R[..., :7])
    message = r"r1 has shape \[.*\]; accepted: \[2, 3, 5, 8\], where dimension 0, 1, 2 may be 1"
    check_refused(NAME, message, X, R[0], R[0])
    check_refused(NAME, message, X, R[..., :4], R[..., :4])
    check_refused(NAME, message, X, R[..., :1], R[..., :1])
    check_refused(NAME, message, X, R[:, :, :3], R[:, :, :3])
    check_refused(NAME, r"r2 has shape \[1, 1, 1, 8\]; accepted: \[1, 1, 5, 8\]", X, R, R[:, :, :1])
    check_refused(NAME, r"rotate has shape \[8\]; accepted: \[8, 8\]", X, R, R, "half", torch.ones(8))
    check_refused(NAME, r"rotate has shape \[8, 4\]; accepted: \[8, 8\]", X, R, R, "half", torch.ones(8, 4))
