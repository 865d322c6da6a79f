"""Small W8A8 models that several tests compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from npu_fusion.quantization import W8A8DynamicLinear


class MergedMLP(torch.nn.Module):
    """LlamaMLP with gate and up in one projection, W8A8."""

    def __init__(self, hidden: int = 64, intermediate: int = 96) -> None:
        super().__init__()
        self.gate_up = W8A8DynamicLinear.from_float(torch.nn.Linear(hidden, 2 * intermediate, bias=False))
        self.down = W8A8DynamicLinear.from_float(torch.nn.Linear(intermediate, hidden, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class SeparateMLP(torch.nn.Module):
    """The same with two projections, as Hugging Face writes it."""

    def __init__(self, hidden: int = 64, intermediate: int = 96) -> None:
        super().__init__()
        self.gate = W8A8DynamicLinear.from_float(torch.nn.Linear(hidden, intermediate, bias=False))
        self.up = W8A8DynamicLinear.from_float(torch.nn.Linear(hidden, intermediate, bias=False))
        self.down = W8A8DynamicLinear.from_float(torch.nn.Linear(intermediate, hidden, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def merged() -> MergedMLP:
    torch.manual_seed(0)
    return MergedMLP().eval()


def separate() -> SeparateMLP:
    torch.manual_seed(0)
    return SeparateMLP().eval()


def make_merged() -> tuple[MergedMLP, tuple[torch.Tensor]]:
    """A factory for ``npu-fusion explain``."""
    return merged(), (torch.randn(5, 64),)


def make_separate() -> tuple[SeparateMLP, tuple[torch.Tensor]]:
    return separate(), (torch.randn(5, 64),)
