"""Factories for ``npu-fusion lower``."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F


class Gated(torch.nn.Module):
    """One projection, gated, with a buffer and an input that it writes, and a break between two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = torch.nn.Linear(64, 256, bias=False, dtype=torch.bfloat16)
        self.register_buffer("seen", torch.zeros(4, 64, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.seen.add_(x)
        gate, up = self.gate_up(x).chunk(2, -1)
        rows.add_(1)
        y = F.silu(gate) * up
        torch._dynamo.graph_break()
        return y + self.seen.sum()


def gated() -> tuple[Gated, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return Gated(), (torch.randn(4, 64, dtype=torch.bfloat16), torch.zeros(2))


def eigenvalues() -> tuple[Any, tuple[torch.Tensor]]:
    """GE has no such operator."""

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvalsh(x + 1)

    return model, (torch.eye(3),)


def wrong() -> tuple[Any, tuple[torch.Tensor]]:
    """Fails in eager."""
    return (lambda x: x @ x), (torch.ones(2, 3),)


def dies() -> None:
    os.abort()
