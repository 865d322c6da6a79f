from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_quant_matmul"
INT8, INT32, FP16, BF16 = 1, 3, 5, 15
DTYPE = {None: torch.int8, INT8: torch.int8, INT32: torch.int32, FP16: torch.float16, BF16: torch.bfloat16}

X1, X2 = torch.ones(3, 8, dtype=torch.int8), torch.ones(8, 4, dtype=torch.int8)
SCALE, ROWS = torch.ones(4), torch.ones(3)


@pytest.mark.parametrize("output", [None, INT8, INT32, FP16, BF16])
@pytest.mark.parametrize(
    ("x1_shape", "x2_shape", "shape"),
    [
        ((3, 8), (8, 4), (3, 4)),
        ((2, 3, 8), (8, 4), (2, 3, 4)),
        ((2, 1, 3, 8), (5, 8, 4), (2, 5, 3, 4)),
        ((0, 8), (8, 4), (0, 4)),
    ],
)
def test_fake_and_real_agree(
    output: int | None, x1_shape: tuple[int, ...], x2_shape: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    x1 = torch.randint(-128, 128, x1_shape, dtype=torch.int8)
    x2 = torch.randint(-128, 128, x2_shape, dtype=torch.int8).mT.contiguous().mT
    y = check_operator(NAME, x1, x2, SCALE, output_dtype=output)
    assert (y.shape, y.dtype) == (shape, DTYPE[output])


@pytest.mark.parametrize(
    ("output", "scale_dtype", "bias_dtype", "with_rows", "with_offset"),
    [
        (FP16, torch.int64, torch.int32, False, False),
        (FP16, torch.float32, torch.float32, False, False),
        (FP16, torch.float32, torch.float16, True, False),
        (INT8, torch.int64, torch.int32, False, False),
        (INT8, torch.float32, torch.int32, False, True),
        (BF16, torch.float32, torch.int32, True, False),
        (BF16, torch.bfloat16, torch.bfloat16, True, False),
        (BF16, torch.bfloat16, torch.float32, False, False),
        (INT32, torch.bfloat16, torch.int32, False, False),
    ],
)
def test_dtype_combinations(
    output: int, scale_dtype: torch.dtype, bias_dtype: torch.dtype, with_rows: bool, with_offset: bool
) -> None:
    check_operator(
        NAME,
        X1,
        X2,
        SCALE.to(scale_dtype),
        offset=torch.ones(1) if with_offset else None,
        pertoken_scale=ROWS if with_rows else None,
        bias=torch.ones(4).to(bias_dtype),
        output_dtype=output,
    )


def test_batched_bias() -> None:
    bias = torch.ones(2, 1, 4, dtype=torch.int32)
    check_operator(NAME, X1.expand(2, 3, 8), X2, SCALE, bias=bias, output_dtype=INT32)


@pytest.mark.parametrize("output", [None, INT32, BF16])
def test_dynamic_rows_in_one_graph(output: int | None) -> None:
    compile_dynamic(
        lambda x1: torch.ops.npu.npu_quant_matmul(x1, X2, SCALE, output_dtype=output),
        lambda t: [torch.ones(t, 8, dtype=torch.int8)],
        [2, 7, 3],
    )


def test_dynamic_everything_in_one_graph() -> None:
    def arguments(t: int) -> list[torch.Tensor]:
        x1, x2 = torch.ones(t + 1, t, 2 * t, dtype=torch.int8), torch.ones(2 * t, 3 * t, dtype=torch.int8)
        return [x1, x2, torch.rand(3 * t), torch.rand(t), torch.rand(3 * t)]

    compile_dynamic(
        lambda x1, x2, scale, rows, bias: torch.ops.npu.npu_quant_matmul(
            x1, x2, scale, pertoken_scale=rows, bias=bias, output_dtype=BF16
        ),
        arguments,
        [2, 7, 3],
        dynamic=[(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (3, 0), (4, 0)],
    )


def test_refuses_operands() -> None:
    check_refused(NAME, "x1 has dtype int32; accepted: int8, float8_e4m3fn", X1.int(), X2, SCALE)
    check_refused(NAME, "x2 has dtype float16; accepted: int8", X1, X2.half(), SCALE)
    check_refused(NAME, "x1 has 1 dimensions; accepted: 2 to 6", X1[0], X2, SCALE)
    check_refused(NAME, "x2 has 7 dimensions; accepted: 2 to 6", X1, X2.expand(1, 1, 1, 1, 1, 8, 4), SCALE)
    check_refused(NAME, "x1 has 8 columns, x2 7 rows", X1, X2[:7], SCALE)
    check_refused(
        NAME, r"batches of x1 and x2 are \[2\] and \[3\]", X1.expand(2, 3, 8), X2.expand(3, 8, 4), SCALE
    )


@pytest.mark.parametrize(
    "kwargs",
    [
        {"pertoken_scale_dtype": 44},
        {"scale_dtype": 293},
        {"group_sizes": [1, 128, 128]},
        {"y_scale": torch.ones(1)},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_refuses_what_int8_has_no_use_for(kwargs: dict[str, Any]) -> None:
    message = f"{next(iter(kwargs))} is given; accepted: None with int8 operands"
    check_refused(NAME, message, X1, X2, SCALE, **kwargs)


def test_refuses_numbers_of_types() -> None:
    check_refused(NAME, "x1_dtype is 1; accepted: None for int8", X1, X2, SCALE, x1_dtype=1)
    check_refused(NAME, "x2_dtype is 285; accepted: None for int8", X1, X2, SCALE, x2_dtype=285)


@pytest.mark.parametrize("output", [0, 2, 6, 12, 290])
def test_refuses_output_dtypes(output: int) -> None:
    # 2 is int8 in the graph engine below torch_npu, and int16 here.
    check_refused(
        NAME, rf"output_dtype is {output}; accepted: None or 1 \(int8\)", X1, X2, SCALE, output_dtype=output
    )


@pytest.mark.parametrize(
    ("output", "scale_dtype", "accepted"),
    [
        (None, torch.bfloat16, "float32, int64"),
        (INT32, torch.int64, "float32, bfloat16"),
        (FP16, torch.bfloat16, "float32, int64"),
        (BF16, torch.int64, "float32, bfloat16"),
        (BF16, torch.float16, "float32, bfloat16"),
    ],
)
def test_refuses_scale_dtypes(output: int | None, scale_dtype: torch.dtype, accepted: str) -> None:
    given = str(scale_dtype).removeprefix("torch.")
    message = f"scale has dtype {given}; accepted: {accepted} with output_dtype"
    check_refused(NAME, message, X1, X2, SCALE.to(scale_dtype), output_dtype=output)


@pytest.mark.parametrize("output", [INT32, FP16, BF16])
def test_refuses_an_offset_without_int8_output(output: int) -> None:
    check_refused(NAME, "offset is given with output_dtype", X1, X2, SCALE, offset=SCALE, output_dtype=output)


def test_refuses_an_offset_beside_a_packed_scale() -> None:
    check_refused(NAME, "offset is given .* a scale of dtype int64", X1, X2, SCALE.long(), offset=SCALE)


@pytest.mark.parametrize(
    ("output", "scale_dtype"), [(None, torch.float32), (INT32, torch.float32), (FP16, torch.int64)]
)
def test_refuses_a_pertoken_scale(output: int | None, scale_dtype: torch.dtype) -> None:
    scale = SCALE.to(scale_dtype)
    check_refused(
        NAME, "pertoken_scale is given with", X1, X2, scale, pertoken_scale=ROWS, output_dtype=output
    )


@pytest.mark.parametrize(
    ("output", "bias_dtype", "with_rows"),
    [
        (None, torch.float32, False),
        (INT32, torch.float32, False),
        (FP16, torch.float16, False),
        (FP16, torch.bfloat16, True),
        (BF16, torch.float16, True),
        (BF16, torch.int64, True),
    ],
)
def test_refuses_bias_dtypes(output: int | None, bias_dtype: torch.dtype, with_rows: bool) -> None:
    check_refused(
        NAME,
        f"bias has dtype {str(bias_dtype).removeprefix('torch.')}; accepted: int32",
        X1,
        X2,
        SCALE,
        pertoken_scale=ROWS if with_rows else None,
        bias=SCALE.to(bias_dtype),
        output_dtype=output,
    )


def test_refuses_other_dtypes() -> None:
    check_refused(NAME, "offset has dtype float16; accepted: float32", X1, X2, SCALE, offset=SCALE.half())
    rows = ROWS.bfloat16()
    check_refused(
        NAME, "pertoken_scale has dtype bfloat16", X1, X2, SCALE, pertoken_scale=rows, output_dtype=BF16
    )


def test_refuses_shapes() -> None:
    check_refused(NAME, r"scale has shape \[3\]; accepted: \[4\]", X1, X2, SCALE[:3])
    check_refused(NAME, r"scale has shape \[1, 4\]; accepted: \[4\]", X1, X2, SCALE[None])
    check_refused(NAME, r"offset has shape \[2\]; accepted: \[4\]", X1, X2, SCALE, offset=SCALE[:2])
    check_refused(
        NAME,
        r"pertoken_scale has shape \[1\]; accepted: \[3\]",
        X1,
        X2,
        SCALE,
        pertoken_scale=ROWS[:1],
        output_dtype=BF16,
    )
    bias = torch.ones(4, dtype=torch.int32)
    check_refused(NAME, r"bias has shape \[1\]; accepted: \[4\]", X1, X2, SCALE, bias=bias[:1])
    check_refused(NAME, r"bias has shape \[1, 1, 4\]; accepted: \[4\]", X1, X2, SCALE, bias=bias[None, None])
    check_refused(
        NAME,
        r"bias has shape \[3, 1, 4\]; accepted: \[2, 1, 4\]",
        X1.expand(2, 3, 8),
        X2,
        SCALE,
        bias=bias.expand(3, 1, 4),
    )
