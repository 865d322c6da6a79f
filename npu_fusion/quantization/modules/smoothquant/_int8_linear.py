"""What the linear layers with int8 weights and int8 inputs have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from npu_fusion.quantization.modules.smoothquant._checks import (
    WEIGHT_QUANT,
    check_choice,
    check_rows,
    check_sizes,
)

Module = TypeVar("Module", bound="FixedDtypes")


class FixedDtypes(nn.Module):
    """A module some of whose buffers keep their dtype in ``Module.to(dtype)``, ``half()`` and the like.

    They are scales: rounded to 16 bits, they would be those of other weights.
    """

    fixed: ClassVar[tuple[str, ...]] = ()

    def _apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        before = {name: self._buffers[name] for name in self.fixed}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class Int8Linear(FixedDtypes):
    """Int8 rows times an int8 weight, in int32.

    ``weight_quant`` decides how many scales there are: one for each output channel, or one.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: torch.dtype | None,
        weight_quant: str,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        check_sizes(type(self).__name__, in_features, out_features)
        check_choice(type(self).__name__, "weight_quant", weight_quant, WEIGHT_QUANT)
        self.in_features = in_features
        self.out_features = out_features
        self.weight_quant = weight_quant
        weight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("weight", weight)
        zero_bias = None if bias is None else torch.zeros(out_features, dtype=bias, device=device)
        self.register_buffer("bias", zero_bias)

    def no_scale(self, device: torch.device | str | None) -> Tensor:
        """Zeros for the scales, fp32 [out_features] or [1]."""
        size = self.out_features if self.weight_quant == "per_channel" else 1
        return torch.zeros(size, dtype=torch.float32, device=device)

    def sums(self, x: Tensor) -> Tensor:
        """int32 [T, out_features] of int8 [..., in_features].

        Raises:
            ValueError: ``x`` has another dtype or last size.
        """
        who = type(self).__name__
        if x.dtype != torch.int8:
            raise ValueError(f"{who}: x has dtype {x.dtype}; accepted: torch.int8 (see quantize_static)")
        check_rows(who, x, self.in_features)
        return torch._int_mm(x.reshape(-1, self.in_features), self.weight.t())

    def unrows(self, y: Tensor, x: Tensor) -> Tensor:
        """``y`` [T, out_features] with the leading dimensions of ``x``."""
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight_quant={self.weight_quant}"
        )
