from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from npu_fusion import formats
from npu_fusion.formats import hifloat8
from tests.formats._numbers import boundaries, every, nearest, patterns

CODES = torch.arange(256, dtype=torch.uint8)
INF, NEGATIVE_INF, NAN, LARGEST = 0x6F, 0xEF, 0x80, 0x6E


def by_definition(code: int) -> float:
    """The number of a code, read off its bits from left to right."""
    text = f"{code:08b}"
    sign, rest = (-1.0 if text[0] == "1" else 1.0), text[1:]
    if code in (0x00, 0x80, 0x6F, 0xEF):
        return {0x00: 0.0, 0x80: math.nan, 0x6F: math.inf, 0xEF: -math.inf}[code]
    for prefix, digits in (("11", 4), ("10", 3), ("01", 2), ("001", 1), ("0001", 0)):
        if rest.startswith(prefix):
            rest = rest.removeprefix(prefix)
            field, mantissa = rest[:digits], rest[digits:]
            size = int("1" + field[1:], 2) if digits else 0
            exponent = -size if field.startswith("1") else size
            return sign * 2.0**exponent * (1 + int(mantissa, 2) / 2 ** len(mantissa))
    return sign * 2.0 ** (int(rest.removeprefix("0000"), 2) - 23)


VALUES = torch.tensor([by_definition(code) for code in range(256)], dtype=torch.float64)
FINITE = VALUES[VALUES.isfinite()]


def expected(x: Tensor, saturate: bool) -> Tensor:
    """The codes by searching among all numbers."""
    code_of = {value: code for code, value in enumerate(VALUES.tolist()) if math.isfinite(value)}
    found = nearest(x.nan_to_num(nan=0.0, posinf=1e30, neginf=-1e30), FINITE, "away").tolist()
    codes = torch.tensor([code_of[value] for value in found], dtype=torch.uint8)
    over = x.isinf() if saturate else x.abs() >= 40960
    codes = torch.where(over, torch.where(x > 0, INF, NEGATIVE_INF).to(torch.uint8), codes)
    return torch.where(x.isnan(), torch.tensor(NAN, dtype=torch.uint8), codes)


def test_every_code() -> None:
    value = formats.decode(CODES, "hifloat8")
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), VALUES, rtol=0, atol=0, equal_nan=True)
    assert FINITE.unique().numel() == 253
    assert (FINITE.max(), FINITE[FINITE > 0].min()) == (formats.MAXIMUM["hifloat8"], 2.0**-22)


def test_every_code_of_en_dtypes() -> None:
    en_dtypes = pytest.importorskip("en_dtypes")
    oracle = torch.from_numpy(CODES.numpy().view(en_dtypes.hifloat8).astype(np.float32))
    torch.testing.assert_close(formats.decode(CODES, "hifloat8"), oracle, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("saturate", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_goes_to_the_nearest(dtype: torch.dtype, saturate: bool) -> None:
    x = every(dtype)
    assert formats.encode(x, "hifloat8", saturate=saturate).tolist() == expected(x, saturate).tolist()


@pytest.mark.parametrize("saturate", [True, False])
def test_float32_is_rounded_once(saturate: bool) -> None:
    x = torch.cat([boundaries(FINITE), patterns(20_000)])
    assert formats.encode(x, "hifloat8", saturate=saturate).tolist() == expected(x, saturate).tolist()


def test_rounding_by_way_of_bfloat16_would_be_wrong() -> None:
    """Just below half-way between 1 and 1.125: bfloat16 has nothing nearer than half-way."""
    x = torch.tensor(1.0625).nextafter(torch.tensor(0.0))
    assert formats.decode(formats.encode(x, "hifloat8"), "hifloat8") == 1.0
    assert formats.decode(formats.encode(x.bfloat16(), "hifloat8"), "hifloat8") == 1.125


def test_the_codes_of_en_dtypes() -> None:
    en_dtypes = pytest.importorskip("en_dtypes")
    for x in (every(torch.float16), every(torch.bfloat16), patterns(500_000), boundaries(FINITE)):
        with np.errstate(invalid="ignore"):
            oracle = x.float().numpy().astype(en_dtypes.hifloat8).view(np.uint8)
        np.testing.assert_array_equal(formats.encode(x, "hifloat8", saturate=False).numpy(), oracle)


def test_overflow() -> None:
    x = torch.tensor([40959.996, 40960.0, -3e38, math.inf, -math.inf, math.nan])
    assert formats.encode(x, "hifloat8").tolist() == [
        LARGEST,
        LARGEST,
        LARGEST | 0x80,
        INF,
        NEGATIVE_INF,
        NAN,
    ]
    unbounded = formats.encode(x, "hifloat8", saturate=False).tolist()
    assert unbounded == [LARGEST, INF, NEGATIVE_INF, INF, NEGATIVE_INF, NAN]


def test_there_is_no_negative_zero() -> None:
    assert formats.encode(torch.tensor([-0.0, -1e-30, -(2.0**-24)]), "hifloat8").tolist() == [0, 0, 0]


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x7F80FFFF])
def test_every_nan_stays_one(bits: int) -> None:
    """The first has no bit in the half by which the table is read."""
    for pattern in (bits, bits - (1 << 31)):
        x = torch.tensor([pattern], dtype=torch.int32).view(torch.float32)
        assert formats.encode(x, "hifloat8").tolist() == [NAN]


def test_codes_survive_a_round_trip() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        number = formats.decode(CODES, "hifloat8").to(dtype)
        # float16 has the small ones as denormals: all but 2^-22 and 2^-16 are among its numbers as well.
        assert formats.encode(number, "hifloat8").tolist() == CODES.tolist()


@settings(deadline=None)
@given(st.floats(width=32), st.booleans())
def test_single_numbers(number: float, saturate: bool) -> None:
    x = torch.tensor([number])
    assert formats.encode(x, "hifloat8", saturate=saturate).tolist() == expected(x, saturate).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_shapes_and_strides(dtype: torch.dtype) -> None:
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes = formats.encode(x, "hifloat8")
    assert torch.equal(formats.encode(x.t(), "hifloat8"), codes.t())
    assert torch.equal(formats.encode(x[:, ::3], "hifloat8"), codes[:, ::3])
    assert torch.equal(formats.decode(codes.t(), "hifloat8"), formats.decode(codes, "hifloat8").t())
    assert formats.encode(x[0, 0], "hifloat8") == codes[0, 0]
    empty = formats.encode(x[:0], "hifloat8")
    assert (empty.shape, formats.decode(empty, "hifloat8").shape) == ((0, 10), (0, 10))


@pytest.mark.parametrize(("saturate", "dynamic"), [(True, True), (False, False)])
def test_a_compiled_graph_computes_the_same(saturate: bool, dynamic: bool) -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = formats.encode(x, "hifloat8", saturate=saturate)
        return codes, formats.decode(codes, "hifloat8")

    torch._dynamo.reset()
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for x in (every(torch.bfloat16), torch.cat([boundaries(FINITE), patterns(9_999)])):
        for given_, wanted in zip(compiled(x), both(x), strict=True):
            torch.testing.assert_close(given_, wanted, rtol=0, atol=0, equal_nan=True)


def test_a_first_call_in_a_tracer_leaves_no_fake_tables() -> None:
    x = torch.randn(3, 4)
    for table in (hifloat8._codes, hifloat8._numbers):
        table.cache_clear()
    with FakeTensorMode() as mode:
        fake = formats.encode(mode.from_tensor(x), "hifloat8")
        assert (fake.shape, fake.dtype) == ((3, 4), torch.uint8)
        assert formats.decode(fake, "hifloat8").dtype == torch.float32
    with FakeTensorMode(allow_non_fake_inputs=True):
        formats.encode(x, "hifloat8")
        formats.decode(CODES, "hifloat8")
    codes = formats.encode(x, "hifloat8")
    assert type(codes) is Tensor and type(formats.decode(codes, "hifloat8")) is Tensor
    with torch.inference_mode():
        formats.decode(formats.encode(x, "hifloat8"), "hifloat8")
    scale = torch.ones(1, requires_grad=True)
    (formats.decode(formats.encode(x, "hifloat8"), "hifloat8") * scale).sum().backward()
    assert scale.grad is not None


def test_on_the_meta_device() -> None:
    codes = formats.encode(torch.empty(2, 3, device="meta"), "hifloat8")
    assert (codes.shape, codes.dtype, codes.device.type) == ((2, 3), torch.uint8, "meta")
