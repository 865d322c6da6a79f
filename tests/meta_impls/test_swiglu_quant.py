from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_swiglu_quant"


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 16), (2, 3, 8), (0, 8)])
@pytest.mark.parametrize("quant_mode", [0, 1])
@pytest.mark.parametrize("dst_type", [None, torch.int8, torch.quint4x2])
def test_fake_and_real_agree(
    shape: tuple[int, ...], dtype: torch.dtype, quant_mode: int, dst_type: torch.dtype | None
) -> None:
    y, scale = check_operator(
        NAME, torch.randn(shape).to(dtype), quant_mode=quant_mode, activate_left=True, dst_type=dst_type
    )
    last = shape[-1] // (4 if dst_type == torch.quint4x2 else 2)
    assert (y.shape, y.dtype) == ((*shape[:-1], last), torch.int8)
    assert (scale.shape, scale.dtype) == (shape[:-1], torch.float32)


@pytest.mark.parametrize("shape", [(2, 8), (2,)])
@pytest.mark.parametrize("quant_mode", [0, 1])
def test_fake_and_real_agree_with_groups(shape: tuple[int, ...], quant_mode: int) -> None:
    check_operator(
        NAME,
        torch.randn(5, 16),
        smooth_scales=torch.rand(shape),
        offsets=torch.rand(shape),
        group_index=int32(2, 4),
        quant_mode=quant_mode,
    )


def test_strided_input() -> None:
    check_operator(NAME, torch.randn(16, 5).bfloat16().T, quant_mode=1)


def test_dynamic_rows_in_one_graph() -> None:
    smooth, index = torch.rand(2, 8), int32(1, 2)
    compile_dynamic(
        lambda x: torch.ops.npu.npu_swiglu_quant(x, smooth_scales=smooth, group_index=index, quant_mode=1),
        lambda t: (torch.randn(t, 16),),
        [2, 7, 3],
    )


def test_dynamic_width_and_groups_in_one_graph() -> None:
    compile_dynamic(
        lambda x, s, o, g: torch.ops.npu.npu_swiglu_quant(
            x, smooth_scales=s, offsets=o, group_index=g, group_list_type=1, dst_type=torch.quint4x2
        ),
        lambda n: (torch.randn(9, 4 * n), torch.rand(n, 2 * n), torch.rand(n, 2 * n), int32(*[1] * n)),
        [2, 5, 3],
        dynamic=[(0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)],
    )


X = torch.ones(4, 8)
ONE = torch.ones(1, 4)


@pytest.mark.parametrize(
    ("match", "x", "options"),
    [
        ("x has dtype int32; accepted: float16", X.int(), {}),
        ("x has 1 dimensions; accepted: at least 2", X[0], {}),
        ("the last dimension of x is 7; accepted: a positive multiple of 2", X[:, :7], {}),
        ("the last dimension of x is 0; accepted: a positive multiple of 2", X[:, :0], {}),
        (
            "the last dimension of x is 6; accepted: a positive multiple of 4",
            X[:, :6],
            {"dst_type": torch.quint4x2},
        ),
        ("quant_mode is 2; accepted: 0, 1", X, {"quant_mode": 2}),
        ("group_list_type is 2; accepted: 0, 1", X, {"group_list_type": 2}),
        ("dst_type is torch.uint8; accepted: None, torch.int8, torch.quint4x2", X, {"dst_type": torch.uint8}),
        ("group_index has dtype int64; accepted: int32", X, {"group_index": torch.tensor([4])}),
        ("group_index has 2 dimensions; accepted: 1", X, {"group_index": int32(4)[None]}),
        (
            "smooth_scales has dtype float16; accepted: float32",
            X,
            {"smooth_scales": ONE.half(), "quant_mode": 1},
        ),
        (
            r"smooth_scales has shape \[1, 8\]; accepted: \[1, 4\] or \[1\]",
            X,
            {"smooth_scales": torch.ones(1, 8), "quant_mode": 1},
        ),
        (r"smooth_scales has shape \[4\]; accepted: ", X, {"smooth_scales": torch.ones(4), "quant_mode": 1}),
        (
            r"smooth_scales has shape \[1, 4\]; accepted: \[2, 4\] or \[2\]",
            X,
            {"smooth_scales": ONE, "group_index": int32(2, 4), "quant_mode": 1},
        ),
        ("smooth_scales has 3 dimensions", X, {"smooth_scales": ONE[None], "quant_mode": 1}),
        ("offsets has dtype float64; accepted: float32", X, {"smooth_scales": ONE, "offsets": ONE.double()}),
        ("offsets is None; accepted: a tensor shaped as smooth_scales", X, {"smooth_scales": ONE}),
        ("offsets is given; accepted: None without smooth_scales", X, {"offsets": ONE}),
        (r"offsets has shape \[1\]; accepted: \[1, 4\]", X, {"smooth_scales": ONE, "offsets": torch.ones(1)}),
    ],
)
def test_refusals(match: str, x: Tensor, options: dict[str, Any]) -> None:
    check_refused(NAME, match, x, **options)
