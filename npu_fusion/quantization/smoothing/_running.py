"""Run a model for what can be seen on the way: no gradients, evaluation mode, and afterwards as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and ``model.eval()`` inside; then every module has its own mode again, also on error."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            # Not module.train(training): that would go down into children, which have modes of their own.
            module.training = training


def arguments(where: str, batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """What a model is called with for ``batch``: a tensor, positional arguments, or keyword arguments.

    Raises:
        TypeError: it is something else; ``where`` begins the message.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), batch
    if isinstance(batch, (tuple, list)):
        return batch, {}
    raise TypeError(
        f"{where} is a {type(batch).__name__}; accepted: a tensor, a tuple or list of positional arguments, "
        f"a mapping of keyword arguments"
    )
