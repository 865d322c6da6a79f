"""The contract of an algorithm: from weights and statistics of their input to quantized weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import Scheme
from npu_fusion.quantization.statistics import Statistics


@dataclass(frozen=True)
class Problem:
    """Layers that read one and the same tensor, and are to be quantized by one scheme."""

    weights: tuple[Tensor, ...]
    """fp32 [N_i, K]; of a convolution [O, I / groups * kh * kw]. To be read only."""
    statistics: Statistics
    """Of the tensor that they read; ``statistics.rows`` may be 0 (an expert that no token chose)."""
    scheme: Scheme
    dtype: torch.dtype
    """Of the model: that of the input and of ``smooth_scales``."""
    apply: Callable[[Tensor, Tensor], Tensor] = torch.nn.functional.linear
    """(input, weight) -> output without bias; for a convolution a closure that knows its stride and
    padding."""
    tie: Callable[[Tensor], Tensor] = lambda factors: factors
    """Makes positive factors [K] equal over channels that must share one, so that the producer of the input
    can absorb them (heads of one group in grouped-query attention). Every vector of smoothing factors, each
    candidate of a search too, goes through it before the weights are multiplied."""
    attain: Callable[[Tensor], Tensor] = lambda smooth_scales: smooth_scales.float()
    """``smooth_scales`` -> fp32 [K]: what the input is really multiplied by. A norm in 16 bits that takes
    them over rounds; weights are divided by this, so that the product stays what it was."""


@dataclass(frozen=True)
class Solution:
    """One :class:`QuantizedWeight` for each weight of the problem, and what happens to the input."""

    weights: tuple[QuantizedWeight, ...]
    inputs: InputParameters | None = None
    """Exactly for static inputs."""
    smooth_scales: Tensor | None = None
    """[K] in ``Problem.dtype``, positive: the input is multiplied by it, and ``weights`` are those of
    ``W / attain(smooth_scales)`` (rounded ones, so that the product stays the same)."""


class Algorithm(ABC):
    """An algorithm without state of its own; ``scheme.options`` are its options."""

    name: ClassVar[str]
    smooths: ClassVar[bool] = False
    """Whether its solutions may have ``smooth_scales``."""

    @abstractmethod
    def needs(self, scheme: Scheme) -> frozenset[str]:
        """Which statistics (``statistics.NEEDS``) it reads for this scheme."""

    @abstractmethod
    def solve(self, problem: Problem) -> Solution:
        """Quantize. Deterministic; raises nothing for finite weights, whatever the statistics."""


ALGORITHMS: dict[str, Algorithm] = {}
Declared = TypeVar("Declared", bound=type[Algorithm])


def algorithm(cls: Declared) -> Declared:
    """Register a class of algorithms under its name."""
    ALGORITHMS[cls.name] = cls()
    return cls
