"""Remembering what a model, and its repeated blocks, are called with during the user's forward passes.

A model of repeated blocks is calibrated block by block, so that the statistics of one block are held at a
time::

    model ─ block 0 ─ block 1 ─ ... ─ head        blocks: a ModuleList (or Sequential) whose members are
    called once
            └ hidden ─┘                           each, in order, each with what the one before gave

That is watched, not assumed. A model that does something else (skips a block, adds something between two) is
calibrated as one block, itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from npu_fusion.quantization._replay import Call, Memo, main_input, main_output, snapshot


@dataclass
class Blocks:
    """Members of one container, with the names that they have in the model."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]


def repeated_blocks(model: nn.Module, layers: Collection[str]) -> Blocks | None:
    """The members of the container (ModuleList, Sequential) that holds the most of ``layers``, or None.

    Of two containers that hold the same layers the outer one counts.
    """
    best: Blocks | None = None
    most = 0
    for name, container in model.named_modules():
        if container is model or not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        prefix = f"{name}."
        members = dict(container.named_children())
        held = sum(layer.startswith(prefix) for layer in layers)
        if len(members) > 1 and held > most:
            # A member that is itself a planned layer could not be replaced while it is a block.
            if any(f"{prefix}{member}" in layers for member in members):
                continue
            best = Blocks(tuple(f"{prefix}{member}" for member in members), tuple(members.values()))
            most = held
    return best


@dataclass
class Captured:
    """All forward passes so far."""

    model: list[Call] = field(default_factory=list)
    blocks: list[list[Call]] = field(default_factory=list)
    """For each pass the call of each block."""


class Capture:
    """Hooks on a model that remember its calls until :meth:`remove`.

    ``finished`` is called after each complete forward pass. A pass that raises an error does not count.
    """

    def __init__(self, model: nn.Module, blocks: Blocks | None, finished: Callable[[], None]) -> None:
        self.blocks = blocks
        self.captured = Captured()
        self._finished = finished
        self._pass: list[Call] = []
        self._memo: Memo = {}
        self._entered: Call | None = None
        self._last: Any = None
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave),
        ]
        for index, block in enumerate(blocks.modules if blocks else ()):
            self._handles += [
                block.register_forward_pre_hook(_Hook(self._enter_block, index), with_kwargs=True),
                block.register_forward_hook(self._leave_block),
            ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._memo = {}
        self._pass = []
        self._last = None
        self._entered = Call(snapshot(args, self._memo), snapshot(kwargs, self._memo))

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._entered is None:
            return
        self.captured.model.append(self._entered)
        if self.blocks is not None and len(self._pass) == len(self.blocks.modules):
            self.captured.blocks.append(self._pass)
        else:
            self._give_up_blocks()
        self._entered, self._pass, self._last, self._memo = None, [], None, {}
        self._finished()

    def _enter_block(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.blocks is None or self._entered is None:
            return
        found = main_input(args, kwargs)
        if index != len(self._pass) or found is None or (index > 0 and found[1] is not self._last):
            self._give_up_blocks()
            return
        place, _ = found
        if index > 0:
            # It will come from the block before, and is not kept.
            args = tuple(None if position == place else value for position, value in enumerate(args))
            kwargs = {key: None if key == place else value for key, value in kwargs.items()}
        call = Call(snapshot(args, self._memo), snapshot(kwargs, self._memo), place if index > 0 else None)
        self._pass.append(call)

    def _leave_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._last = main_output(output)

    def _give_up_blocks(self) -> None:
        self.blocks = None
        self._pass = []
        self.captured.blocks.clear()


class _Hook:
    """A hook that knows the index of its block; an object, so that it can be copied with the model."""

    def __init__(self, enter: Callable[[int, tuple[Any, ...], dict[str, Any]], None], index: int) -> None:
        self.enter, self.index = enter, index

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.enter(self.index, args, kwargs)


def outputs(
    block: nn.Module, calls: Sequence[Call], hidden: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """What ``block`` gives to the next one for each call."""
    return [main_output(call.replay(block, tensor)) for call, tensor in zip(calls, hidden, strict=True)]
