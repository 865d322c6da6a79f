"""Outlier channels in the activations of the demo's model, planted so that it still computes the same
function.

Large language models have a few channels whose activations are some hundred times larger than the others
(LLM.int8(), arXiv:2208.07339). A model of three million parameters has not, so they are made::

    norm weight[c] *= size                        y = W (norm(x) * weight)     is what it was
    weight of every layer that reads it [:, c] /= size

With a power of two that is exact in every floating type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CHANNELS = 6


@torch.no_grad()
def plant_outliers(model: nn.Module, size: float, channels: int = CHANNELS, seed: int = 0) -> nn.Module:
    """Scale ``channels`` channels of each norm in front of linear layers, in place; returns ``model``.

    Args:
        model: a Llama of transformers, or one built like it (``input_layernorm`` → q, k, v;
            ``post_attention_layernorm`` → gate, up).
        size: how much larger these channels become; 1 changes nothing. Best a power of two.
        channels: how many in each norm, drawn at random.

    Raises:
        ValueError: ``size`` is not positive, or the model has no such layers.
    """
    if size <= 0:
        raise ValueError(f"plant_outliers: size is {size}; accepted: a positive number")
    generator = torch.Generator().manual_seed(seed)
    found = False
    layer: Any
    for layer in model.modules():
        attention, mlp = (getattr(layer, name, None) for name in ("self_attn", "mlp"))
        if attention is None or mlp is None:
            continue
        found = True
        readers = (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        )
        for norm, linears in readers:
            where = torch.randperm(norm.weight.numel(), generator=generator)[:channels].to(norm.weight.device)
            norm.weight[where] *= size
            for linear in linears:
                linear.weight[:, where] /= size
    if not found:
        raise ValueError(f"plant_outliers: {type(model).__name__} has no decoder layers like those of Llama")
    return model
