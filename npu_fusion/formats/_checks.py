"""What the codecs take."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_numbers(name: str, x: Tensor) -> None:
    """``TypeError`` unless ``x`` is of a dtype that float32 holds exactly."""
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name}: x is {x.dtype}; accepted: {', '.join(map(str, _FLOATS))}")


def check_codes(name: str, codes: Tensor, dtype: torch.dtype) -> None:
    """``TypeError`` unless ``codes`` has this dtype."""
    if codes.dtype != dtype:
        raise TypeError(f"{name}: codes are {codes.dtype}; accepted: {dtype}")
