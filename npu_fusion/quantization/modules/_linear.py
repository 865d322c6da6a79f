"""What deployed linear layers have in common: their sizes, and their input as rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from npu_fusion.quantization.modules._deployed import Deployed, Spec
from npu_fusion.quantization.modules._description import DTYPES
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import Scheme


class DeployedLinear(Deployed):
    """``y = x Wᵀ + b`` of x [..., in_features] with a quantized W [out_features, in_features]."""

    stands_for = nn.Linear
    dtypes: tuple[torch.dtype, ...] = DTYPES
    """Of the input."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        specs: Mapping[str, Spec | None],
        device: torch.device | str | None,
    ) -> None:
        super().__init__(scheme, specs, device)
        self.in_features = in_features
        self.out_features = out_features

    def settings(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features}

    def rows(self, x: Tensor) -> Tensor:
        """``x`` as [T, in_features], to be called before anything else is done with it.

        Raises:
            ValueError: ``x`` has a dtype that the layer does not take, or its last size is not
                ``in_features``.
        """
        name = type(self).__name__
        if x.dtype not in self.dtypes:
            raise ValueError(f"{name}: x has dtype {x.dtype}; accepted: {', '.join(map(str, self.dtypes))}")
        if x.dim() == 0 or x.size(-1) != self.in_features:
            raise ValueError(
                f"{name}: x has shape {list(x.shape)}; accepted: [..., {self.in_features}] (in_features last)"
            )
        # The rows are made two-dimensional before they are quantized, not after: for a single token Inductor
        # turns a later reshape into a stride of 0, with which torch._int_mm computes garbage on the CPU
        # (pytorch issue 195066).
        return x.reshape(-1, self.in_features)

    def unrows(self, y: Tensor, x: Tensor) -> Tensor:
        """``y`` [T, out_features] in the dtype and the leading dimensions of ``x``."""
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        has = {
            name: name in self._buffers and self._buffers[name] is not None for name in ("bias", *self.shared)
        }
        shown = [
            f"in_features={self.in_features}",
            f"out_features={self.out_features}",
            f"bias={has['bias']}",
        ]
        if has.get("smooth_scales"):
            shown.append("smooth_scales=True")
        return ", ".join(shown)


def for_each_output(weight: QuantizedWeight) -> Tensor:
    """The scale of a weight without groups, with one entry for each output also where there is one in all.

    Two layers can then become one (``npu_fusion.prepare``), and the operators take it so.
    """
    scale = weight.scale
    return scale if weight.scheme.strategy == "channel" else scale.expand(weight.shape[0]).contiguous()


def as_given(scheme: Scheme, codes: Tensor, scale: Tensor) -> QuantizedWeight:
    """The weight that a layer was made of, out of its codes and :func:`for_each_output`."""
    one = scheme.weights.strategy == "tensor"
    return QuantizedWeight(scheme.weights, codes, scale[:1].clone() if one else scale)


def merged_scheme(scheme: Scheme) -> Scheme:
    """Of two layers in one: each half may have had one scale of its own."""
    if scheme.weights.strategy != "tensor":
        return scheme
    return replace(scheme, weights=replace(scheme.weights, strategy="channel"))


def check_int8_sizes(name: str, in_features: int, out_features: int) -> None:
    """Raises ``ValueError`` for less than two inputs (``torch._int_mm`` misreads a matrix of one row on the
    CPU, pytorch issue 195066) and for no output."""
    if in_features < 2 or out_features < 1:
        raise ValueError(
            f"{name}: in_features is {in_features} and out_features {out_features}; "
            f"accepted: in_features at least 2 and out_features at least 1"
        )
