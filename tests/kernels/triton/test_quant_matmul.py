"""npu_quant_matmul in Triton against the reference kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.reference.quant_matmul import npu_quant_matmul as reference
from npu_fusion.kernels.triton import quant_matmul as family
from tests.kernels.triton._running import assert_agree, run, runs

pytestmark = runs
kernel = family.npu_quant_matmul
INT32, HALF, BFLOAT16 = 3, 5, 15

INNER, COLUMNS = 72, 40


def operands(rows: int, inner: int = INNER, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows)
    shapes = [(rows, inner), (inner, columns)]
    x1, x2 = (torch.randint(-128, 128, shape, dtype=torch.int8, generator=g) for shape in shapes)
    return x1, x2


def check(x1: Tensor, x2: Tensor, scale: Tensor, **call: Any) -> None:
    assert_agree([run(kernel, x1, x2, scale, **call)], [reference(x1, x2, scale, **call)])


OPTIONS: dict[str, dict[str, Any]] = {
    "bfloat16": {"output_dtype": BFLOAT16},
    "every option": {
        "output_dtype": BFLOAT16,
        "pertoken_scale": True,
        "bias": torch.linspace(-2, 2, COLUMNS).bfloat16(),
    },
    "float32 bias": {"output_dtype": HALF, "bias": torch.linspace(-2, 2, COLUMNS)},
    "int32 bias": {"output_dtype": HALF, "bias": torch.arange(COLUMNS, dtype=torch.int32) * 100},
    "int32": {"output_dtype": INT32},
    "int32 with bias": {"output_dtype": INT32, "bias": torch.arange(COLUMNS, dtype=torch.int32)},
    "int8": {},
    "int8 with offset": {"offset": torch.linspace(-9, 9, COLUMNS)},
    "int8 with one offset": {"offset": torch.tensor([3.5]), "bias": torch.arange(COLUMNS, dtype=torch.int32)},
}


@pytest.mark.parametrize("rows", [1, 17, 65])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_output_on_both_ways(rows: int, options: str, transposed: bool) -> None:
    assert family._by_library(rows, INNER, COLUMNS) == (rows > family.FEW_ROWS)
    x1, x2 = operands(rows)
    call = dict(OPTIONS[options])
    if "pertoken_scale" in call:
        call["pertoken_scale"] = torch.rand(rows) + 0.5
    scale = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)) * 1e-3
    check(x1, x2.t().contiguous().t() if transposed else x2, scale, **call)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize(("inner", "columns"), [(1, 1), (33, 50), (300, 130)])
def test_sizes_that_are_no_multiples(rows: int, inner: int, columns: int) -> None:
    check(*operands(rows, inner, columns), torch.tensor([1e-3]), output_dtype=BFLOAT16)


@pytest.mark.parametrize("output_dtype", [None, HALF])
def test_packed_scales(output_dtype: int | None) -> None:
    bits = (torch.rand(COLUMNS) * 1e-3).view(torch.int32).to(torch.int64) & 0xFFFFE000
    check(*operands(5), bits | (7 << 37), output_dtype=output_dtype)


def test_leading_dimensions_strides_and_no_rows() -> None:
    x1, x2 = operands(6)
    scale = torch.tensor([1e-3])
    per_token = torch.rand(3)
    check(x1.view(2, 3, INNER), x2, scale, output_dtype=BFLOAT16, pertoken_scale=per_token)
    check(x1.view(2, 3, INNER), x2, scale, bias=torch.ones(1, 1, COLUMNS).int()[0, 0], output_dtype=BFLOAT16)
    check(torch.cat([x1, x1], dim=1)[:, 1 : INNER + 1], x2, scale)
    check(x1.t().contiguous().t(), x2[:, ::2], scale)
    check(x1[:0], x2, scale, output_dtype=BFLOAT16)


def test_leaves_batches_of_weights_to_the_reference_kernel() -> None:
    x1, x2 = operands(2)
    assert kernel(x1, x2[None], torch.ones(1)) is NotImplemented


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_leaves_floating_point_operands_to_the_reference_kernel(dtype: torch.dtype) -> None:
    """Both have a byte for each number, as int8 has."""
    x1, x2 = torch.ones(2, INNER).to(dtype), torch.ones(INNER, COLUMNS).to(dtype)
    numbers = {"x1_dtype": 290, "x2_dtype": 290} if dtype == torch.uint8 else {}
    assert kernel(x1, x2, torch.ones(1), output_dtype=BFLOAT16, **numbers) is NotImplemented
