"""What a model is: its modules, its tensors as objects, and their values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import pytest
import torch
from torch import Tensor, nn


def snapshot(model: nn.Module) -> tuple[object, ...]:
    modules = [
        (name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)
    ]
    tensors = [
        (name, id(tensor), tensor.dtype, tensor.device, None if tensor.is_meta else _bytes(tensor))
        for name, tensor in chain(
            model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
        )
    ]
    return tuple(modules), tuple(tensors)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The model is the same afterwards, also if an error leaves the block."""
    before = snapshot(model)
    try:
        yield
    finally:
        assert snapshot(model) == before, "the model was changed"


@contextmanager
def refused(model: nn.Module, *texts: str) -> Iterator[None]:
    """``ValueError`` with all these texts in it, and the model is what it was."""
    with unchanged(model), pytest.raises(ValueError) as caught:
        yield
    for text in texts:
        assert text in str(caught.value), str(caught.value)


def same_values(model: nn.Module, other: nn.Module) -> bool:
    mine, its = model.state_dict(), other.state_dict()
    return list(mine) == list(its) and all(torch.equal(mine[key], its[key]) for key in mine)
