from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npu_fusion.formats import pack_nibbles, unpack_nibbles


def test_even_indices_are_in_the_low_nibble() -> None:
    codes = torch.tensor([[0x1, 0xF, 0x8, 0x2]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0xF1, 0x28]]


def test_every_byte_is_two_codes() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    codes = unpack_nibbles(packed)
    assert codes.shape == (512,) and codes.max() == 0xF
    assert torch.equal(pack_nibbles(codes), packed)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=3), st.integers(0, 5), st.integers(0, 99))
def test_round_trip(leading: list[int], pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (*leading, 2 * pairs), generator=generator).to(torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (*leading, pairs)
    assert torch.equal(unpack_nibbles(packed), codes)


def test_high_nibbles_do_not_count() -> None:
    assert pack_nibbles(torch.tensor([0x71, 0x92], dtype=torch.uint8)).tolist() == [0x21]


def test_strides() -> None:
    codes = torch.arange(12).remainder(16).to(torch.uint8).reshape(4, 3).t()
    assert torch.equal(pack_nibbles(codes), pack_nibbles(codes.contiguous()))


@pytest.mark.parametrize("shape", [(3,), (2, 5), ()])
def test_refuses_what_has_no_pairs(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"pack_nibbles: codes have shape .*; accepted: an even last dimension"
    ):
        pack_nibbles(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("function", [pack_nibbles, unpack_nibbles])
def test_refuses_other_dtypes(function: object) -> None:
    with pytest.raises(TypeError, match="nibbles: codes are torch.int8; accepted: torch.uint8"):
        function(torch.zeros(2, dtype=torch.int8))  # type: ignore[operator]
