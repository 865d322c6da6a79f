"""What is asked of one layer: types, granularity and algorithm, checked and complete.

``config.py`` makes these from the user's dict; everything below it (rules, statistics, algorithms, modules)
reads these and never a dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

INTEGER_TYPES = ("int8", "int4")
MX_TYPES = ("mxfp8_e4m3fn", "mxfp4_e2m1")
FLOAT4_TYPES = ("float4_e2m1", "float4_e1m2")
FLOAT8_TYPES = ("hifloat8", "float8_e4m3fn")
WEIGHT_TYPES = (*FLOAT8_TYPES, *MX_TYPES, *FLOAT4_TYPES, *INTEGER_TYPES)
INPUT_TYPES = (*FLOAT8_TYPES, "mxfp8_e4m3fn", "int8")
MX_BLOCK = 32
"""Neighbours that share one power of two in the types ``mxfp8_e4m3fn`` and ``mxfp4_e2m1``."""


@dataclass(frozen=True)
class WeightScheme:
    """How a weight [N, K] is quantized."""

    type: str
    """One of :data:`WEIGHT_TYPES`."""
    symmetric: bool = True
    strategy: str = "channel"
    """``tensor`` (one scale), ``channel`` (one for each output), ``group`` (for ``group_size`` inputs of
    each)."""
    group_size: int | None = None


@dataclass(frozen=True)
class InputScheme:
    """How the input of a layer is quantized."""

    type: str
    """One of :data:`INPUT_TYPES`."""
    symmetric: bool = True
    strategy: str = "tensor"
    """``tensor`` (one scale, from calibration), ``token`` (one for each row, at run time), ``group`` (mx)."""

    @property
    def dynamic(self) -> bool:
        """Scales are computed at run time, so nothing of the input has to be calibrated."""
        return self.strategy != "tensor"


@dataclass(frozen=True)
class Scheme:
    """All of it for one layer."""

    weights: WeightScheme
    inputs: InputScheme | None = None
    """None: weight-only quantization."""
    algorithm: str = "minmax"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the algorithm, by AMCT's names (``smooth_strength``, ``grids_num``), defaults filled in."""

    def __hash__(self) -> int:
        return hash((self.weights, self.inputs, self.algorithm, tuple(sorted(self.options.items()))))
