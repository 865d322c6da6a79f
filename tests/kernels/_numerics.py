"""Independent arithmetic for the kernel tests: float64 formulas and distances in units in the last place."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_float64(x: Tensor, gamma: Tensor, epsilon: float, beta: Tensor | None = None) -> Tensor:
    """RMSNorm over the last ``gamma.dim()`` dimensions of a float64 ``x``, never rounded to less."""
    dims = list(range(-gamma.dim(), 0))
    count = gamma.numel()
    n = x / torch.sqrt((x * x).sum(dims, keepdim=True) / count + epsilon) * gamma.double()
    return n if beta is None else n + beta.double()


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many representable float16 or bfloat16 values lie between ``a`` and ``b``, element by element."""
    assert a.dtype == b.dtype
    assert a.element_size() == 2
    return (_ordinal(a) - _ordinal(b)).abs()


def _ordinal(x: Tensor) -> Tensor:
    bits = x.contiguous().view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def assert_correctly_rounded(result: Tensor, exact: Tensor) -> None:
    """``result`` is the float64 ``exact`` rounded once, up to the error of the fp32 arithmetic before it.

    In float16 and bfloat16 that error shows only where ``exact`` lies almost halfway between two values.
    """
    if result.dtype == torch.float32:
        torch.testing.assert_close(result.double(), exact, rtol=2e-6, atol=1e-7)
        return
    distance = ulps(result, exact.to(result.dtype))
    assert distance.max() <= 1
    assert (distance != 0).double().mean() < 0.01
