from __future__ import annotations

import pytest
import torch

import npu_fusion  # noqa: F401  (registers the operators)

format_cast = torch.ops.npu.npu_format_cast.default
format_cast_like = torch.ops.npu.npu_format_cast.Tensor


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_tensor", [False, True])
def test_is_a_contiguous_copy(dtype: torch.dtype, with_tensor: bool) -> None:
    x = torch.arange(24).reshape(2, 3, 4).to(dtype).transpose(1, 2)
    if with_tensor:
        y = format_cast_like(x, torch.empty(1, dtype=torch.float16), customize_dtype=1)
    else:
        y = format_cast(x, 29, customize_dtype=1, input_dtype=5)
    assert y.dtype == dtype
    assert torch.equal(y, x)
    assert y.is_contiguous()


@pytest.mark.parametrize("with_tensor", [False, True])
def test_result_never_aliases_the_input(with_tensor: bool) -> None:
    # The schema promises a new tensor: returning a contiguous input itself would alias it.
    x = torch.ones(2, 2)
    y = format_cast_like(x, x) if with_tensor else format_cast(x, 29)
    y.zero_()
    assert torch.equal(x, torch.ones(2, 2))


def test_empty() -> None:
    assert format_cast(torch.empty(0, 3), 2).shape == (0, 3)
