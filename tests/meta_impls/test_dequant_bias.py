from __future__ import annotations

import pytest
import torch

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_dequant_bias"
X, SCALE, ROWS = torch.ones(4, 3, dtype=torch.int32), torch.ones(3), torch.ones(4)


@pytest.mark.parametrize("rows", [4, 0])
@pytest.mark.parametrize("bias_dtype", [None, torch.int32, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("scale_dtype", "output"), [(torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)]
)
def test_fake_and_real_agree(
    rows: int, bias_dtype: torch.dtype | None, scale_dtype: torch.dtype, output: torch.dtype
) -> None:
    x = torch.randint(-9, 9, (3, rows), dtype=torch.int32).t()
    bias = None if bias_dtype is None else torch.ones(3, dtype=bias_dtype)
    y = check_operator(NAME, x, SCALE.to(scale_dtype), torch.ones(rows), bias, output_dtype=output)
    assert (y.shape, y.dtype) == ((rows, 3), output)


def test_no_output_dtype_means_float16() -> None:
    assert check_operator(NAME, X, SCALE, None, None).dtype == torch.float16


def test_dynamic_shapes_in_one_graph() -> None:
    compile_dynamic(
        torch.ops.npu.npu_dequant_bias.default,
        lambda t: [
            torch.ones(t, t + 1, dtype=torch.int32),
            torch.rand(t + 1),
            torch.rand(t),
            torch.rand(t + 1),
        ],
        [2, 7, 3],
        dynamic=[(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)],
    )


def test_optional_tensors_have_no_default() -> None:
    with pytest.raises(RuntimeError, match="missing value for argument 'activation_scale'"):
        torch.ops.npu.npu_dequant_bias(X, SCALE)


def test_refuses_dtypes() -> None:
    check_refused(NAME, "x has dtype float32; accepted: int32", X.float(), SCALE, None, None)
    check_refused(
        NAME, "weight_scale has dtype float16; accepted: float32, bfloat16", X, SCALE.half(), None, None
    )
    check_refused(NAME, "activation_scale has dtype bfloat16", X, SCALE, ROWS.bfloat16(), None)
    check_refused(NAME, "bias has dtype int64", X, SCALE, None, SCALE.long())


@pytest.mark.parametrize(
    ("scale_dtype", "output", "accepted"),
    [
        (torch.float32, torch.bfloat16, "float16"),
        (torch.float32, torch.float32, "float16"),
        (torch.bfloat16, torch.float16, "bfloat16"),
        (torch.bfloat16, None, "bfloat16"),
    ],
)
def test_refuses_results_that_the_scale_does_not_allow(
    scale_dtype: torch.dtype, output: torch.dtype | None, accepted: str
) -> None:
    given = str(output or torch.float16).removeprefix("torch.")
    check_refused(
        NAME,
        f"output_dtype is {given}; accepted: {accepted}",
        X,
        SCALE.to(scale_dtype),
        None,
        None,
        output_dtype=output,
    )


def test_refuses_shapes() -> None:
    check_refused(NAME, "x has 3 dimensions; accepted: 2", X[None], SCALE, None, None)
    check_refused(NAME, r"weight_scale has shape \[1\]; accepted: \[3\]", X, SCALE[:1], None, None)
    check_refused(
        NAME, r"activation_scale has shape \[4, 1\]; accepted: \[4\]", X, SCALE, ROWS[:, None], None
    )
    check_refused(NAME, r"bias has shape \[2\]; accepted: \[3\]", X, SCALE, None, SCALE[:2])
