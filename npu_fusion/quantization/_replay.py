"""Calls of modules that are remembered and made again.

A call is remembered as a copy, so that nothing the model or its user does afterwards changes it, and every
replay works on a copy of that copy where a module could change what it is given (a KV cache, say).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Memo = dict[tuple[int, int], tuple[Any, Any]]
"""Identity of an object (of a tensor also how often it was written) -> its copy, and the object itself, which
must live as long as its identity counts."""


def snapshot(value: Any, memo: Memo) -> Any:
    """A copy that changes of ``value`` do not reach; what is one object in several places stays one.

    Modules, functions and immutable values are kept as they are.

    Raises:
        RuntimeError: an object holds tensors in the middle of an autograd graph, which cannot be copied.
    """
    if isinstance(value, nn.Module) or callable(value) or value is None:
        return value
    key = (id(value), value._version if isinstance(value, Tensor) and not value.is_inference() else 0)
    known = memo.get(key)
    if known is not None:
        return known[0]
    result: Any
    if isinstance(value, Tensor):
        # Tensors made under inference_mode could not be used outside of it; a clone made outside can.
        with torch.inference_mode(False):
            result = value.detach().clone()
    elif type(value) in (tuple, list):
        result = type(value)(snapshot(item, memo) for item in value)
    elif type(value) is dict:
        result = {key: snapshot(item, memo) for key, item in value.items()}
    else:
        try:
            with torch.inference_mode(False):
                result = copy.deepcopy(value)
        except RuntimeError as error:
            raise RuntimeError(
                f"calibration: a {type(value).__name__} that a module is called with "
                f"cannot be copied ({error}); "
                f"run the forward passes under torch.no_grad()"
            ) from error
    memo[key] = (result, value)
    return result


@dataclass
class Call:
    """One call of a module, to be made again, maybe with another tensor in the place of ``hidden``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: int | str | None = None
    """Where the tensor stands that the module before it gave; None: nowhere."""

    def arguments(self, hidden: Tensor | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What to call the module with: fresh copies, with ``hidden`` in its place."""
        memo: Memo = {}
        args = list(snapshot(self.args, memo))
        kwargs = snapshot(self.kwargs, memo)
        if isinstance(self.hidden, int):
            args[self.hidden] = hidden
        elif self.hidden is not None:
            kwargs[self.hidden] = hidden
        return tuple(args), kwargs

    def replay(self, module: Callable[..., Any], hidden: Tensor | None = None) -> Any:
        args, kwargs = self.arguments(hidden)
        return module(*args, **kwargs)


def main_output(output: Any) -> Any:
    """What a block hands to the next one: its output, or the first of several."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def main_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor] | None:
    """Where the first floating tensor among the arguments stands, and the tensor."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, Tensor) and value.is_floating_point():
            return place, value
    return None
