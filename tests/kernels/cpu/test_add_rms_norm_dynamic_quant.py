from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.cpu.add_rms_norm_dynamic_quant import npu_add_rms_norm_dynamic_quant as compiled
from npu_fusion.kernels.reference.add_rms_norm_dynamic_quant import (
    npu_add_rms_norm_dynamic_quant as reference,
)
from tests.kernels.cpu._agreement import (
    assert_agrees,
    laid_out,
    layouts,
    normal,
    positive,
    seeds,
    special_rows,
    widths,
)

DTYPES = [torch.bfloat16, torch.float16]


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 6),
    width=widths,
    dtype=st.sampled_from(DTYPES),
    smooths=st.sampled_from([(), (1,), (1, 2)]),
    mask=st.sampled_from([None, [True, False], [False, True], [True, True]]),
    beta=st.booleans(),
    layout=layouts,
    seed=seeds,
)
def test_agrees_with_the_reference(
    rows: int,
    width: int,
    dtype: torch.dtype,
    smooths: tuple[int, ...],
    mask: list[bool] | None,
    beta: bool,
    layout: str,
    seed: int,
) -> None:
    x1 = laid_out(normal(rows, width, seed=seed, dtype=dtype), layout)
    x2 = normal(rows, width, seed=seed + 1, dtype=dtype)
    gamma = positive(width, seed=seed + 2, dtype=dtype)
    arguments: dict[str, Any] = {"output_mask": mask, "epsilon": 1e-5}
    for index in smooths:
        if mask is None or mask[index - 1]:
            arguments[f"smooth_scale{index}"] = positive(width, seed=seed + 3 + index, dtype=dtype)
    if beta:
        arguments["beta"] = normal(width, seed=seed + 3, dtype=dtype)
    results = [kernel(x1, x2, gamma, **arguments) for kernel in (compiled, reference)]
    assert_agrees(*results)
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 32, 45, 600])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_special_rows(dtype: torch.dtype, width: int, epsilon: float) -> None:
    x, gamma = special_rows(width, dtype, seed=width), normal(width, seed=1, dtype=dtype)
    smooth = positive(width, seed=2, dtype=dtype)
    for other in (x, -x, torch.zeros_like(x)):
        arguments = {"smooth_scale1": smooth, "smooth_scale2": gamma, "epsilon": epsilon}
        assert_agrees(compiled(x, other, gamma, **arguments), reference(x, other, gamma, **arguments))
        assert_agrees(compiled(x, other, gamma, epsilon=epsilon), reference(x, other, gamma, epsilon=epsilon))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(600, 4096), (3, 2, 9217)])
def test_large_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x1, x2 = normal(*shape, seed=0, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
    gamma = positive(shape[-1], seed=2, dtype=dtype)
    assert_agrees(compiled(x1, x2, gamma), reference(x1, x2, gamma))


def test_it_leaves_int4_to_the_reference() -> None:
    x, gamma = normal(2, 8, seed=0, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
    assert compiled(x, x, gamma, y_dtype=16) is NotImplemented
    assert compiled(x, x, gamma, y_dtype=1) is not NotImplemented
