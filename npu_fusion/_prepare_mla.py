"""Multi-head latent attention: its weights in the form in which ``npu_mla_prolog`` takes them.

::

    q_a_proj, q_b_proj, kv_a_proj_with_mqa    [out, in]            ->    [in, out]
    kv_b_proj                                 [N * (D + Dv), C]    ->    W_UK [N, D, C], W_UV [N, Dv, C]
    q_a and kv_a in one layer                 [Cq + C + Dr, H]     ->    [H, Cq], [H, C + Dr]
    rope columns of a model that rotates halves                    ->    paired

Each layer is replaced by one of ``_prepared_layers`` under the same name, which computes the same value.

An attention is found by the names of its layers and norms, those of transformers or of DeepSeek's own code,
and by sizes that agree with each other and with its attributes. Either all its layers are replaced or none:
the operators take none of the weights of an attention of which one has a bias or is quantized.

Latent and rope key that are projected by two layers are not merged: that would need the attention's forward
as a graph, as a SwiGLU's, and ``torch.fx`` cannot trace the forward of an attention with optional arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from npu_fusion._prepare_checks import Sharing, attached, shared_memory
from npu_fusion._prepare_result import Rearranged, Skipped
from npu_fusion._prepared_layers import (
    ExpandingLinear,
    PreparedLinear,
    RopeColumns,
    SplitLinear,
    TransposedLinear,
)
from npu_fusion._rope_layout import rotates_halves
from npu_fusion.config import FusionConfig

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class _Names:
    """Of the children of an attention: down and up projections and the norms between them."""

    q_a: str
    q_norm: str
    q_b: str
    kv_a: str
    kv_norm: str
    kv_b: str
    qkv_a: tuple[str, ...] = ()
    """Of q_a and kv_a in one layer."""


_SPELLINGS = (
    _Names(
        q_a="q_a_proj",
        q_norm="q_a_layernorm",
        q_b="q_b_proj",
        kv_a="kv_a_proj_with_mqa",
        kv_norm="kv_a_layernorm",
        kv_b="kv_b_proj",
        qkv_a=("fused_qkv_a_proj_with_mqa", "fused_qkv_a_proj"),
    ),
    _Names(q_a="wq_a", q_norm="q_norm", q_b="wq_b", kv_a="wkv_a", kv_norm="kv_norm", kv_b="wkv_b"),
)
_HEADS = ("n_local_heads", "num_local_heads", "num_heads")  # the number of this process first
_SIZES = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")


@dataclass(frozen=True)
class MlaPlan:
    """All that can fail for one attention, but for memory, done beforehand."""

    module: nn.Module
    done: Rearranged
    layers: Mapping[str, Callable[[nn.Linear], PreparedLinear]]

    def carry_out(self) -> None:
        for name, make in self.layers.items():
            setattr(self.module, name, make(getattr(self.module, name)))


def plan(model: nn.Module, config: FusionConfig, sharing: Sharing) -> tuple[list[MlaPlan], list[Skipped]]:
    """Every latent attention of ``model`` that can be rearranged, and why the others cannot."""
    plans: list[MlaPlan] = []
    skipped: list[Skipped] = []
    off = None if config.enabled("mla_prolog") else "fusion_config switches off mla_prolog"
    for name, module in model.named_modules():
        attention = _attention(module)
        if attention is None:
            continue
        made = off or _obstacle(attention, sharing) or _planned(name, attention)
        if isinstance(made, str):
            skipped.append(Skipped(name, made))
        else:
            plans.append(made)
    return plans, skipped


@dataclass(frozen=True)
class _Attention:
    module: nn.Module
    names: _Names
    layers: Mapping[str, str]
    """Which layer -> its name in the module."""

    def __getitem__(self, which: str) -> nn.Linear:
        return getattr(self.module, self.layers[which])


def _attention(module: nn.Module) -> _Attention | None:
    """By the names of its children; None also for one that is prepared."""
    children = dict(module.named_children())
    for names in _SPELLINGS:
        known = [("qkv_a", name) for name in names.qkv_a]
        known += [(which, getattr(names, which)) for which in ("q_a", "q_b", "kv_a", "kv_b")]
        layers = {which: name for which, name in known if name in children}
        if "kv_b" in layers and ("kv_a" in layers or "qkv_a" in layers):
            if any(isinstance(children[name], PreparedLinear) for name in layers.values()):
                return None
            return _Attention(module, names, layers)
    return None


def _obstacle(attention: _Attention, sharing: Sharing) -> str | None:
    """Why no layer of the attention can be replaced, or None.

    1. Each is a ``torch.nn.Linear`` without bias, of a floating dtype, to which nothing is attached.
    2. It is a child of this module alone, and its weight is nobody else's memory.
    """
    names = list(attention.layers.values())
    layers = [attention[which] for which in attention.layers]
    for name, layer in zip(names, layers, strict=True):
        reason = _layer_obstacle(name, layer) or attached(name, layer)
        if reason is not None:
            return reason
        if sharing.holders(layer) > 1:
            return f"{name} is a layer of other modules, too"
    return shared_memory(names, layers, sharing)


def _layer_obstacle(name: str, layer: nn.Module) -> str | None:
    if type(layer) is not nn.Linear:
        kind = type(layer)
        return f"{name} is a {kind.__qualname__} of {kind.__module__}; accepted: torch.nn.Linear"
    if layer.bias is not None:
        return f"{name} has a bias, for which the operators have no argument"
    others = [key for key, _ in chain(layer.named_parameters(), layer.named_buffers()) if key != "weight"]
    if others:
        return f"{name} has other tensors than a weight ({', '.join(others)})"
    if layer.weight.dtype not in _FLOATS:
        return f"{name}.weight is {str(layer.weight.dtype).removeprefix('torch.')}; accepted: floating dtypes"
    return None


@dataclass(frozen=True)
class _Sizes:
    heads: int
    nope: int
    rope: int
    value: int
    latent: int


def _sizes(attention: _Attention) -> _Sizes | str:
    given = vars(attention.module)
    heads = next((given[name] for name in _HEADS if isinstance(given.get(name), int)), None)
    if heads is None:
        return f"it has no number of heads ({', '.join(_HEADS)})"
    for name in _SIZES:
        if not isinstance(given.get(name), int):
            return f"it has no size {name}"
    return _Sizes(heads, *(given[name] for name in _SIZES))


def _misfit(attention: _Attention, sizes: _Sizes) -> str | None:
    """Which layer or norm is missing, or is of another size than the others and the attributes say."""
    layers, names = attention.layers, attention.names
    joint, low_rank = "qkv_a" in layers, "q_b" in layers
    if low_rank != (joint or "q_a" in layers):
        return f"it has only one of {names.q_a} and {names.q_b}"
    if joint and ("q_a" in layers or "kv_a" in layers):
        return f"it has {layers['qkv_a']} beside another down projection"
    rank = attention["q_b"].in_features if low_rank else 0
    hidden = attention["qkv_a" if joint else "kv_a"].in_features
    down = sizes.latent + sizes.rope
    shapes = {
        "qkv_a": [rank + down, hidden],
        "q_a": [rank, hidden],
        "q_b": [sizes.heads * (sizes.nope + sizes.rope), rank],
        "kv_a": [down, hidden],
        "kv_b": [sizes.heads * (sizes.nope + sizes.value), sizes.latent],
    }
    for which, layer in layers.items():
        if (shape := [*attention[which].weight.shape]) != shapes[which]:
            return f"the weight of {layer} is {shape}; by the sizes of the attention: {shapes[which]}"
    norms = {names.q_norm: rank, names.kv_norm: sizes.latent} if low_rank else {names.kv_norm: sizes.latent}
    for norm, size in norms.items():
        gamma = getattr(getattr(attention.module, norm, None), "weight", None)
        if not (isinstance(gamma, Tensor) and [*gamma.shape] == [size]):
            return f"it has no {norm} of {size} elements"
    return f"qk_rope_head_dim is {sizes.rope}, which is odd" if sizes.rope % 2 else None


def _planned(name: str, attention: _Attention) -> MlaPlan | str:
    """What becomes of each layer, or in words which size does not fit."""
    sizes, layers = _sizes(attention), attention.layers
    misfit = sizes if isinstance(sizes, str) else _misfit(attention, sizes)
    if isinstance(sizes, str) or misfit is not None:
        return str(misfit)
    halves = rotates_halves(attention.module, sizes.rope)
    query_columns, latent_columns = (
        RopeColumns(heads, before, sizes.rope) if halves is True else None
        for heads, before in ((sizes.heads, sizes.nope), (1, sizes.latent))
    )
    makers: dict[str, Callable[[nn.Linear], PreparedLinear]] = {
        "qkv_a": partial(SplitLinear, latent=sizes.latent + sizes.rope, rope=latent_columns),
        "q_a": TransposedLinear,
        "q_b": partial(TransposedLinear, rope=query_columns),
        "kv_a": partial(TransposedLinear, rope=latent_columns),
        "kv_b": partial(ExpandingLinear, heads=sizes.heads, key=sizes.nope, value=sizes.value),
    }
    return MlaPlan(
        attention.module,
        Rearranged(name, tuple(layers.values()), tuple(_texts(layers, halves))),
        {layer: makers[which] for which, layer in layers.items()},
    )


def _texts(layers: Mapping[str, str], halves: bool | str) -> list[str]:
    turned = [layers[which] for which in ("q_a", "q_b", "kv_a") if which in layers]
    texts = [f"{_listed(turned)} transposed", f"{layers['kv_b']} kept as W_UK and W_UV"]
    if "qkv_a" in layers:
        texts.insert(1, f"{layers['qkv_a']} kept as the weights of query and latent, transposed")
    if "q_b" not in layers:
        texts.append("the query has no low rank, so npu_mla_prolog does not apply")
    if halves is True:
        texts.append("rope columns paired, as the model rotates halves")
    elif isinstance(halves, str):
        texts.append(f"rope columns not touched, as it is unknown what the model rotates: {halves}")
    return texts


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
