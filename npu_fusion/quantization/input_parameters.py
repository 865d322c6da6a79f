"""The calibrated quantization of an input, as plain data: what algorithms give to layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class InputParameters:
    """Static quantization of an input: ``q = sat(round(x / scale + offset))``."""

    scale: Tensor
    """fp32 [1]."""
    offset: Tensor | None = None
    """int32 [1], for asymmetric int8."""
