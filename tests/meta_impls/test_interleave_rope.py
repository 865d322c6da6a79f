from __future__ import annotations

import pytest
import torch

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_interleave_rope"
X = torch.arange(240.0).view(2, 3, 5, 8)
COS = torch.arange(40.0).view(1, 1, 5, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "cos_shape"),
    [
        ((2, 3, 5, 64), (2, 1, 5, 64)),
        ((2, 3, 5, 8), (1, 1, 1, 8)),
        ((0, 3, 5, 8), (1, 1, 5, 8)),
        ((1, 1, 1, 2), (1, 1, 1, 2)),
    ],
)
def test_fake_and_real_agree(shape: tuple[int, ...], cos_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cos, sin = (torch.randn(cos_shape).to(dtype) for _ in range(2))
    y = check_operator(NAME, torch.randn(shape).to(dtype), cos, sin)
    assert (y.shape, y.dtype) == (shape, dtype)


def test_strided_input() -> None:
    check_operator(NAME, torch.randn(2, 5, 3, 8).transpose(1, 2), COS, COS)


def test_dynamic_batch_and_sequence_in_one_graph() -> None:
    compile_dynamic(
        torch.ops.npu.npu_interleave_rope.default,
        lambda t: (torch.randn(t + 1, 3, t, 8), torch.randn(t + 1, 1, t, 8), torch.randn(t + 1, 1, t, 8)),
        [2, 7, 3],
        dynamic=[(argument, dim) for argument in range(3) for dim in (0, 2)],
    )


def test_dynamic_batch_with_one_cosine_in_one_graph() -> None:
    compile_dynamic(
        torch.ops.npu.npu_interleave_rope.default,
        lambda t: (torch.randn(t, 3, 5, 8), COS, COS),
        [2, 7, 3],
    )


def test_refuses_dtypes() -> None:
    check_refused(NAME, "x has dtype float64", X.double(), COS.double(), COS.double())
    check_refused(NAME, "cos has dtype float32; accepted: bfloat16", X.bfloat16(), COS, COS)
    check_refused(NAME, "sin has dtype float16; accepted: float32", X, COS, COS.half())


def test_refuses_shapes() -> None:
    check_refused(NAME, "x has 3 dimensions; accepted: 4", X[0], COS, COS)
    check_refused(NAME, "accepted: an even last dimension", X[..., :7], COS[..., :7], COS[..., :7])
    message = r"cos has shape \[.*\]; accepted: \[2, 1, 5, 8\], where dimension 0, 2 may be 1"
    check_refused(NAME, message, X, COS[..., :4], COS[..., :4])
    check_refused(NAME, message, X, COS[0], COS[0])
    check_refused(NAME, message, X, COS[:, :, :3], COS[:, :, :3])
    check_refused(NAME, message, X, X, X)
    check_refused(NAME, r"sin has shape \[1, 1, 1, 8\]; accepted: \[1, 1, 5, 8\]", X, COS, COS[:, :, :1])
