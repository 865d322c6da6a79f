"""Buffers that no checkpoint has: what a module computes of its configuration (the frequencies of a rotary
embedding). A model that was built on the meta device is without them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def computed_buffers(model: nn.Module, module: nn.Module) -> Mapping[str, Tensor]:
    """The values of the meta buffers of ``module`` by their names, as far as ``model`` can compute them.

    A model of transformers can (version 5 and later): ``_init_weights`` is asked for those of a copy.
    Nothing of ``model`` is changed.
    """
    initialize = getattr(model, "_init_weights", None)
    buffers = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
    if initialize is None or not all(b.is_floating_point() for b in buffers.values()):
        return {}
    # A shallow copy without children and with parameters of its own: only buffers are written.
    twin = copy.copy(module)
    blank = {name: torch.full_like(b, torch.nan, device="cpu") for name, b in buffers.items()}
    held = {
        name: p if p is None else nn.Parameter(p.detach().to("meta"))
        for name, p in module._parameters.items()
    }
    twin.__dict__.update(_buffers={**module._buffers, **blank}, _parameters=held, _modules={})
    with torch.no_grad():
        initialize(twin)
    # What it left alone is still NaN.
    return {
        name: b for name in buffers if (b := twin._buffers[name]) is not None and not bool(b.isnan().any())
    }
