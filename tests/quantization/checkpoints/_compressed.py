"""Layers and configurations as compressed-tensors writes them, packed number by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.quantization.checkpoints._packers import Tensors, generator, pack_rows


def args(bits: int, type: str = "int", **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": type, "symmetric": True, "dynamic": False, **more}


def group(
    weights: dict[str, Any], inputs: dict[str, Any] | None = None, targets: Any = ("Linear",)
) -> dict[str, Any]:
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


def config(format: str, *groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": own for i, own in enumerate(groups)},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        **more,
    }


TOKEN = args(8, strategy="token", dynamic=True)
TENSOR = args(8, strategy="tensor")
W8A8 = config("int-quantized", group(args(8, strategy="channel"), TOKEN))
FP8 = config(
    "float-quantized",
    group(args(8, "float", strategy="channel"), args(8, "float", strategy="token", dynamic=True)),
)
W4A16 = config("pack-quantized", group(args(4, strategy="group", group_size=32)))
W4A16_ASYM = config("pack-quantized", group(args(4, strategy="group", group_size=32, symmetric=False)))
W8A16 = config("pack-quantized", group(args(8, strategy="channel")))


def scales(g: np.random.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.from_numpy(g.uniform(0.001, 0.02, shape)).to(dtype)


def int8_layer(name: str, outputs: int, inputs: int, tensor: bool = False) -> tuple[Tensors, Tensor]:
    g = generator(len(name))
    codes = torch.from_numpy(g.integers(-128, 128, (outputs, inputs))).to(torch.int8)
    scale = scales(g, 1) if tensor else scales(g, outputs, 1)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def float8_layer(name: str, outputs: int, inputs: int, tensor: bool = False) -> tuple[Tensors, Tensor]:
    g = generator(len(name))
    codes = torch.from_numpy(g.normal(0, 50, (outputs, inputs))).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = scales(g, 1, dtype=torch.float32) if tensor else scales(g, outputs, 1, dtype=torch.float32)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def packed_layer(
    name: str, outputs: int, inputs: int, bits: int = 4, size: int = 32, symmetric: bool = True
) -> tuple[Tensors, Tensor]:
    g = generator(len(name) + bits)
    groups, half = -(-inputs // size), 2 ** (bits - 1)
    codes = g.integers(-half, half, (outputs, inputs))
    zeros = (
        np.zeros((outputs, groups), dtype=np.int64)
        if symmetric
        else g.integers(-half, half, (outputs, groups))
    )
    scale = scales(g, outputs, groups, dtype=torch.float16)
    tensors = {
        "weight_packed": pack_rows(codes + half, bits),
        "weight_shape": torch.tensor([outputs, inputs]),
        "weight_scale": scale,
    }
    if not symmetric:
        # Along the outputs, so the words are rows of the transposed.
        tensors["weight_zero_point"] = pack_rows(zeros.T + half, bits).t()
    spread = [np.repeat(zeros, size, 1)[:, :inputs], scale.float().repeat_interleave(size, 1)[:, :inputs]]
    return tensors, torch.from_numpy(codes - spread[0]).float() * spread[1]
