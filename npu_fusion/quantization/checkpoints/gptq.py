"""GPTQ's checkpoints, as AutoGPTQ and GPTQModel write them: weights of 2, 3, 4 or 8 bits.

::

    qweight  int32 [K * bits / 32, N]     w: packed along the inputs, lowest bits first
    qzeros   int32 [G, N * bits / 32]     z: packed along the outputs
    scales   fp16  [G, N]                 s
    g_idx    int32 [K]                    g: the group of each input (may be absent: k // group_size)

    W[n, k] = (w[k, n] - z[g[k], n]) * s[g[k], n]        w and z from 0 to 2^bits - 1

``checkpoint_format`` gptq (v1, and where there is none) stores z - 1, gptq_v2 stores z.

With ``desc_act`` the groups are of inputs that GPTQ took one after the other, so they lie scattered. No
deployed layer has such groups: the weight becomes a float one, with the same numbers.

Traps:

* A stored v1 zero point of 2^bits - 1 can be z = 0 or z = 2^bits: kernels differ. AutoGPTQ writes it
  together with wrong neighbours in the same word (0 - 1 without a mask), GPTQModel subtracts 0x1111... from
  whole words, with borrow. The second is undone exactly, if ``meta.quantizer`` says that GPTQModel wrote the
  file; otherwise such a file is refused.
* A v2 file labelled v1 would load with every zero point off by one. With ``sym`` that shows, because all of
  them are in the middle, and is refused.

Source: the packing of AutoGPTQ's QuantLinear, and GPTQModel's conversions between v1 and v2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from npu_fusion.quantization.checkpoints._files import Tensors
from npu_fusion.quantization.checkpoints._found import Dense, Found, Quantized
from npu_fusion.quantization.checkpoints._integers import grouped_weight
from npu_fusion.quantization.checkpoints._json import entry
from npu_fusion.quantization.checkpoints._packing import WORD, unpack
from npu_fusion.quantization.checkpoints._reader import Reader
from npu_fusion.quantization.checkpoints._target import Target
from npu_fusion.quantization.scheme import Scheme

BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2")


class GptqReader(Reader):
    """GPTQ, v1 and v2."""

    name = "gptq"
    methods = ("gptq",)

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        super().__init__(config, where)
        self.bits = entry(self.config, "bits", int, where)
        self.group_size = entry(self.config, "group_size", int, where)
        self.symmetric = entry(self.config, "sym", bool, where, True)
        layout = entry(
            self.config, "checkpoint_format", str, where, entry(self.config, "format", str, where, "gptq")
        )
        if self.bits not in BITS:
            raise ValueError(f"{where}: bits is {self.bits}; accepted: {', '.join(map(str, BITS))}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(
                f"{where}: group_size is {self.group_size}; accepted: -1 (all inputs), or at least 1"
            )
        if layout not in _FORMATS or entry(self.config, "is_marlin_format", bool, where, False):
            shown = layout if layout not in _FORMATS else "marlin"
            raise ValueError(f"{where}: checkpoint_format is {shown!r}; accepted: {', '.join(_FORMATS)}")
        if entry(self.config, "pack_dtype", str, where, "int32") != "int32":
            raise ValueError(f"{where}: pack_dtype is {self.config['pack_dtype']!r}; accepted: 'int32'")
        # Entries that begin with "-:" name layers that are not quantized; they have no qweight.
        overrides = entry(self.config, "dynamic", dict, where, {})
        if any(not pattern.startswith("-:") for pattern in overrides):
            raise ValueError(
                f"{where}: dynamic gives layers settings of their own; accepted: one for all layers"
            )
        self.minus_one = layout == "gptq"
        self.whole_words = _by_gptqmodel(self.config, where)

    def read(self, tensors: Tensors, target: Target) -> None:
        names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
        if not names:
            raise ValueError(f"{self.where}: says gptq, but no tensor is a qweight")
        for name in names:
            target.place(name, self._layer(name, tensors))

    def _layer(self, name: str, tensors: Tensors) -> Found:
        packed = tensors.take(f"{name}.qweight", (torch.int32,))
        if packed.dim() != 2 or packed.numel() == 0 or packed.size(0) * WORD % self.bits:
            raise tensors.problem(
                f"{name}.qweight", f"has shape {list(packed.shape)}; accepted: [K * {self.bits} / {WORD}, N]"
            )
        inputs, outputs = packed.size(0) * WORD // self.bits, packed.size(1)
        size = inputs if self.group_size == -1 else self.group_size
        groups = -(-inputs // size)
        scale = tensors.scale(f"{name}.scales", (groups, outputs)).t()
        zeros = self._zeros(f"{name}.qzeros", tensors, groups, outputs).t()
        values = unpack(packed.t(), self.bits)
        g_idx = self._groups(f"{name}.g_idx", tensors, inputs, groups)
        if g_idx is not None and not torch.equal(g_idx, torch.arange(inputs) // size):
            value = (values.float() - zeros.float()[:, g_idx]) * scale[:, g_idx]
            return Dense(
                value, "the inputs of a group are not neighbours (desc_act), as in no deployed layer"
            )
        weight = grouped_weight(values, zeros, scale, self.bits, size)
        return Quantized(Scheme(weight.scheme, algorithm="gptq"), weight)

    def _zeros(self, key: str, tensors: Tensors, groups: int, outputs: int) -> Tensor:
        """Zero points, int32 [G, N]."""
        if outputs * self.bits % WORD:
            raise tensors.problem(
                key,
                f"is of {outputs} outputs; accepted: a multiple of {WORD // self.bits} with {self.bits} bits",
            )
        words = tensors.take(key, (torch.int32,), (groups, outputs * self.bits // WORD))
        zeros = unpack(words, self.bits).to(torch.int32)
        if self.minus_one:
            zeros = self._plus_one(key, tensors, words, zeros)
        if self.symmetric and bool((zeros != 2 ** (self.bits - 1)).any()):
            odd = int(zeros[zeros != 2 ** (self.bits - 1)][0])
            raise tensors.problem(
                key,
                f"has the zero point {odd}; accepted: {2 ** (self.bits - 1)}, because {self.where} says sym "
                f"(the file may be of the other checkpoint_format)",
            )
        return zeros

    def _plus_one(self, key: str, tensors: Tensors, words: Tensor, stored: Tensor) -> Tensor:
        largest = 2**self.bits - 1
        if not bool((stored == largest).any()):
            return stored + 1
        if self.whole_words and WORD % self.bits == 0:
            ones = sum(1 << shift for shift in range(0, WORD, self.bits))
            return unpack((words.to(torch.int64) + ones).to(torch.int32), self.bits).to(torch.int32)
        raise tensors.problem(
            key,
            f"stores a zero point as {largest}, which means 0 to some and {largest + 1} to others; accepted: "
            f"checkpoint_format gptq_v2, or meta.quantizer of gptqmodel",
        )

    def _groups(self, key: str, tensors: Tensors, inputs: int, groups: int) -> Tensor | None:
        if key not in tensors:
            return None
        g_idx = tensors.take(key, (torch.int32, torch.int64), (inputs,)).to(torch.int64)
        if bool((g_idx < 0).any()) or bool((g_idx >= groups).any()):
            raise tensors.problem(
                key, f"has groups from {int(g_idx.min())} to {int(g_idx.max())}; accepted: 0 to {groups - 1}"
            )
        return g_idx


def _by_gptqmodel(config: dict[str, Any], where: str) -> bool:
    meta = entry(config, "meta", dict, where, {})
    quantizers = entry(meta, "quantizer", (str, list), f"{where}: meta", [])
    named = [quantizers] if isinstance(quantizers, str) else quantizers
    return any(isinstance(name, str) and name.startswith("gptqmodel") for name in named)
