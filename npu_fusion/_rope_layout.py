"""Which two numbers a model's rotary embedding turns together: half a vector apart, or neighbours.

::

    halves   x[i], x[i + d/2]        pairs   x[2i], x[2i + 1]

It is read from ``config.rope_interleave`` where the attention's forward reads that itself. Otherwise the one
function of a rotary name that the forward calls is tried on numbers. Nothing may be concluded from names
alone: transformers has functions that de-interleave and then call ``rotate_half``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn


def rotates_halves(attention: nn.Module, width: int) -> bool | str:
    """True for halves, False for pairs, in words why it is not known.

    False also up to a width of two (layers without rotation have none), where the two are the same.
    """
    if width <= 2:
        return False
    forward = inspect.unwrap(type(attention).forward)
    if not isinstance(forward, FunctionType):
        return "its forward is no Python function"
    names = forward.__code__.co_names
    flag = getattr(getattr(attention, "config", None), "rope_interleave", None)
    if "rope_interleave" in names and isinstance(flag, bool):
        return not flag
    rotaries = [name for name in names if "rotary" in name and callable(forward.__globals__.get(name))]
    if len(rotaries) != 1:
        called = " and ".join(rotaries) if rotaries else "no function of a rotary name"
        return f"its forward calls {called}"
    return _tried(rotaries[0], forward.__globals__[rotaries[0]], width)


def _tried(name: str, rotary: Callable[..., Any], width: int) -> bool | str:
    """What ``rotary(q, k, cos, sin)`` does to tensors of shape [batch, heads, tokens, width]."""
    parameters = list(inspect.signature(rotary).parameters)
    if parameters[2:4] != ["cos", "sin"]:
        return f"{name} does not take q, k, cos and sin"
    with torch.no_grad(), torch.device("cpu"):
        x = torch.arange(1.0, 2 * 3 * width + 1).view(1, 2, 3, width)
        angles = torch.outer(torch.arange(1.0, 4), 1 / torch.arange(1.0, width // 2 + 1))
        cos, sin = (torch.cat((half, half), -1).unsqueeze(0) for half in (angles.cos(), angles.sin()))
        try:
            turned, _ = rotary(x, x, cos, sin)
        except Exception as error:
            return f"{name} does not take q, k, cos and sin ({type(error).__name__}: {error})"
        paired = x.unflatten(-1, (width // 2, 2)).transpose(-1, -2).flatten(-2)
        for vector, halves in ((x, True), (paired, False)):
            if isinstance(turned, Tensor) and _close(turned, _half_rotated(vector, cos, sin)):
                return halves
    return f"{name} computes something else than the rotation of halves or of pairs"


def _half_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3)
