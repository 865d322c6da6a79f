from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.kernels.reference._quant import pack_quant_param
from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_quant_conv2d"
FP16, FP32, BF16, HIFLOAT8 = 5, 6, 15, 290
DTYPE = {FP16: torch.float16, FP32: torch.float32, BF16: torch.bfloat16, HIFLOAT8: torch.uint8}
INT8 = torch.ones(2, 4, 7, 6, dtype=torch.int8), torch.ones(6, 4, 3, 2, dtype=torch.int8)
FLOAT8 = INT8[0].to(torch.float8_e4m3fn), INT8[1].to(torch.float8_e4m3fn)
CODES = INT8[0].byte(), INT8[1].byte()
SCALE, BIAS = pack_quant_param(torch.ones(6)), torch.ones(6)
HIF = {"input_dtype": HIFLOAT8, "weight_dtype": HIFLOAT8}


@pytest.mark.parametrize(
    ("operands", "output", "kwargs"),
    [
        (INT8, FP16, {"bias": BIAS.int()}),
        (FLOAT8, FP16, {}),
        (FLOAT8, FP32, {"bias": BIAS}),
        (FLOAT8, BF16, {}),
        (CODES, FP16, HIF),
        (CODES, FP32, HIF),
        (CODES, BF16, {**HIF, "bias": BIAS}),
        (CODES, HIFLOAT8, {**HIF, "round_mode": "round"}),
    ],
)
def test_dtypes(operands: tuple[Tensor, Tensor], output: int, kwargs: dict[str, Any]) -> None:
    y = check_operator(NAME, *operands, SCALE, output_dtype=output, **kwargs)
    assert (y.shape, y.dtype) == ((2, 6, 5, 5), DTYPE[output])


@pytest.mark.parametrize(
    ("strides", "pads", "dilations", "groups"),
    [
        ((2, 1), (0, 0), (1, 1), 1),
        ((1, 3), (2, 1), (1, 1), 1),
        ((1, 1), (1, 2), (2, 3), 1),
        ((2, 2), (3, 0), (1, 2), 2),
    ],
)
def test_shapes(
    strides: tuple[int, int], pads: tuple[int, int], dilations: tuple[int, int], groups: int
) -> None:
    weight = INT8[1][:, : 4 // groups]
    y = check_operator(NAME, INT8[0], weight, SCALE, strides, pads, dilations, groups, output_dtype=FP16)
    plain = torch.nn.functional.conv2d(
        INT8[0].float(), weight.float(), None, strides, pads, dilations, groups
    )
    assert y.shape == plain.shape


def test_one_number_for_both_dimensions() -> None:
    y = check_operator(NAME, *INT8, SCALE, 2, 1, 1, output_dtype=FP16)
    assert y.shape == (2, 6, 4, 4)


def test_no_images_and_strided_operands() -> None:
    assert check_operator(NAME, INT8[0][:0], INT8[1], SCALE, output_dtype=FP16).shape == (0, 6, 5, 5)
    last = INT8[0].contiguous(memory_format=torch.channels_last)
    assert check_operator(NAME, last, INT8[1], SCALE, output_dtype=FP16).is_contiguous()


def test_dynamic_images_in_one_graph() -> None:
    compile_dynamic(
        lambda x: torch.ops.npu.npu_quant_conv2d(x, FLOAT8[1], SCALE, output_dtype=BF16),
        lambda t: [torch.ones(t, 4, 7, 6).to(torch.float8_e4m3fn)],
        [2, 7, 3],
    )
    compile_dynamic(
        lambda x: torch.ops.npu.npu_quant_conv2d(x, INT8[1], SCALE, 2, 1, output_dtype=FP16),
        lambda t: [torch.ones(2, 4, 3 * t, 5 * t, dtype=torch.int8)],
        [2, 7, 3],
        dynamic=[(0, 2), (0, 3)],
    )


def refused(
    message: str, operands: tuple[Tensor, Tensor] = INT8, scale: Tensor = SCALE, **changes: Any
) -> None:
    check_refused(NAME, message, *operands, scale, **{"output_dtype": FP16, **changes})


def test_refuses_operands() -> None:
    refused("input has dtype float16; accepted: int8, float8_e4m3fn, uint8", (INT8[0].half(), INT8[1]))
    refused("weight has dtype uint8; accepted: int8", (INT8[0], CODES[1]))
    refused("input_dtype is None; accepted: 290 for uint8", CODES)
    refused("weight_dtype is None; accepted: 290 for uint8", CODES, input_dtype=HIFLOAT8)
    refused("input_dtype is 290; accepted: None for int8", **HIF)
    refused("input_dtype is 292; accepted: None for float8_e4m3fn", FLOAT8, input_dtype=292)
    refused("input has 3 dimensions; accepted: 4", (INT8[0][0], INT8[1]))
    refused("weight has 3 dimensions; accepted: 4", (INT8[0], INT8[1][0]))
    refused("input has 4 channels, weight 4 and groups is 2", groups=2)
    refused("weight has 5 rows and groups is 2", (INT8[0], INT8[1][:5, :2]), SCALE[:5], groups=2)
    refused("weight has a kernel of .0, 2.; accepted: 1 to 511", (INT8[0], INT8[1][:, :, :0]))
    refused("weight has a kernel of .512, 2.", (INT8[0], INT8[1][:, :, :1].expand(6, 4, 512, 2)))
    refused("the result is .-1, 5. large; accepted: a positive size", (INT8[0][:, :, :1], INT8[1]))


@pytest.mark.parametrize(
    ("operands", "kwargs", "output", "accepted"),
    [
        (INT8, {}, None, r"5 \(float16\)"),
        (INT8, {}, BF16, r"5 \(float16\)"),
        (FLOAT8, {}, HIFLOAT8, r"5 \(float16\), 6 \(float32\), 15 \(bfloat16\)"),
        (FLOAT8, {}, 24, r"5 \(float16\), 6 \(float32\), 15 \(bfloat16\)"),
        (CODES, HIF, 1, r"5 \(float16\), 6 \(float32\), 15 \(bfloat16\), 290 \(hifloat8\)"),
    ],
)
def test_refuses_results(
    operands: tuple[Tensor, Tensor], kwargs: dict[str, Any], output: int | None, accepted: str
) -> None:
    refused(f"output_dtype is {output}; accepted: {accepted}$", operands, output_dtype=output, **kwargs)


def test_refuses_scale_and_bias() -> None:
    refused("scale has dtype float32; accepted: int64", scale=BIAS)
    refused(r"scale has shape \[1\]; accepted: \[6\]", scale=SCALE[:1])
    refused("bias has dtype float32; accepted: int32", bias=BIAS)
    refused("bias has dtype int32; accepted: float32", FLOAT8, bias=BIAS.int())
    refused(r"bias has shape \[5\]; accepted: \[6\]", bias=BIAS[:5].int())
    refused("offset is given; accepted: None", offset=BIAS)


def test_refuses_attributes() -> None:
    refused("strides is .0, 1.; accepted: two numbers of 1 to 63", strides=(0, 1))
    refused("strides is .1, 64.; accepted: two numbers of 1 to 63", strides=(1, 64))
    refused("strides is .1, 1, 1.; accepted: two numbers", strides=(1, 1, 1))
    refused("pads is .-1, 0.; accepted: two numbers of 0 to 255", pads=(-1, 0))
    refused("pads is .0, 256.; accepted: two numbers of 0 to 255", pads=(0, 256))
    refused("dilations is .1, 0.; accepted: two numbers of 1 to 255", dilations=(1, 0))
    refused("dilations is .256, 1.; accepted: two numbers of 1 to 255", dilations=(256, 1))
    refused("groups is 0; accepted: 1 or more", groups=0)
    refused("offset_x is 1; accepted: 0", offset_x=1)
    refused("round_mode is 'round'; accepted: 'rint'", round_mode="round")
    refused("round_mode is 'rint'; accepted: 'round'", CODES, output_dtype=HIFLOAT8, **HIF)
