from __future__ import annotations

import pytest
import torch

from npu_fusion.meta_impls._dtypes import HIFLOAT8, HIFLOAT8_DTYPE, dtype_argument, enum_value, torch_dtype


def test_none_is_the_default_and_a_dtype_is_itself() -> None:
    assert torch_dtype(None, torch.int8) == torch.int8
    assert torch_dtype(torch.float16, torch.int8) == torch.float16


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.qint8,
        torch.quint8,
        torch.qint32,
        torch.quint4x2,
        torch.float8_e5m2,
        torch.float8_e4m3fn,
    ],
)
def test_agrees_with_the_number_that_the_dispatcher_makes_of_a_dtype(dtype: torch.dtype) -> None:
    received: list[int] = []
    library = torch.library.Library("npu_fusion_test", "FRAGMENT")
    library.define("enum_of(Tensor x, int dtype) -> ()")
    library.impl("enum_of", lambda x, number: received.append(number), "CPU")
    torch.ops.npu_fusion_test.enum_of(torch.zeros(1), dtype)
    library._destroy()
    assert [torch_dtype(number, torch.bool) for number in received] == [dtype]


@pytest.mark.parametrize(
    ("number", "dtype"), [(1, torch.int8), (291, torch.float8_e5m2), (292, torch.float8_e4m3fn)]
)
def test_numbers(number: int, dtype: torch.dtype) -> None:
    assert torch_dtype(number, torch.bool) == dtype


@pytest.mark.parametrize("number", [-1, 11, 17, 290, 296])
def test_unknown_numbers_are_refused(number: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^{number} is not the ScalarType value of a supported dtype; .*1 \(int8\)"
    ):
        torch_dtype(number, torch.int8)


def test_the_value_of_a_dtype_is_what_the_dispatcher_makes_of_it() -> None:
    dtypes = [torch.int8, torch.bfloat16, torch.quint4x2, torch.float8_e4m3fn]
    assert [enum_value(dtype) for dtype in dtypes] == [1, 15, 16, 24]
    with pytest.raises(ValueError, match=r"^torch.bool has no known ScalarType value; known: .*torch.int8"):
        enum_value(torch.bool)


@pytest.mark.parametrize("value", [2, 290, torch.int16])
def test_an_argument_that_is_refused_is_named(value: int | torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"^npu_x: dst_type is {value}; accepted: None or 1$"):
        dtype_argument("npu_x", "dst_type", value, torch.int8, (torch.int8,), "None or 1")


def test_hifloat8_is_an_answer_only_where_it_is_offered() -> None:
    offered = (torch.int8, HIFLOAT8_DTYPE)
    assert dtype_argument("npu_x", "dst_type", HIFLOAT8, torch.int8, offered, "") == HIFLOAT8_DTYPE
    assert dtype_argument("npu_x", "dst_type", 1, torch.int8, offered, "") == torch.int8
    with pytest.raises(ValueError, match="^npu_x: dst_type is 290; accepted: int8$"):
        dtype_argument("npu_x", "dst_type", HIFLOAT8, torch.int8, (torch.int8,), "int8")
