from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from npu_fusion import formats
from tests.formats._numbers import boundaries, every, nearest, patterns

NAMES = ["float8_e4m3fn", "float8_e5m2"]


def finite(name: str) -> Tensor:
    numbers = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name)).double()
    return numbers[numbers.isfinite()]


def inputs(name: str) -> list[Tensor]:
    return [every(torch.float16), every(torch.bfloat16), patterns(20_000), boundaries(finite(name))]


@pytest.mark.parametrize("name", NAMES)
def test_saturated_numbers_go_to_the_nearest(name: str) -> None:
    for x in inputs(name):
        x = x[~x.isnan()]
        y = formats.encode(x, name)
        assert y.dtype == getattr(torch, name)
        wanted = nearest(x.nan_to_num(posinf=1e30, neginf=-1e30), finite(name), "even")
        torch.testing.assert_close(y.double(), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_unsaturated_bits_are_those_of_ml_dtypes(name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for x in inputs(name):
        with np.errstate(invalid="ignore", over="ignore"):
            oracle = torch.from_numpy(x.float().numpy().astype(getattr(ml_dtypes, name)).view(np.uint8))
        y = formats.encode(x, name, saturate=False)
        known = ~x.isnan()
        assert torch.equal(y.view(torch.uint8)[known], oracle[known])
        assert y.float()[~known].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_saturation(name: str) -> None:
    largest = formats.MAXIMUM[name]
    x = torch.tensor([math.inf, -math.inf, 1e30, math.nan])
    assert formats.encode(x, name).float()[:3].tolist() == [largest, -largest, largest]
    assert formats.encode(x, name)[3].float().isnan()


@pytest.mark.parametrize("name", NAMES)
def test_every_code(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name))
    value = formats.decode(codes, name)
    assert value.dtype == torch.float32 and value.isfinite().sum() == finite(name).numel()
    kept = ~value.isnan()
    again = formats.encode(value, name, saturate=False)
    assert torch.equal(again.view(torch.uint8)[kept], codes.view(torch.uint8)[kept])


def test_the_result_is_a_new_tensor_of_the_same_shape() -> None:
    x = torch.randn(4, 6).t()
    for saturate in (True, False):
        y = formats.encode(x, "float8_e4m3fn", saturate=saturate)
        assert torch.equal(
            y.float(), formats.encode(x.contiguous(), "float8_e4m3fn", saturate=saturate).float()
        )


@pytest.mark.parametrize("saturate", [True, False])
def test_a_compiled_graph_computes_the_same(saturate: bool) -> None:
    def encode(x: Tensor) -> Tensor:
        return formats.decode(formats.encode(x, "float8_e5m2", saturate=saturate), "float8_e5m2")

    torch._dynamo.reset()
    compiled = torch.compile(encode, backend="aot_eager", fullgraph=True)
    x = boundaries(finite("float8_e5m2"))
    torch.testing.assert_close(compiled(x), encode(x), rtol=0, atol=0, equal_nan=True)
