from __future__ import annotations

import pytest
import torch

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_format_cast"


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4, 5), (0, 3)])
def test_fake_and_real_agree(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape).to(dtype).transpose(0, 1)
    for y in (
        check_operator(NAME, x, 29),
        check_operator(NAME, x, 29, customize_dtype=1, input_dtype=1),
        check_operator(NAME + ".Tensor", x, torch.ones(2, 2)),
    ):
        assert (y.shape, y.dtype) == (x.shape, dtype)


def test_dynamic_rows_in_one_graph() -> None:
    compile_dynamic(
        lambda x: torch.ops.npu.npu_format_cast.default(x, 29), lambda t: [torch.randn(t, 8)], [2, 7, 3]
    )


@pytest.mark.parametrize("acl_format", [-1, 5, 28, 100])
def test_refuses_unknown_formats(acl_format: int) -> None:
    check_refused(NAME, f"acl_format is {acl_format}; accepted: 0, 1, 2", torch.ones(2, 2), acl_format)
