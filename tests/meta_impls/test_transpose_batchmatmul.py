from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic, overload

NAME = "npu_transpose_batchmatmul"
B, M, K, N = 4, 3, 8, 5
A, W = torch.randn(B, M, K), torch.randn(B, K, N)
SCALE = torch.ones(B * N, dtype=torch.int64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("perm_x1", [None, [0, 1, 2], [1, 0, 2]])
@pytest.mark.parametrize("perm_x2", [None, [0, 1, 2], [0, 2, 1]])
@pytest.mark.parametrize("perm_y", [None, [1, 0, 2]])
def test_permutations(
    perm_x1: list[int] | None, perm_x2: list[int] | None, perm_y: list[int] | None, dtype: torch.dtype
) -> None:
    a = A.transpose(0, 1).contiguous() if perm_x1 == [1, 0, 2] else A
    w = W.transpose(1, 2).contiguous() if perm_x2 == [0, 2, 1] else W
    y = check_operator(NAME, a.to(dtype), w.to(dtype), perm_x1=perm_x1, perm_x2=perm_x2, perm_y=perm_y)
    assert (y.shape, y.dtype) == ((M, B, N), dtype)


@pytest.mark.parametrize(
    ("parts", "shape"), [(None, (M, B, N)), (1, (M, B, N)), (2, (2, M, 10)), (4, (4, M, 5))]
)
def test_parts(parts: int | None, shape: tuple[int, ...]) -> None:
    assert check_operator(NAME, A, W, batch_split_factor=parts).shape == shape


def test_quantized_result() -> None:
    y = check_operator(NAME, A.half(), W.half(), scale=SCALE)
    assert (y.shape, y.dtype) == ((M, 1, B * N), torch.int8)


def test_strided_operands() -> None:
    check_operator(NAME, torch.randn(K, M, B).permute(2, 1, 0), torch.randn(N, K, B).permute(2, 1, 0))


@pytest.mark.parametrize("sizes", [(0, 3, 8, 5), (4, 0, 8, 5), (4, 3, 0, 5), (4, 3, 8, 0)])
def test_empty(sizes: tuple[int, int, int, int]) -> None:
    b, m, k, n = sizes
    check_operator(NAME, torch.randn(b, m, k), torch.randn(b, k, n), batch_split_factor=2)
    scale = torch.ones(b * n, dtype=torch.int64)
    check_operator(NAME, torch.randn(b, m, k).half(), torch.randn(b, k, n).half(), scale=scale)


@pytest.mark.parametrize("parts", [1, 2])
def test_dynamic_sizes_in_one_graph(parts: int) -> None:
    compile_dynamic(
        lambda a, w: overload(NAME)(a, w, perm_x1=[1, 0, 2], batch_split_factor=parts),
        lambda t: (torch.randn(t + 1, 2 * t, 3 * t), torch.randn(2 * t, 3 * t, 5 * t)),
        [2, 7, 3],
        dynamic=[(argument, dim) for argument in (0, 1) for dim in range(3)],
    )


def test_dynamic_rows_with_a_scale_in_one_graph() -> None:
    compile_dynamic(
        lambda a: overload(NAME)(a, W.half(), scale=SCALE, perm_x1=[1, 0, 2]),
        lambda t: (torch.randn(t, B, K).half(),),
        [2, 7, 3],
    )


def test_refuses_dtypes() -> None:
    check_refused(NAME, "input has dtype int64; accepted: float16, bfloat16, float32", A.long(), W)
    check_refused(NAME, "weight has dtype float16; accepted: float32", A, W.half())
    check_refused(NAME, "scale has dtype float32; accepted: int64", A.half(), W.half(), scale=SCALE.float())
    check_refused(NAME, "input with a scale has dtype float32; accepted: float16", A, W, scale=SCALE)


def test_refuses_shapes() -> None:
    check_refused(NAME, "input has 2 dimensions; accepted: 3", A[0], W)
    check_refused(NAME, "weight has 2 dimensions; accepted: 3", A, W[0])
    check_refused(NAME, "input has 3 batches, weight 4; accepted: the same number", A[:3], W)
    check_refused(NAME, "input has 3 batches, weight 4", A, W, perm_x1=[1, 0, 2])
    check_refused(NAME, "input has 8 columns, weight 7 rows; accepted: the same", A, W[:, :7])
    check_refused(NAME, "input has 8 columns, weight 5 rows", A, W, perm_x2=[0, 2, 1])
    halves = A.half(), W.half()
    check_refused(NAME, r"scale has shape \[19\]; accepted: \[20\]", *halves, scale=SCALE[:19])
    check_refused(NAME, r"scale has shape \[1, 20\]; accepted: \[20\]", *halves, scale=SCALE[None])


def test_refuses_options() -> None:
    check_refused(NAME, "bias is given; accepted: None", A, W, bias=torch.ones(N))
    wrong = r"perm_x1 is \[0, 2, 1\]; accepted: \[0, 1, 2\], \[1, 0, 2\]"
    check_refused(NAME, wrong, A, W, perm_x1=[0, 2, 1])
    check_refused(NAME, r"perm_x2 is \[1, 0, 2\]; accepted: .*\[0, 2, 1\]", A, W, perm_x2=[1, 0, 2])
    check_refused(NAME, r"perm_y is \[0, 1, 2\]; accepted: \[1, 0, 2\]", A, W, perm_y=[0, 1, 2])
    check_refused(NAME, r"perm_y is \[1, 0\]", A, W, perm_y=[1, 0])
    check_refused(NAME, "batch_split_factor is 0; accepted: 1 or more", A, W, batch_split_factor=0)
    check_refused(NAME, "batch_split_factor is 3; accepted: a divisor of 4", A, W, batch_split_factor=3)
    options: dict[str, Tensor | int] = {"scale": SCALE, "batch_split_factor": 2}
    check_refused(NAME, "batch_split_factor is 2; accepted: 1 with a scale", A.half(), W.half(), **options)
