from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.reference._quant import unpack_quant_param

pack = torch.ops.npu.npu_trans_quant_param


def fields(packed: int) -> tuple[float, int, int]:
    """Scale, offset and everything above it, by Python's own means."""
    (scale,) = struct.unpack("<f", struct.pack("<I", packed & 0xFFFFFFFF))
    assert packed >> 32 & 0x1F == 0
    offset = packed >> 37 & 0x1FF
    return scale, offset - 512 if offset > 255 else offset, packed >> 46


def to_ten_bits(scale: float, step: str) -> float:
    """A float32 number with ten mantissa bits: the rest cut off, or rounded half to even."""
    fraction, exponent = math.frexp(scale)
    scaled = math.ldexp(fraction, 11)  # the integer part has the leading one and ten bits
    kept = math.trunc(scaled) if step == "cut" else round(scaled)
    return math.ldexp(kept, exponent - 11)


NORMAL = st.floats(2.0**-126, 2.0**127, width=32)


@settings(deadline=None)
@given(scale=st.one_of(NORMAL, NORMAL.map(lambda x: -x)))
@example(1.0)
@example(1 + 2.0**-11)
@example(1 + 3 * 2.0**-11)
@example(1 + 2.0**-11 + 2.0**-23)
@example(2 - 2.0**-23)
def test_the_scale_keeps_ten_bits(scale: float) -> None:
    tensor = torch.tensor([scale])
    assert fields(pack(tensor).item()) == (to_ten_bits(scale, "cut"), 0, 1)
    assert fields(pack(tensor, None, None).item()) == fields(pack(tensor).item())
    assert fields(pack(tensor, None, 1).item()) == (to_ten_bits(scale, "round"), 0, 1)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (0.0, 0),
        (0.5, 0),
        (1.5, 2),
        (-0.5, 0),
        (-2.5, -2),
        (254.5, 254),
        (255.5, 255),
        (1e9, 255),
        (-1e9, -256),
    ],
)
def test_the_offset_is_rounded_and_saturates(offset: float, expected: int) -> None:
    assert fields(pack(torch.tensor([2.0]), torch.tensor([offset])).item()) == (2.0, expected, 1)


def test_bits_as_documented() -> None:
    """The example of the formula: bit 46, the offset from bit 37, the scale in the low half."""
    assert pack(torch.tensor([1.0]), torch.tensor([-1.0])).item() == 0x3F800000 | 0x1FF << 37 | 1 << 46


def test_denormal_and_special_scales() -> None:
    tiny, huge = 2.0**-130 + 2.0**-149, 3.4028234663852886e38
    scales = torch.tensor([tiny, -tiny, huge, math.inf, -math.inf, 0.0])
    cut, rounded = ([fields(p)[0] for p in pack(scales, None, mode).tolist()] for mode in (0, 1))
    assert cut == [2.0**-130, -(2.0**-130), 3.4011621342146535e38, math.inf, -math.inf, 0.0]
    assert rounded == [0.0, -0.0, math.inf, math.inf, -math.inf, 0.0]
    assert math.copysign(1, rounded[1]) == -1


def test_nan_stays_one() -> None:
    """Rounding would carry into the sign."""
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    for mode in (0, 1):
        assert pack(nan, None, mode).item() == 0x7FFFE000 | 1 << 46


def test_one_entry_is_repeated() -> None:
    many, one = torch.tensor([0.5, 2.0, 3.0]), torch.tensor([4.0])
    assert [fields(p)[:2] for p in pack(many, one).tolist()] == [(0.5, 4), (2.0, 4), (3.0, 4)]
    assert [fields(p)[:2] for p in pack(one, many).tolist()] == [(4.0, 0), (4.0, 2), (4.0, 3)]


def test_unpacking_gives_back_what_was_kept() -> None:
    scale, offset = torch.rand(1, 64) * 100, torch.arange(64.0)[None] - 32
    kept, whole = unpack_quant_param(pack(scale, offset))
    assert torch.equal(whole, offset)
    assert torch.equal(kept, (scale.view(torch.int32) & ~0x1FFF).view(torch.float32))


def test_strided_inputs() -> None:
    scale = torch.rand(8)
    assert torch.equal(pack(scale[::2], scale[1::2]), pack(scale[::2].clone(), scale[1::2].clone()))
