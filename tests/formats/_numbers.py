"""Inputs that the tests of all formats share, and rounding to the nearest number without any format."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from npu_fusion import formats
from npu_fusion.formats import float8


def every(dtype: torch.dtype) -> Tensor:
    """All 65536 numbers of a 16-bit dtype."""
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


def patterns(count: int, seed: int = 0) -> Tensor:
    """float32 of random bits: all magnitudes, denormals, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)


def around(values: Tensor) -> Tensor:
    """float32 ``values`` of any sign, and their two neighbours."""
    far = torch.full_like(values, torch.inf)
    both = torch.cat([values, values.nextafter(far), values.nextafter(-far)])
    return torch.cat([both, -both])


def boundaries(finite: Tensor) -> Tensor:
    """Numbers of a format, half-way between them and beyond the largest, with float32 neighbours."""
    positive = finite[finite > 0].unique().double()
    ends = torch.cat([positive.new_zeros(1), positive])
    beyond = positive[-1] + (positive[-1] - positive[-2]) * torch.tensor([0.25, 0.5, 0.75, 1.0, 2.0])
    return around(torch.cat([ends, (ends[1:] + ends[:-1]) / 2, beyond]).float())


def nearest(x: Tensor, finite: Tensor, ties: str) -> Tensor:
    """The number of ``finite`` nearest to each of ``x``, which is not NaN; beyond the largest, the largest.

    ``ties`` is ``"away"`` from zero, or to ``"even"`` places in the order of the numbers. All in float64,
    exact for float32 and numbers of at most 8 bits.
    """
    table = np.unique(np.abs(finite.double().numpy()))
    size = np.abs(x.double().numpy())
    upper = np.clip(np.searchsorted(table, size), 1, len(table) - 1)
    low, high = table[upper - 1], table[upper]
    upwards = np.ones(upper.shape, dtype=bool) if ties == "away" else upper % 2 == 0
    with np.errstate(invalid="ignore"):
        up = np.where(size - low == high - size, upwards, size - low > high - size)
    return torch.from_numpy(np.copysign(np.where(up, high, low), x.double().numpy()))


def rounded(x: Tensor, name: str) -> Tensor:
    """The nearest numbers of a format, float64, by search; ``x`` has no NaN."""
    codes = torch.arange(16 if name.startswith("float4") else 256, dtype=torch.uint8)
    numbers = formats.decode(codes.view(float8.DTYPES.get(name, torch.uint8)), name)
    return nearest(x, numbers[numbers.isfinite()], "away" if name == "hifloat8" else "even")
