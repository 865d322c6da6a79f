"""Running a kernel where it can run, and comparing it with its reference kernel on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.kernels.triton._launch import Choice, RowKernel
from tests.kernels._numerics import ulps

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs a GPU or Triton's interpreter (TRITON_INTERPRET=1)",
    ),
    # The interpreter computes with numpy, which tells of every infinity and NaN.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

WAYS: dict[str, Callable[[Choice], bool]] = {
    "held": lambda choice: not choice.constants["LOOPED"],
    "looped": lambda choice: choice.constants["LOOPED"],
}
"""The ways through a row: of the choices of a kernel, those that go this way."""


def only(monkeypatch: pytest.MonkeyPatch, kernel: RowKernel, way: str) -> None:
    """Leave ``kernel`` the first of its choices that goes this way; loops in blocks of at most 16 columns, so
    that there is something to loop over."""
    choices = kernel.choices

    def first(constants: dict[str, Any]) -> list[Choice]:
        choice = next(filter(WAYS[way], choices(constants)))
        if way == "looped":
            choice = Choice(choice.constants | {"MAIN": min(16, choice.constants["MAIN"])}, choice.warps)
        return [choice]

    monkeypatch.setattr(kernel, "choices", first)


def moved(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def run(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``operator`` on copies of the arguments where kernels run; results on the CPU."""
    result = operator(*map(moved, args), **{name: moved(value) for name, value in kwargs.items()})
    return tuple(y.cpu() for y in result) if isinstance(result, tuple) else result.cpu()


def assert_agree(
    results: Iterable[Tensor], expected: Iterable[Tensor], scale_tolerance: float = 1e-6
) -> None:
    """Integers equal but for ties, 16-bit floats within an ulp, scales within their tolerance."""
    for result, exact in zip(results, expected, strict=True):
        assert (result.shape, result.dtype) == (exact.shape, exact.dtype)
        assert result.is_contiguous()
        if result.dtype == torch.int8:
            difference = (result.int() - exact.int()).abs()
            # Rounding can only go another way where the reference is within its own error of a half.
            assert difference.numel() == 0 or difference.max() <= 1
            assert int(difference.sum()) <= 1 + difference.numel() // 100_000
        elif result.dtype in (torch.bfloat16, torch.float16):
            both = exact.isnan() & result.isnan()
            assert not ulps(result, exact)[~both].gt(1).any()
        elif result.dtype == torch.float32:
            torch.testing.assert_close(result, exact, rtol=scale_tolerance, atol=0, equal_nan=True)
        else:
            assert torch.equal(result, exact)
