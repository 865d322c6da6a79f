from __future__ import annotations

import pytest
import torch

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_weight_quant_batchmatmul"
M, K, N = 3, 32, 16
X, WEIGHT = torch.ones(M, K).half(), torch.ones(K, N, dtype=torch.int8)
SCALE = torch.ones(N).half()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 0])
@pytest.mark.parametrize(
    ("scale_shape", "group_size"), [((1,), 0), ((1, 1), 0), ((N,), 0), ((1, N), 0), ((2, N), 16)]
)
def test_fake_and_real_agree(
    dtype: torch.dtype, rows: int, scale_shape: tuple[int, ...], group_size: int
) -> None:
    scale = torch.ones(scale_shape, dtype=dtype)
    y = check_operator(
        NAME, torch.randn(rows, K).to(dtype), WEIGHT, scale, scale, antiquant_group_size=group_size
    )
    assert (y.shape, y.dtype) == ((rows, N), dtype)


def test_int4_weights() -> None:
    packed = torch.ones(K, N // 8, dtype=torch.int32)
    assert check_operator(NAME, X, packed, SCALE).shape == (M, N)
    packed = torch.ones(N, K // 8, dtype=torch.int32).t()
    assert check_operator(NAME, X, packed, SCALE).shape == (M, N)


@pytest.mark.parametrize(
    ("dtype", "bias_dtype"), [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("shape", [(N,), (1, N)])
def test_bias(dtype: torch.dtype, bias_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    bias = torch.ones(shape, dtype=bias_dtype)
    check_operator(NAME, X.to(dtype), WEIGHT, SCALE.to(dtype), bias=bias)


@pytest.mark.parametrize("shape", [(1,), (N,), (1, N), (1, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_quantized_result(shape: tuple[int, ...], packed: bool) -> None:
    if packed:
        y = check_operator(NAME, X, WEIGHT, SCALE, quant_scale=torch.ones(shape, dtype=torch.int64))
    else:
        y = check_operator(
            NAME, X, WEIGHT, SCALE, quant_scale=torch.ones(shape), quant_offset=torch.ones(shape)
        )
    assert (y.shape, y.dtype) == ((M, N), torch.int8)


def test_strided_operands() -> None:
    check_operator(NAME, torch.randn(K, M).half().t(), torch.ones(N, K, dtype=torch.int8).t(), SCALE)


def test_dynamic_rows_in_one_graph() -> None:
    compile_dynamic(
        lambda x: torch.ops.npu.npu_weight_quant_batchmatmul(x, WEIGHT, SCALE),
        lambda t: [torch.randn(t, K).half()],
        [2, 7, 3],
    )


def test_dynamic_everything_in_one_graph() -> None:
    def arguments(t: int) -> list[torch.Tensor]:
        x, weight = torch.randn(t, 16 * t).half(), torch.ones(16 * t, 3 * t, dtype=torch.int8)
        return [x, weight, torch.ones(t, 3 * t).half(), torch.ones(3 * t).half()]

    compile_dynamic(
        lambda x, weight, scale, bias: torch.ops.npu.npu_weight_quant_batchmatmul(
            x, weight, scale, bias=bias, antiquant_group_size=16
        ),
        arguments,
        [2, 5, 3],
        dynamic=[(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)],
    )


def test_refuses_dtypes() -> None:
    check_refused(NAME, "x has dtype float32; accepted: float16, bfloat16", X.float(), WEIGHT, SCALE)
    accepted = "accepted: int8, int32, float8_e4m3fn, float32, uint8"
    check_refused(NAME, f"weight has dtype float16; {accepted}", X, WEIGHT.half(), SCALE)
    check_refused(NAME, "antiquant_scale has dtype int64; accepted: float16", X, WEIGHT, SCALE.long())
    check_refused(NAME, "antiquant_scale has dtype bfloat16", X, WEIGHT, SCALE.bfloat16())
    check_refused(NAME, "antiquant_offset has dtype float32", X, WEIGHT, SCALE, SCALE.float())
    check_refused(NAME, "bias has dtype float32; accepted: float16", X, WEIGHT, SCALE, bias=SCALE.float())
    bf16 = X.bfloat16(), WEIGHT, SCALE.bfloat16()
    check_refused(NAME, "bias has dtype bfloat16; accepted: float32", *bf16, bias=SCALE.bfloat16())
    check_refused(
        NAME, "quant_scale has dtype float16; accepted: float32, int64", X, WEIGHT, SCALE, None, SCALE
    )
    quant = SCALE.float()
    check_refused(NAME, "quant_offset has dtype int32", X, WEIGHT, SCALE, None, quant, quant.int())


def test_refuses_modes() -> None:
    check_refused(NAME, "inner_precise is 2; accepted: 0, 1", X, WEIGHT, SCALE, inner_precise=2)
    check_refused(NAME, "weight_dtype is 285; accepted: None for int8", X, WEIGHT, SCALE, weight_dtype=285)
    check_refused(
        NAME, "antiquant_group_size is -1; accepted: 0 or more", X, WEIGHT, SCALE, antiquant_group_size=-1
    )


def test_refuses_operand_shapes() -> None:
    check_refused(NAME, "x has 3 dimensions; accepted: 2", X[None], WEIGHT, SCALE)
    check_refused(NAME, "weight has 3 dimensions; accepted: 2", X, WEIGHT[None], SCALE)
    check_refused(NAME, "x has 32 columns, weight 31 rows", X, WEIGHT[:31], SCALE)
    sliced = torch.ones(K, 4, dtype=torch.int32)[:, ::2]
    check_refused(
        NAME, "weight is int4 in int32 with strides .*; accepted: contiguous, or the", X, sliced, SCALE
    )


def test_refuses_antiquant_shapes() -> None:
    check_refused(NAME, r"antiquant_scale has shape \[15\]; accepted: \[16\]", X, WEIGHT, SCALE[:15])
    check_refused(
        NAME, r"antiquant_scale has shape \[1, 15\]; accepted: \[1, 16\]", X, WEIGHT, SCALE[None, :15]
    )
    check_refused(NAME, "antiquant_scale has 3 dimensions", X, WEIGHT, SCALE[None, None])
    groups = SCALE.expand(3, N)
    check_refused(NAME, "antiquant_group_size .* is 0; accepted: a positive", X, WEIGHT, groups)
    check_refused(
        NAME,
        r"antiquant_scale has shape \[3, 16\]; accepted: \[2, 16\]",
        X,
        WEIGHT,
        groups,
        antiquant_group_size=16,
    )
    check_refused(NAME, r"antiquant_offset has shape \[1\]; accepted: \[16\]", X, WEIGHT, SCALE, SCALE[:1])


def test_refuses_output_parameters() -> None:
    quant = SCALE.float()
    check_refused(NAME, r"bias has shape \[1\]; accepted: \[16\]", X, WEIGHT, SCALE, bias=SCALE[:1])
    check_refused(NAME, "bias has 3 dimensions; accepted: 1 to 2", X, WEIGHT, SCALE, bias=SCALE[None, None])
    check_refused(NAME, "quant_offset is given; accepted: None without", X, WEIGHT, SCALE, None, None, quant)
    check_refused(NAME, "quant_offset is given; .* int64", X, WEIGHT, SCALE, None, quant.long(), quant)
    check_refused(NAME, r"quant_scale has shape \[2\]; accepted: \[16\]", X, WEIGHT, SCALE, None, quant[:2])
    check_refused(
        NAME, r"quant_offset has shape \[1\]; accepted: \[16\]", X, WEIGHT, SCALE, None, quant, quant[:1]
    )
