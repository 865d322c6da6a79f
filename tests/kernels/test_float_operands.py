from __future__ import annotations

import pytest
import torch

from npu_fusion.kernels.reference._float_operands import float4_rows, powers_of_two, spread


def test_all_powers_of_two() -> None:
    value = powers_of_two(torch.arange(256).to(torch.uint8)).double()
    assert value[:255].tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert value[255].isnan()


def test_powers_of_two_of_a_view() -> None:
    codes = torch.tensor([[126, 127, 128], [129, 130, 0]], dtype=torch.uint8)
    assert powers_of_two(codes.t()).tolist() == [[0.5, 4.0], [1.0, 8.0], [2.0, 2.0**-127]]
    if hasattr(torch, "float8_e8m0fnu"):
        own = codes.view(torch.float8_e8m0fnu)
        assert torch.equal(powers_of_two(own), powers_of_two(codes))


@pytest.mark.parametrize("carrier", [torch.uint8, torch.int32, torch.float32])
def test_rows_of_float4_are_read_lowest_nibble_first(carrier: torch.dtype) -> None:
    # 0.5 1 1.5 2 3 4 6 -0.5
    packed = torch.tensor([[0x21, 0x43, 0x65, 0x97]], dtype=torch.uint8).view(carrier)
    assert float4_rows(packed, "float4_e2m1").tolist() == [[0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5]]
    assert float4_rows(packed, "float4_e1m2").tolist() == [[0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, -0.25]]


def test_a_nan_of_the_carrier_is_only_bits() -> None:
    packed = torch.tensor([[0xFF, 0xFF, 0xFF, 0x7F]], dtype=torch.uint8).view(torch.float32)
    assert packed.isnan().all()
    assert float4_rows(packed, "float4_e2m1").tolist() == [[-6.0] * 7 + [6.0]]


def test_spread_cuts_the_last_block() -> None:
    scale = torch.tensor([[1.0, 2.0, 3.0]])
    assert spread(scale, 70, -1).tolist() == [[1.0] * 32 + [2.0] * 32 + [3.0] * 6]
    assert spread(scale.t(), 40, -2).shape == (40, 1)
