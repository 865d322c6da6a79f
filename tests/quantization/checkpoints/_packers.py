"""Checkpoints of other tools, packed here from the definitions of their formats, number by number.

Nothing of the package is used, so that reading them back says something.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]


class Small(nn.Module):
    """An embedding that the head is tied to, a norm, two layers of one input, and one behind them."""

    def __init__(
        self, hidden: int = 128, inner: int = 64, bias: bool = False, dtype: Any = torch.float32
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, hidden, dtype=dtype)
        self.norm = nn.LayerNorm(hidden, dtype=dtype)
        self.gate = nn.Linear(hidden, inner, bias=bias, dtype=dtype)
        self.up = nn.Linear(hidden, inner, bias=bias, dtype=dtype)
        self.down = nn.Linear(inner, hidden, bias=bias, dtype=dtype)
        self.head = nn.Linear(hidden, 16, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens))
        y: Tensor = self.head(x + self.down(nn.functional.silu(self.gate(x)) * self.up(x)))
        return y


LAYERS = ("gate", "up", "down")
TOKENS = torch.arange(12).view(2, 6)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def int32(words: Any) -> Tensor:
    """Unsigned 32-bit numbers as the int32 with the same bits."""
    return torch.from_numpy(np.asarray(words, dtype=np.uint64).astype(np.uint32).view(np.int32).copy())


def stream(values: Sequence[int], bits: int) -> list[int]:
    """Words of 32 bits that hold ``values`` one after the other, lowest bits first."""
    number = sum(int(value) << (bits * place) for place, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    return [(number >> (32 * word)) & 0xFFFFFFFF for word in range(count)]


def pack_rows(values: np.ndarray[Any, Any], bits: int) -> Tensor:
    """int32 [R, C * bits / 32] of [R, C]: packed along the columns."""
    return int32([stream(row, bits) for row in values])


def save(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str = "model.safetensors"
) -> Path:
    """A folder as from_pretrained takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    (folder / "config.json").write_text(json.dumps({"quantization_config": dict(config)}))
    return folder


def save_sharded(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], count: int = 3
) -> Path:
    """The same in several files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = {}
    for shard in range(count):
        name = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        part = {key: t.contiguous() for i, (key, t) in enumerate(tensors.items()) if i % count == shard}
        save_file(part, folder / name)
        listed.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    (folder / "config.json").write_text(json.dumps({"quantization_config": dict(config)}))
    return folder


def floats(seed: int = 1, hidden: int = 128) -> Tensors:
    """What of :class:`Small` no format quantizes. The head is tied, so it is not there."""
    g = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(16, hidden, generator=g),
        "norm.weight": torch.rand(hidden, generator=g) + 0.5,
        "norm.bias": torch.randn(hidden, generator=g) * 0.1,
    }


def sizes(name: str, hidden: int = 128, inner: int = 64) -> tuple[int, int]:
    """Outputs and inputs of a layer of :class:`Small`."""
    return (hidden, inner) if name == "down" else (inner, hidden)


def model_of(layer: Callable[[str, int, int], tuple[Tensors, Tensor]]) -> tuple[Tensors, dict[str, Tensor]]:
    """Tensors of a checkpoint, and the weights that they mean, fp32, by layer.

    ``layer`` gives both for one (name, outputs, inputs), the tensors without the name of the layer.
    """
    tensors, weights = floats(), {}
    for name in LAYERS:
        own, weights[name] = layer(name, *sizes(name))
        tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    return tensors, weights


def reference(weights: Mapping[str, Tensor], biases: Mapping[str, Tensor] | None = None) -> Small:
    """The float model with these weights, and the other tensors of the checkpoint."""
    model = Small(bias=biases is not None)
    values = floats() | {f"{name}.weight": weight for name, weight in weights.items()}
    values["head.weight"] = values["embed.weight"]
    model.load_state_dict({key: t.float() for key, t in {**values, **(biases or {})}.items()})
    return model


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq_pack(values: np.ndarray[Any, Any]) -> Tensor:
    """int32 [R, C / 8] of [R, C]: the j-th nibble of a word is output AWQ_ORDER[j] of its eight."""
    rows, columns = values.shape
    words = np.zeros((rows, columns // 8), dtype=np.uint64)
    for word in range(columns // 8):
        for nibble, output in enumerate(AWQ_ORDER):
            words[:, word] |= values[:, 8 * word + output].astype(np.uint64) << np.uint64(4 * nibble)
    return int32(words)


def awq_layer(name: str, outputs: int, inputs: int, group: int = 32) -> tuple[Tensors, Tensor]:
    g = generator(len(name))
    w = g.integers(0, 16, (inputs, outputs))
    z = g.integers(0, 16, (inputs // group, outputs))
    s = torch.from_numpy(g.uniform(0.001, 0.02, z.shape)).half()
    weight = torch.from_numpy(w - np.repeat(z, group, 0)).float() * s.float().repeat_interleave(group, 0)
    return {"qweight": awq_pack(w), "qzeros": awq_pack(z), "scales": s}, weight.t()


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def gptq_layer(
    name: str,
    outputs: int,
    inputs: int,
    bits: int = 4,
    group: int = 32,
    minus_one: bool = True,
    symmetric: bool = False,
    order: Sequence[int] | None = None,
) -> tuple[Tensors, Tensor]:
    """``order``: the group of each input."""
    g = generator(len(name) + bits)
    groups = -(-inputs // group)
    g_idx = np.arange(inputs) // group if order is None else np.asarray(order)
    w = g.integers(0, 2**bits, (inputs, outputs))
    z = g.integers(1, 2**bits, (groups, outputs))  # 0 is what v1 cannot store
    if symmetric:
        z[:] = 2 ** (bits - 1)
    s = torch.from_numpy(g.uniform(0.001, 0.02, z.shape)).half()
    weight = torch.from_numpy(w - z[g_idx]).float() * s.float()[torch.from_numpy(g_idx)]
    tensors = {
        "qweight": pack_rows(w.T, bits).t(),
        "qzeros": pack_rows(z - 1 if minus_one else z, bits),
        "scales": s,
        "g_idx": torch.from_numpy(g_idx).to(torch.int32),
    }
    return tensors, weight.t()


def gptq_config(bits: int = 4, group: int = 32, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": False,
        "desc_act": False,
        **more,
    }


FP8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def fp8_layer(name: str, outputs: int, inputs: int) -> tuple[Tensors, Tensor]:
    g = generator(len(name))
    codes = torch.from_numpy(g.normal(0, 60, (outputs, inputs))).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.from_numpy(g.uniform(1e-4, 1e-2, (-(-outputs // 128), -(-inputs // 128)))).float()
    # Number by number, in fp32.
    weight = codes.float().numpy().copy()
    for n in range(outputs):
        for block in range(scale.size(1)):
            weight[n, 128 * block : 128 * (block + 1)] *= np.float32(scale[n // 128, block])
    return {"weight": codes, "weight_scale_inv": scale}, torch.from_numpy(weight)


def weight_of(layer: nn.Module) -> Tensor:
    """fp32 [N, K] of a layer, deployed or not."""
    if isinstance(layer, nn.Linear):
        return layer.weight.detach().float()
    weight: Tensor = layer.quantized_weight().dequantize()  # type: ignore[operator]
    return weight
