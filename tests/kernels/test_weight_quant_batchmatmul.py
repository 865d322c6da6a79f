from __future__ import annotations

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.reference._quant import pack_int4
from tests.kernels._numerics import ulps

matmul = torch.ops.npu.npu_weight_quant_batchmatmul
DTYPES = [torch.float16, torch.bfloat16]
M, K, N = 5, 48, 16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def exact(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int) -> Tensor:
    """The formula in float64, the dequantized weight rounded to the dtype of x; groups by a plain loop."""
    dequantized = torch.empty(weight.shape, dtype=torch.float64)
    for k in range(weight.size(0)):
        row = k // group_size if scale.dim() == 2 and scale.size(0) > 1 else 0
        s = (scale if scale.dim() == 1 else scale[row]).double()
        o = 0 if offset is None else (offset if offset.dim() == 1 else offset[row]).double()
        dequantized[k] = (weight[k].double() + o) * s
    return x.double() @ dequantized.to(x.dtype).double()


def assert_close(y: Tensor, expected: Tensor) -> None:
    assert y.shape == expected.shape
    # fp32 accumulation: correct rounding up to a neighbour, apart from sums that cancel.
    far = expected.abs() > 1e-2
    assert ulps(y[far], expected[far].to(y.dtype)).max() <= 1
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize(
    ("scale_shape", "group_size"),
    [((1,), 0), ((1, 1), 0), ((N,), 0), ((1, N), 0), ((3, N), 16), ((2, N), 32), ((N,), 32), ((1, N), 64)],
)
def test_matches_float64(
    dtype: torch.dtype, with_offset: bool, scale_shape: tuple[int, ...], group_size: int
) -> None:
    x, weight = torch.randn(M, K).to(dtype), torch.randint(-128, 128, (K, N), dtype=torch.int8)
    scale = (torch.rand(scale_shape) * 0.02).to(dtype)
    offset = torch.randint(-20, 20, scale_shape).to(dtype) if with_offset else None
    y = matmul(x, weight, scale, offset, antiquant_group_size=group_size)
    assert y.dtype == dtype
    assert_close(y, exact(x, weight, scale, offset, group_size))


def test_offset_is_added_not_subtracted() -> None:
    x, weight = torch.ones(1, 1).half(), torch.tensor([[10]], dtype=torch.int8)
    y = matmul(x, weight, torch.tensor([2.0]).half(), torch.tensor([3.0]).half())
    assert y.item() == 26.0


def test_last_group_may_be_short() -> None:
    x, weight = torch.randn(M, 40).half(), torch.randint(-8, 8, (40, N), dtype=torch.int8)
    scale = torch.rand(3, N).half()
    assert_close(matmul(x, weight, scale, antiquant_group_size=16), exact(x, weight, scale, None, 16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_weight_is_rounded_to_the_dtype_of_x(dtype: torch.dtype) -> None:
    weight = torch.tensor([[127], [-128]], dtype=torch.int8)
    scale = torch.tensor([0.3337]).to(dtype)
    x = torch.ones(1, 2).to(dtype)
    rounded = (weight.float() * scale.float()).to(dtype).float().sum()
    assert matmul(x, weight, scale).float().item() == rounded.to(dtype).float().item()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("scale_shape", "group_size"), [((N,), 0), ((3, N), 16)])
def test_int4_weights_are_packed_along_columns_or_transposed_along_rows(
    transposed: bool, scale_shape: tuple[int, ...], group_size: int
) -> None:
    x, weight = torch.randn(M, K).half(), torch.randint(-8, 8, (K, N), dtype=torch.int8)
    scale, offset = torch.rand(scale_shape).half(), torch.randint(-4, 4, scale_shape).half()
    packed = pack_int4(weight.t().contiguous()).t() if transposed else pack_int4(weight)
    assert packed.shape == ((K // 8, N) if transposed else (K, N // 8))
    y = matmul(x, packed, scale, offset, antiquant_group_size=group_size)
    assert torch.equal(y, matmul(x, weight, scale, offset, antiquant_group_size=group_size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_shape", [(N,), (1, N)])
def test_bias_is_added_before_the_rounding(dtype: torch.dtype, bias_shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(M, K).to(dtype), torch.randint(-128, 128, (K, N), dtype=torch.int8)
    scale = (torch.rand(N) * 0.02).to(dtype)
    bias = (torch.randn(bias_shape) * 10).to(torch.float16 if dtype == torch.float16 else torch.float32)
    y = matmul(x, weight, scale, bias=bias)
    assert_close(y, exact(x, weight, scale, None, 0) + bias.double())


@pytest.mark.parametrize("shape", [(1,), (N,), (1, N)])
def test_quant_scale_multiplies_and_gives_int8(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(M, K).half(), torch.randint(-128, 128, (K, N), dtype=torch.int8)
    scale, quant_scale, quant_offset = (
        torch.rand(N).half() * 0.02,
        torch.rand(shape) * 8,
        torch.randn(shape) * 10,
    )
    y = matmul(x, weight, scale, None, quant_scale, quant_offset)
    expected = exact(x, weight, scale, None, 0) * quant_scale.double() + quant_offset.double()
    assert y.dtype == torch.int8
    assert (y - expected.clamp(-128, 127)).abs().max() <= 0.5 + 1e-2
    y = matmul(x, weight, scale, None, quant_scale)
    assert (y - (expected - quant_offset.double()).clamp(-128, 127)).abs().max() <= 0.5 + 1e-2


def test_packed_quant_scale_carries_the_offset() -> None:
    x, weight, scale = (
        torch.randn(M, K).half(),
        torch.randint(-9, 9, (K, N), dtype=torch.int8),
        torch.ones(1).half(),
    )
    bits = torch.tensor([2.0]).view(torch.int32).item()
    packed = torch.tensor([bits | (1 << 46) | ((-3 & 0x1FF) << 37)])
    y = matmul(x, weight, scale, None, packed)
    assert torch.equal(y, matmul(x, weight, scale, None, torch.tensor([2.0]), torch.tensor([-3.0])))


def test_inner_precise_changes_nothing_here() -> None:
    x, weight, scale = (
        torch.randn(M, K).half(),
        torch.randint(-9, 9, (K, N), dtype=torch.int8),
        torch.ones(1).half(),
    )
    assert torch.equal(matmul(x, weight, scale, inner_precise=1), matmul(x, weight, scale))


def test_strided_and_empty_inputs() -> None:
    x = torch.randn(K, M).half().t()
    weight = torch.randint(-128, 128, (N, K), dtype=torch.int8).t()
    scale = torch.rand(N, 1).half().t()
    before = x.clone(), weight.clone()
    y = matmul(x, weight, scale)
    assert torch.equal(y, matmul(x.contiguous(), weight.contiguous(), scale.contiguous()))
    assert y.is_contiguous()
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])
    assert matmul(x[:0], weight, scale).shape == (0, N)
