from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_grouped_matmul_swiglu_quant"


def arguments(tokens: int = 5, inner: int = 16, columns: int = 8, experts: int = 2) -> dict[str, Tensor]:
    return {
        "x": torch.randint(-128, 128, (tokens, inner), dtype=torch.int8),
        "weight": torch.randint(-128, 128, (experts, inner, columns), dtype=torch.int8),
        "group_list": torch.linspace(0, tokens, experts + 1).long()[1:],
        "weight_scale": torch.rand(experts, columns),
        "x_scale": torch.rand(tokens),
    }


@pytest.mark.parametrize("tokens", [5, 1, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fake_and_real_agree(tokens: int, dtype: torch.dtype) -> None:
    args = arguments(tokens)
    args["weight_scale"] = args["weight_scale"].to(dtype)
    y, scale, reserved = check_operator(NAME, *args.values())
    assert (y.shape, y.dtype) == ((tokens, 4), torch.int8)
    assert (scale.shape, scale.dtype) == ((tokens,), torch.float32)
    assert (reserved.shape, reserved.dtype) == ((), torch.float32)


def test_nz_storage() -> None:
    args = arguments(inner=40, columns=48)
    args["weight"] = torch.ones(2, 2, 3, 16, 32, dtype=torch.int8)
    check_operator(NAME, *args.values())


def test_strided_inputs() -> None:
    args = arguments()
    args["x"] = args["x"].T.contiguous().T
    args["weight"] = args["weight"].transpose(1, 2).contiguous().transpose(1, 2)
    check_operator(NAME, *args.values())


def test_dynamic_tokens_in_one_graph() -> None:
    compile_dynamic(
        torch.ops.npu.npu_grouped_matmul_swiglu_quant.default,
        lambda t: list(arguments(t).values()),
        [2, 7, 3],
        dynamic=[(0, 0), (4, 0)],
    )


def test_dynamic_experts_and_matrix_in_one_graph() -> None:
    compile_dynamic(
        torch.ops.npu.npu_grouped_matmul_swiglu_quant.default,
        lambda n: list(arguments(5, 4 * n, 2 * n, n).values()),
        [2, 5, 3],
        dynamic=[(0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0), (3, 1)],
    )


@pytest.mark.parametrize(
    ("match", "argument", "value"),
    [
        ("x has dtype float16; accepted: int8", "x", torch.ones(5, 16).half()),
        ("x has 3 dimensions; accepted: 2", "x", torch.ones(1, 5, 16, dtype=torch.int8)),
        ("weight has dtype int32; accepted: int8", "weight", torch.ones(2, 16, 1, dtype=torch.int32)),
        (
            r"weight has shape \[2, 8, 16\]; accepted: \[2, 16, 8\]",
            "weight",
            torch.ones(2, 8, 16, dtype=torch.int8),
        ),
        (r"weight has shape \[16, 8\]; accepted", "weight", torch.ones(16, 8, dtype=torch.int8)),
        (
            r"weight has shape \[2, 1, 2, 16, 32\]; accepted: \[2, 1, 1, 16, 32\]",
            "weight",
            torch.ones(2, 1, 2, 16, 32, dtype=torch.int8),
        ),
        (
            "group_list has dtype int32; accepted: int64",
            "group_list",
            torch.tensor([2, 5], dtype=torch.int32),
        ),
        (r"group_list has shape \[3\]; accepted: \[2\]", "group_list", torch.tensor([1, 2, 5])),
        ("weight_scale has dtype int64; accepted: float16", "weight_scale", torch.ones(2, 8).long()),
        ("weight_scale has 3 dimensions; accepted: 2", "weight_scale", torch.ones(2, 1, 8)),
        (r"weight_scale has shape \[2, 7\]; accepted: a positive even", "weight_scale", torch.ones(2, 7)),
        ("x_scale has dtype bfloat16; accepted: float32", "x_scale", torch.ones(5).bfloat16()),
        (r"x_scale has shape \[5, 1\]; accepted: \[5\]", "x_scale", torch.ones(5, 1)),
        ("bias is given; accepted: None", "bias", torch.ones(2, 8)),
        ("offset is given; accepted: None", "offset", torch.ones(2, 8)),
    ],
)
def test_refusals(match: str, argument: str, value: Tensor) -> None:
    options: dict[str, Any] = {**arguments(), argument: value}
    check_refused(NAME, match, **options)
