"""The package's own part: names, and what is refused."""

from __future__ import annotations

import pytest
import torch

from npu_fusion import formats

CODES = {
    "hifloat8": torch.uint8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float4_e2m1": torch.uint8,
    "float4_e1m2": torch.uint8,
}


def test_the_formats_and_their_largest_numbers() -> None:
    largest = {
        "hifloat8": 32768.0,
        "float8_e4m3fn": 448.0,
        "float8_e5m2": 57344.0,
        "float4_e2m1": 6.0,
        "float4_e1m2": 1.75,
    }
    assert largest == formats.MAXIMUM
    for name, number in largest.items():
        codes = formats.encode(torch.tensor([number, 2 * number]), name)
        assert codes.dtype == CODES[name]
        assert formats.decode(codes, name).tolist() == [number, number]


def test_mx_types_are_encoded_as_their_elements() -> None:
    elements = {
        "mxfp8_e4m3fn": "float8_e4m3fn",
        "mxfp8_e5m2": "float8_e5m2",
        "mxfp4_e2m1": "float4_e2m1",
    }
    assert {name: name for name in formats.MAXIMUM} | elements == formats.ELEMENT
    x = torch.linspace(-7, 7, 99)
    for name, element in elements.items():
        codes = formats.encode(x, name)
        assert torch.equal(codes.view(torch.uint8), formats.encode(x, element).view(torch.uint8))
        assert torch.equal(formats.decode(codes, name), formats.decode(codes, element))


@pytest.mark.parametrize("function", ["encode", "decode"])
def test_refuses_unknown_types(function: str) -> None:
    message = f"{function}: type is 'int3'; accepted: hifloat8, float8_e4m3fn, float8_e5m2, float4_e2m1"
    with pytest.raises(ValueError, match=message):
        getattr(formats, function)(torch.zeros(2), "int3")


@pytest.mark.parametrize("name", CODES)
def test_refuses_other_dtypes(name: str) -> None:
    for x in (torch.zeros(2).double(), torch.zeros(2, dtype=torch.int8)):
        message = f"encode '{name}': x is {x.dtype}; accepted: torch.float16, torch.bfloat16, torch.float32"
        with pytest.raises(TypeError, match=message):
            formats.encode(x, name)
    with pytest.raises(TypeError, match=f"decode '{name}': codes are torch.int8; accepted: {CODES[name]}"):
        formats.decode(torch.zeros(2, dtype=torch.int8), name)


@pytest.mark.parametrize("name", ["float4_e2m1", "float4_e1m2", "mxfp4_e2m1"])
def test_refuses_an_overflow_that_there_is_not(name: str) -> None:
    message = f"encode: saturate is False for '{name}', which has no infinity; accepted: True"
    with pytest.raises(ValueError, match=message):
        formats.encode(torch.zeros(2), name, saturate=False)
