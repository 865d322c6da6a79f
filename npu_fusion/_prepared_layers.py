"""Linear layers that keep their weight in the form in which the operators of latent attention take it.

::

    torch.nn.Linear        y = x Wᵀ                        W [out, in]
    TransposedLinear       y = x @ weight_t                weight_t = Wᵀ [in, out]
      with rope columns    y = un-pair(x @ weight_t)       its rope columns in the order 0, h, 1, h+1, ...
    SplitLinear            y = cat(x @ weight_dq, x @ weight_dkv_kr)
    ExpandingLinear        y = F.linear(x, cat(weight_uk, weight_uv))    [N, D, C] and [N, Dv, C]

All of it is movement of data: the values are those of the layer before, up to the order in which a matmul
adds. Each layer saves and loads ``weight`` as ``torch.nn.Linear`` does, and nothing else.

The forwards are spelled for the passes, which see through a transposition, a concatenation that is cut again,
and "view, transpose" before the rotation of halves.

The operators of the NPU take matrices in the format FRACTAL_NZ. It is made of a weight that is on an NPU when
the layer is made or assigned to; moving the layer there later leaves its weight in the plain format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npu_fusion.meta_impls.format_cast import FRACTAL_NZ

_NPU = "npu"


@dataclass(frozen=True)
class RopeColumns:
    """The last ``width`` of every head's ``before + width`` columns, which the model rotates by halves.

    With ``h = width / 2``, halves are columns ``0 .. h-1`` and ``h .. 2h-1``; paired, these alternate, which
    is what ``npu_mla_prolog`` and ``npu_interleave_rope`` rotate.
    """

    heads: int
    before: int
    width: int


def _pair(x: Tensor, rope: RopeColumns | None) -> Tensor:
    """``x`` with the rope columns (last dimension) of each head paired."""
    return x if rope is None else _turned(x, rope, (2, rope.width // 2))


def _unpair(x: Tensor, rope: RopeColumns | None) -> Tensor:
    """The inverse of :func:`_pair`."""
    return x if rope is None else _turned(x, rope, (rope.width // 2, 2))


def _turned(x: Tensor, rope: RopeColumns, shape: tuple[int, int]) -> Tensor:
    per_head = x.unflatten(-1, (rope.heads, rope.before + rope.width)) if rope.heads > 1 else x
    plain, turned = per_head.split([rope.before, rope.width], -1)
    turned = turned.unflatten(-1, shape).transpose(-1, -2).flatten(-2)
    joined = torch.cat((plain, turned), -1)
    return joined.flatten(-2) if rope.heads > 1 else joined


class PreparedLinear(nn.Module, ABC):
    """What takes the place of a ``torch.nn.Linear`` without bias: same values, same state dict."""

    bias: None = None
    matrices: ClassVar[bool]
    """Whether the parameters are operands of plain matmuls, for which there is a format of the NPU."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features

    @abstractmethod
    def parts(self, weight: Tensor) -> dict[str, Tensor]:
        """The parameters that stand for a weight of shape [out, in], best as views of it."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The weight [out, in] of the layer before; where the parameters are in another order, a copy."""

    def _take(self, layer: nn.Linear) -> None:
        trained = layer.weight.requires_grad
        for name, part in self.parts(layer.weight.detach()).items():
            self.register_parameter(name, nn.Parameter(self._laid_out(part), requires_grad=trained))
        self.train(layer.training)

    def _laid_out(self, part: Tensor) -> Tensor:
        copy = part.detach().clone(memory_format=torch.contiguous_format)
        if self.matrices and copy.device.type == _NPU:
            return torch.ops.npu.npu_format_cast(copy, FRACTAL_NZ)
        return copy

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.weight
        destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Its own parameters out of one ``weight``; complaints with the key and the shape of that."""
        if not any(f"{prefix}{name}" in state_dict for name in self._parameters):  # as in named_parameters()
            key = f"{prefix}weight"
            parts: dict[str, Tensor] = {}
            shape = (self.out_features, self.in_features)
            if key not in state_dict:
                missing_keys.extend([key] if strict else [])
            elif (given := state_dict.pop(key)).shape == shape:
                parts = self.parts(given)
            else:
                error_msgs.append(
                    f"size mismatch for {key}: copying a param with shape {given.shape} from checkpoint, "
                    f"the shape in current model is {torch.Size(shape)}."
                )
            assign = local_metadata.get("assign_to_params_buffers", False)
            for name, current in self._parameters.items():
                part = parts.get(name)
                # The tensor that is there already is what loading it again leaves as it is.
                state_dict[prefix + name] = (
                    current if part is None else self._laid_out(part) if assign else part
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class TransposedLinear(PreparedLinear):
    """``x @ weight_t``, with rope columns kept paired and given back as halves."""

    matrices = True
    weight_t: Tensor

    def __init__(self, layer: nn.Linear, rope: RopeColumns | None = None) -> None:
        super().__init__(layer)
        self.rope = rope
        self._take(layer)

    def parts(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight_t": _pair(weight.t(), self.rope)}

    @property
    def weight(self) -> Tensor:
        return _unpair(self.weight_t, self.rope).t()

    def forward(self, x: Tensor) -> Tensor:
        return _unpair(x @ self.weight_t, self.rope)


class SplitLinear(PreparedLinear):
    """The down projections of the query and of the latent, once in one layer, with a weight each."""

    matrices = True
    weight_dq: Tensor
    weight_dkv_kr: Tensor

    def __init__(self, layer: nn.Linear, latent: int, rope: RopeColumns | None = None) -> None:
        super().__init__(layer)
        self.sizes = [self.out_features - latent, latent]
        self.rope = rope
        self._take(layer)

    def parts(self, weight: Tensor) -> dict[str, Tensor]:
        query, latent = weight.t().split(self.sizes, -1)
        return {"weight_dq": query, "weight_dkv_kr": _pair(latent, self.rope)}

    @property
    def weight(self) -> Tensor:
        return torch.cat((self.weight_dq, _unpair(self.weight_dkv_kr, self.rope)), -1).t()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x @ self.weight_dq, _unpair(x @ self.weight_dkv_kr, self.rope)), -1)


class ExpandingLinear(PreparedLinear):
    """Keys and values out of the latent: ``W_UK`` [N, D, C] and ``W_UV`` [N, Dv, C], each contiguous.

    Absorbed attention multiplies with one of them at a time, and as a part of ``weight`` neither is
    contiguous. DeepSeek's own code does the same by hand and reads ``weight``.
    """

    matrices = False
    weight_uk: Tensor
    weight_uv: Tensor

    def __init__(self, layer: nn.Linear, heads: int, key: int, value: int) -> None:
        super().__init__(layer)
        self.heads, self.key, self.value = heads, key, value
        self._take(layer)

    def parts(self, weight: Tensor) -> dict[str, Tensor]:
        key, value = weight.unflatten(0, (self.heads, -1)).split([self.key, self.value], 1)
        return {"weight_uk": key, "weight_uv": value}

    @property
    def weight(self) -> Tensor:
        return torch.cat((self.weight_uk, self.weight_uv), 1).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)
