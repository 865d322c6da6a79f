"""What deployed linear layers have in common: sizes, descriptions, being merged, and their input as rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from npu_fusion.quantization.modules._deployed import Deployed, Spec
from npu_fusion.quantization.modules._description import DTYPES, Fields, dtype_name
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import Scheme

Read = Callable[[Fields, str], Any]
"""How an option is read from a description, by its name."""
Linear = TypeVar("Linear", bound="DeployedLinear")


def flag(fields: Fields, name: str) -> bool:
    return fields.take(name, bool)


def dtype_of(accepted: Collection[torch.dtype]) -> Read:
    return lambda fields, name: fields.dtype(name, accepted)


def dtype_or_none(accepted: Collection[torch.dtype]) -> Read:
    return lambda fields, name: fields.optional_dtype(name, accepted)


class DeployedLinear(Deployed):
    """``y = x Wᵀ + b`` of x [..., in_features] with a quantized W [out_features, in_features].

    A kind is made by ``cls(in_features, out_features, scheme=, device=, **options)``, and of these values
    follow the shapes and dtypes of its buffers.
    """

    stands_for = nn.Linear
    reads: ClassVar[Mapping[str, Read]]
    """The options."""
    dtypes: tuple[torch.dtype, ...] = DTYPES
    """Of the input."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        specs: Mapping[str, Spec | None],
        device: torch.device | str | None,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(scheme, specs, device)
        self.in_features = in_features
        self.out_features = out_features
        self.options = dict(options)

    @classmethod
    def like(cls: type[Linear], layer: nn.Linear, scheme: Scheme, **options: Any) -> Linear:
        """To take the place of ``layer``, and to be filled."""
        return cls(layer.in_features, layer.out_features, scheme=scheme, device="meta", **options)

    @classmethod
    def read(cls: type[Linear], fields: Fields, scheme: Scheme) -> Linear:
        sizes = fields.size("in_features"), fields.size("out_features")
        options = {name: read(fields, name) for name, read in cls.reads.items()}
        return cls(*sizes, scheme=scheme, **options)

    def settings(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features} | {
            name: dtype_name(value) if isinstance(value, torch.dtype) else value
            for name, value in self.options.items()
        }

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


def bias_fp32(layer: nn.Linear) -> Tensor | None:
    """A copy of the layer's bias."""
    return None if layer.bias is None else layer.bias.detach().to(torch.float32, copy=True)


def doubled(layer: Linear) -> Linear:
    """With twice the outputs, for two layers in one (``npu_fusion.prepare``)."""
    scheme = layer.scheme
    if scheme.weights.strategy == "tensor":  # each half may have had one scale of its own
        scheme = replace(scheme, weights=replace(scheme.weights, strategy="channel"))
    sizes = layer.in_features, 2 * layer.out_features
    return type(layer)(*sizes, scheme=scheme, device="meta", **layer.options)


def check_int8_sizes(name: str, in_features: int, out_features: int) -> None:
    """Raises ``ValueError`` for less than two inputs (``torch._int_mm`` misreads a matrix of one row on the
    CPU, pytorch issue 195066) and for no output."""
    if in_features < 2 or out_features < 1:
        raise ValueError(
            f"{name}: in_features is {in_features} and out_features {out_features}; "
            f"accepted: in_features at least 2 and out_features at least 1"
        )
