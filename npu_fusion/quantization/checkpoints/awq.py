"""AutoAWQ's checkpoints: 4-bit weights of linear layers, in the layout of its GEMM kernels.

::

    qweight  int32 [K, N / 8]     w: 8 outputs in a word, from the lowest bits 0, 2, 4, 6, 1, 3, 5, 7
    qzeros   int32 [G, N / 8]     z: in the same way; G = K / group_size
    scales   fp16  [G, N]         s

    W[n, k] = (w[k, n] - z[g, n]) * s[g, n]        w and z from 0 to 15, g = k // group_size

Here codes and offset are both less by 8, so that they fit int4; the numbers are the same.

Traps:

* ``version`` gemv, gemv_fast and marlin have other layouts of the same shapes: refused.
* ``zero_point`` false has no layout that AutoAWQ's own kernels and its converters agree on: refused.

Source: the packing of AutoAWQ's WQLinear_GEMM; checked against compressed-tensors' AutoAWQConverter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from npu_fusion.quantization.checkpoints._files import Tensors
from npu_fusion.quantization.checkpoints._found import Quantized
from npu_fusion.quantization.checkpoints._integers import grouped_weight
from npu_fusion.quantization.checkpoints._json import entry
from npu_fusion.quantization.checkpoints._packing import WORD, unpack
from npu_fusion.quantization.checkpoints._reader import Reader
from npu_fusion.quantization.checkpoints._target import Target
from npu_fusion.quantization.scheme import Scheme

BITS = 4
_PER_WORD = WORD // BITS


class AwqReader(Reader):
    """AutoAWQ, ``version`` GEMM."""

    name = "awq"
    methods = ("awq",)

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        super().__init__(config, where)
        # AutoAWQ's own file has other names than transformers' config.json.
        bits = entry(self.config, "bits", int, where, entry(self.config, "w_bit", int, where, BITS))
        size = entry(
            self.config, "group_size", int, where, entry(self.config, "q_group_size", int, where, 128)
        )
        version = entry(self.config, "version", str, where, "gemm")
        if bits != BITS:
            raise ValueError(f"{where}: bits is {bits}; accepted: {BITS}")
        if version.lower() != "gemm":
            raise ValueError(f"{where}: version is {version!r}; accepted: 'gemm'")
        if not entry(self.config, "zero_point", bool, where, True):
            raise ValueError(f"{where}: zero_point is false; accepted: true")
        if size != -1 and size < 1:
            raise ValueError(f"{where}: group_size is {size}; accepted: -1 (all inputs), or at least 1")
        self.group_size = size

    def read(self, tensors: Tensors, target: Target) -> None:
        names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
        if not names:
            raise ValueError(f"{self.where}: says awq, but no tensor is a qweight")
        for name in names:
            target.place(name, self._layer(name, tensors))

    def _layer(self, name: str, tensors: Tensors) -> Quantized:
        packed = tensors.take(f"{name}.qweight", (torch.int32,))
        if packed.dim() != 2 or packed.numel() == 0:
            raise tensors.problem(f"{name}.qweight", f"has shape {list(packed.shape)}; accepted: [K, N / 8]")
        inputs, outputs = packed.size(0), packed.size(1) * _PER_WORD
        size = inputs if self.group_size == -1 else self.group_size
        if inputs % size:
            raise tensors.problem(
                f"{name}.qweight", f"has {inputs} inputs; accepted: a multiple of group_size {size}"
            )
        groups = inputs // size
        zeros = _in_order(tensors.take(f"{name}.qzeros", (torch.int32,), (groups, packed.size(1))))
        scale = tensors.scale(f"{name}.scales", (groups, outputs))
        weight = grouped_weight(_in_order(packed).t(), zeros.t(), scale.t(), BITS, size)
        return Quantized(Scheme(weight.scheme, algorithm="awq"), weight)


def _in_order(packed: Tensor) -> Tensor:
    """Values 0 to 15, uint8 [R, N], of ``packed`` [R, N / 8]."""
    # The even outputs of a word come first, then the odd ones.
    return unpack(packed, BITS).unflatten(-1, (-1, 2, _PER_WORD // 2)).transpose(-1, -2).flatten(-3)
