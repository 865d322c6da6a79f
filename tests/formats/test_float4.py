from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from npu_fusion import formats
from tests.formats._numbers import boundaries, every, nearest, patterns

NUMBERS = {
    "float4_e2m1": [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    "float4_e1m2": [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75],
}
NAMES = list(NUMBERS)


def inputs(name: str) -> list[Tensor]:
    table = torch.tensor(NUMBERS[name])
    return [every(torch.float16), every(torch.bfloat16), patterns(20_000), boundaries(table)]


@pytest.mark.parametrize("name", NAMES)
def test_every_code(name: str) -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    value = formats.decode(codes, name)
    assert value.dtype == torch.float32
    assert value.tolist() == NUMBERS[name] + [-number for number in NUMBERS[name]]
    assert formats.encode(value, name).tolist() == codes.tolist()
    # Only the low nibble counts.
    assert torch.equal(formats.decode(codes | 0x70, name), value)
    assert max(NUMBERS[name]) == formats.MAXIMUM[name]


@pytest.mark.parametrize("name", NAMES)
def test_numbers_go_to_the_nearest(name: str) -> None:
    for x in inputs(name):
        x = x[~x.isnan()]
        codes = formats.encode(x, name)
        wanted = nearest(x.nan_to_num(posinf=1e30, neginf=-1e30), torch.tensor(NUMBERS[name]), "even")
        assert codes.dtype == torch.uint8
        assert torch.equal(formats.decode(codes, name).double(), wanted)
        assert torch.equal(codes >= 8, torch.signbit(x))


@pytest.mark.parametrize("name", NAMES)
def test_the_codes_of_en_dtypes(name: str) -> None:
    oracle_dtype = getattr(pytest.importorskip("en_dtypes"), name)
    for x in inputs(name):
        with np.errstate(invalid="ignore"):
            oracle = x.float().numpy().astype(oracle_dtype).view(np.uint8)
        np.testing.assert_array_equal(formats.encode(x, name).numpy(), oracle)


def test_the_codes_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for x in inputs("float4_e2m1"):
        x = x[~x.isnan()]
        oracle = x.float().numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        np.testing.assert_array_equal(formats.encode(x, "float4_e2m1").numpy(), oracle)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite(name: str) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, -math.nan, -0.0])
    assert formats.encode(x, name).tolist() == [7, 15, 0, 8, 8]


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_graph_computes_the_same(name: str) -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = formats.encode(x, name)
        return codes, formats.decode(codes, name)

    x = torch.cat([every(torch.bfloat16).float(), patterns(999)])
    for given, wanted in zip(
        torch.compile(both, backend="aot_eager", fullgraph=True)(x), both(x), strict=True
    ):
        assert torch.equal(given, wanted)
