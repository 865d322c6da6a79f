from __future__ import annotations

import pytest
import torch

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_trans_quant_param"
ONE, FOUR, ROW = torch.ones(1), torch.ones(4), torch.ones(1, 4)


@pytest.mark.parametrize("round_mode", [None, 0, 1])
@pytest.mark.parametrize("scale", [ONE, FOUR, ROW, torch.ones(8)[::2]])
def test_without_offset(scale: torch.Tensor, round_mode: int | None) -> None:
    packed = check_operator(NAME, scale, None, round_mode)
    assert (packed.shape, packed.dtype) == (scale.shape, torch.int64)


@pytest.mark.parametrize(
    ("scale", "offset", "shape"),
    [
        (ONE, ONE, (1,)),
        (FOUR, ONE, (4,)),
        (ONE, FOUR, (4,)),
        (FOUR, FOUR, (4,)),
        (ROW, ROW, (1, 4)),
    ],
)
def test_with_offset(scale: torch.Tensor, offset: torch.Tensor, shape: tuple[int, ...]) -> None:
    packed = check_operator(NAME, scale, offset)
    assert (packed.shape, packed.dtype) == (shape, torch.int64)


def test_dynamic_columns_in_one_graph() -> None:
    pack = torch.ops.npu.npu_trans_quant_param
    compile_dynamic(lambda s: pack(s), lambda n: [torch.rand(n)], [2, 7, 3])
    compile_dynamic(
        lambda s, o: pack(s, o, 1), lambda n: [torch.rand(n), torch.ones(n)], [2, 7, 3], [(0, 0), (1, 0)]
    )
    compile_dynamic(lambda s: pack(s, torch.ones(1)), lambda n: [torch.rand(n)], [2, 7, 3])


def test_refuses_dtypes_and_modes() -> None:
    check_refused(NAME, "scale has dtype bfloat16; accepted: float32", FOUR.bfloat16())
    check_refused(NAME, "offset has dtype int32; accepted: float32", FOUR, FOUR.int())
    check_refused(NAME, "round_mode is 2; accepted: None, 0, 1", FOUR, None, 2)


def test_refuses_shapes() -> None:
    check_refused(NAME, "scale has 0 dimensions; accepted: 1 to 2", torch.tensor(1.0))
    check_refused(NAME, "scale has 3 dimensions; accepted: 1 to 2", torch.ones(1, 1, 4))
    check_refused(NAME, r"scale has shape \[2, 4\]; accepted: \[n\] or \[1, n\]", torch.ones(2, 4))
    check_refused(NAME, r"scale has shape \[0\]; accepted: \[n\] or \[1, n\], not empty", torch.ones(0))
    check_refused(NAME, r"offset has shape \[3\]; accepted: \[4\] or \[1\]", FOUR, torch.ones(3))
    check_refused(NAME, r"offset has shape \[0\]; accepted: \[1\] or \[1\]", ONE, torch.ones(0))
    check_refused(NAME, "offset has 2 dimensions; accepted: 1", FOUR, ROW)
    check_refused(NAME, r"offset has shape \[4\]; accepted: \[1, 4\]", ROW, FOUR)
    check_refused(NAME, r"offset has shape \[1, 1\]; accepted: \[1, 4\]", ROW, torch.ones(1, 1))
