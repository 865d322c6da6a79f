"""DeepSeek's FP8: weights in float8_e4m3fn with one scale for each block of 128 x 128.

::

    weight            float8_e4m3fn [N, K]
    weight_scale_inv  fp32 [ceil(N / 128), ceil(K / 128)]

    W[n, k] = weight[n, k] * weight_scale_inv[n // 128, k // 128]

in fp32, with one rounding to the dtype of the model. No deployed layer has scales of blocks: the weights
become float ones, which ``npu_fusion.quantize`` then takes.

Traps:

* In spite of its name the scale is multiplied with, not divided by.
* The blocks at the edges may be partial (``kv_a_proj_with_mqa`` has 576 rows).
* The scale is used in fp32: rounded to bfloat16 first it would change the weights.

Source: DeepSeek-V3's fp8_cast_bf16; checked against compressed-tensors' FP8BlockDequantizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from npu_fusion.quantization.checkpoints._files import Tensors
from npu_fusion.quantization.checkpoints._found import Dense
from npu_fusion.quantization.checkpoints._json import entry
from npu_fusion.quantization.checkpoints._reader import Reader
from npu_fusion.quantization.checkpoints._target import Target

_SCALE = ".weight_scale_inv"


class DeepSeekFp8Reader(Reader):
    """``quant_method`` fp8 with ``weight_block_size``."""

    name = "fp8"
    methods = ("fp8",)
    deploys = False

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        super().__init__(config, where)
        if entry(self.config, "fmt", str, where, "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise ValueError(f"{where}: fmt is {self.config['fmt']!r}; accepted: 'e4m3'")
        self.block = block_size(entry(self.config, "weight_block_size", list, where), where)

    def read(self, tensors: Tensors, target: Target) -> None:
        names = [key.removesuffix(_SCALE) for key in tensors if key.endswith(_SCALE)]
        if not names:
            raise ValueError(f"{self.where}: says fp8, but no tensor is a weight_scale_inv")
        for name in names:
            weight = tensors.take(f"{name}.weight", (torch.float8_e4m3fn,))
            value = multiply_blocks(name, weight, f"{name}{_SCALE}", self.block, tensors)
            target.place(name, Dense(value, f"its scales are of blocks of {self.block[0]} x {self.block[1]}"))


def block_size(given: Any, where: str) -> tuple[int, int]:
    if (
        not isinstance(given, list)
        or len(given) != 2
        or not all(type(size) is int and size > 0 for size in given)
    ):
        raise ValueError(f"{where}: the size of blocks is {given!r}; accepted: two positive numbers")
    return given[0], given[1]


def multiply_blocks(
    name: str, weight: Tensor, scale_key: str, block: tuple[int, int], tensors: Tensors
) -> Tensor:
    """fp32 [N, K] of a float8 weight [N, K] and the tensor of its scales."""
    if weight.dim() != 2 or bool(weight.float().isnan().any()):
        raise tensors.problem(f"{name}.weight", "is no matrix, or has NaN")
    rows, columns = (-(-weight.size(d) // block[d]) for d in (0, 1))
    scale = tensors.scale(scale_key, (rows, columns))
    for dim in (0, 1):
        repeats = min(block[dim], weight.size(dim))
        scale = scale.repeat_interleave(repeats, dim).narrow(dim, 0, weight.size(dim))
    return weight.float() * scale
