"""Float layers to be quantized, and what int8 layers compute, independently written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = ((8,), (1, 8), (3, 8), (2, 3, 8), (2, 1, 3, 8), (1, 2, 1, 2, 8), (2, 1, 2, 1, 2, 8))
EMPTY = ((0, 8), (2, 0, 8), (0, 3, 8))


def layer(in_features: int = 40, out_features: int = 24, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias)


def int8(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def sums(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x · weightᵀ + bias`` in Python integers, int64."""
    columns = weight.tolist()
    added = [0] * len(columns) if bias is None else bias.tolist()
    rows = x.reshape(-1, x.size(-1)).tolist()
    found = [
        [
            sum(a * b for a, b in zip(row, column, strict=True)) + c
            for column, c in zip(columns, added, strict=True)
        ]
        for row in rows
    ]
    return torch.tensor(found, dtype=torch.int64).reshape(*x.shape[:-1], weight.size(0))


def integer_layer(seed: int = 0, in_features: int = 64, out_features: int = 16) -> nn.Linear:
    """Weights that are their own int8 codes times a power of two, so that fake quantization is exact, too."""
    made = layer(in_features, out_features, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (out_features, in_features), generator=generator).float()
    codes[:, 0] = 127
    with torch.no_grad():
        made.weight.copy_(codes * 2.0**-7)
        made.bias.copy_(torch.randint(-100, 100, (out_features,), generator=generator) * 2.0**-10)
    return made


def buffers(module: nn.Module) -> dict[str, Any]:
    return {name: (t.dtype, tuple(t.shape)) for name, t in module.state_dict().items()}
