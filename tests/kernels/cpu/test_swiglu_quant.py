from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.cpu.swiglu_quant import npu_swiglu_quant as compiled
from npu_fusion.kernels.reference.swiglu_quant import npu_swiglu_quant as reference
from tests.kernels.cpu._agreement import (
    FLOATS,
    assert_agrees,
    dtypes,
    laid_out,
    layouts,
    normal,
    positive,
    seeds,
    special_rows,
    widths,
)

STATIC, DYNAMIC = 0, 1


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 7),
    width=widths,
    dtype=dtypes,
    mode=st.sampled_from([STATIC, DYNAMIC]),
    smooth=st.booleans(),
    groups=st.sampled_from([None, 1, 3]),
    counts=st.booleans(),
    by_column=st.booleans(),
    left=st.booleans(),
    layout=layouts,
    seed=seeds,
)
def test_agrees_with_the_reference(
    rows: int,
    width: int,
    dtype: torch.dtype,
    mode: int,
    smooth: bool,
    groups: int | None,
    counts: bool,
    by_column: bool,
    left: bool,
    layout: str,
    seed: int,
) -> None:
    x = laid_out(normal(rows, 2 * width, seed=seed, dtype=dtype), layout)
    arguments: dict[str, Any] = {"quant_mode": mode, "activate_left": left, "group_list_type": int(counts)}
    if groups is not None:
        ends = torch.randint(0, rows + 1, (groups,), generator=torch.Generator().manual_seed(seed))
        ends = ends.sort().values
        if counts:
            ends = ends.diff(prepend=ends.new_zeros(1))
        arguments["group_index"] = ends.int()
    if smooth:
        shape = (groups or 1, width) if by_column else (groups or 1,)
        arguments["smooth_scales"] = positive(*shape, seed=seed + 1) * (1 if mode == DYNAMIC else 30)
        if mode == STATIC:
            arguments["offsets"] = normal(*shape, seed=seed + 2)
    assert_agrees(compiled(x, **arguments), reference(x, **arguments))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 32, 45])
@pytest.mark.parametrize("mode", [STATIC, DYNAMIC])
@pytest.mark.parametrize("left", [False, True])
def test_special_rows(dtype: torch.dtype, width: int, mode: int, left: bool) -> None:
    x = special_rows(2 * width, dtype, seed=width)
    arguments = {"quant_mode": mode, "activate_left": left}
    assert_agrees(compiled(x, **arguments), reference(x, **arguments))


def test_scales_that_overflow() -> None:
    """127 / amax is infinite below 4e-37."""
    x = torch.full((2, 40), 1e-19)
    x[1, 25] = 0
    y, scale = compiled(x, quant_mode=DYNAMIC)
    assert scale.isinf().all()
    assert_agrees((y, scale), reference(x, quant_mode=DYNAMIC))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(64, 4096), (3, 2, 9218)])
def test_large_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = normal(*shape, seed=0, dtype=dtype)
    assert_agrees(compiled(x, quant_mode=DYNAMIC), reference(x, quant_mode=DYNAMIC))


def test_it_leaves_int4_to_the_reference() -> None:
    x = normal(2, 8, seed=0)
    assert compiled(x, dst_type=torch.quint4x2) is NotImplemented
    assert compiled(x, dst_type=torch.int8) is not NotImplemented
