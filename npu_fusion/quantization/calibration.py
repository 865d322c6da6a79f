"""Between ``quantize`` and ``convert``: forward passes are remembered, then every layer is quantized.

The user runs the model ``batch_num`` times. What the model and its blocks are called with is remembered, and
in the last of these passes the work is done, block by block::

    for each block:   run it on the remembered calls, gather the statistics of its layers
                      solve each group of siblings, the last one first; fold smoothing into what feeds the
                      group put the quantized layers into the model run it again: the next block is calibrated
                      on what quantized ones give

So the memory beside the model is that of one block's statistics and of the hidden states between two blocks.
What is outside of the blocks (``lm_head``) is done at last, in the model as a whole. Layers whose algorithm
needs no data are quantized without running anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npu_fusion.quantization._capture import Blocks, Capture, outputs, repeated_blocks
from npu_fusion.quantization._observe import Siblings, observe, siblings
from npu_fusion.quantization._progress import progress
from npu_fusion.quantization._replay import Call
from npu_fusion.quantization.algorithms import ALGORITHMS
from npu_fusion.quantization.algorithms._base import Problem, Solution
from npu_fusion.quantization.modules._deployed import Layer, deploy, share
from npu_fusion.quantization.scheme import Scheme
from npu_fusion.quantization.smoothing import Producer, find_groups, trace
from npu_fusion.quantization.statistics import Statistics


class Calibration:
    """The state of a model between ``quantize`` and ``convert``."""

    def __init__(
        self, model: nn.Module, schemes: Mapping[str, Scheme], batch_num: int, show_progress: bool | None
    ) -> None:
        self.model = model
        self.schemes = dict(schemes)
        self.batches_left = batch_num
        self.folded: dict[str, str] = {}
        """Layer -> what its smoothing was folded into."""
        self.unseen: list[str] = []
        """Layers that no forward pass has reached: rounded to nearest."""
        self._show_progress = show_progress
        self._capture: Capture | None = None
        if self._needs_data():
            blocks = repeated_blocks(model, self.schemes)
            self._capture = Capture(model, blocks, self._finish_pass)

    @property
    def done(self) -> bool:
        return not self.schemes

    def _needs_data(self) -> bool:
        return any(_needs(scheme) for scheme in self.schemes.values())

    def finish(self) -> None:
        """Quantize what needs no data, if nothing else is left.

        Raises:
            RuntimeError: forward passes are missing.
        """
        if self.done:
            return
        if self._capture is not None:
            raise RuntimeError(
                f"convert: {self.batches_left} of the forward passes that batch_num asks for are missing; "
                f"call the model itself (not a part of it, nor model.forward) on calibration data first"
            )
        self._solve([], None, [])

    def remove(self) -> None:
        """Take the hooks off the model."""
        if self._capture is not None:
            self._capture.remove()
            self._capture = None

    def _finish_pass(self) -> None:
        self.batches_left -= 1
        if self.batches_left > 0 or self._capture is None:
            return
        blocks, captured = self._capture.blocks, self._capture.captured
        self.remove()
        self._solve(captured.model, blocks, captured.blocks)

    def _solve(self, passes: Sequence[Call], blocks: Blocks | None, calls: Sequence[Sequence[Call]]) -> None:
        # Layers made under inference_mode could not be used outside of it.
        bar = progress(len(self.schemes), "quantizing layers", self._show_progress)
        with torch.inference_mode(False), torch.no_grad(), bar as advance:
            if blocks is not None:
                self._solve_blocks(blocks, calls, advance)
            if self.schemes:
                self._solve_within(self.model, dict(self.schemes), passes, [None] * len(passes), advance)

    def _solve_blocks(self, blocks: Blocks, calls: Sequence[Sequence[Call]], advance: Any) -> None:
        hidden: list[Tensor | None] = [None] * len(calls)
        for index, (name, block) in enumerate(zip(blocks.names, blocks.modules, strict=True)):
            inside = {layer: s for layer, s in self.schemes.items() if layer.startswith(f"{name}.")}
            block_calls = [one_pass[index] for one_pass in calls]
            if inside:
                self._solve_within(block, inside, block_calls, hidden, advance)
            if not any(_within(layer, blocks.names[index + 1 :]) for layer in self.schemes):
                return
            hidden = [*outputs(block, block_calls, hidden)]

    def _solve_within(
        self,
        block: nn.Module,
        schemes: Mapping[str, Scheme],
        calls: Sequence[Call],
        hidden: Sequence[Tensor | None],
        advance: Any,
    ) -> None:
        """Quantize the layers of ``schemes``, which are inside of ``block``, and put them into the model."""
        layers = {name: cast(Layer, self.model.get_submodule(name)) for name in schemes}
        groups, producers = self._groups(block, layers, schemes, calls, hidden)
        statistics = self._statistics(block, layers, groups, calls, hidden)
        # From the last to the first: a group's smoothing goes into a layer before it, which is still a float
        # one.
        for group in reversed(groups):
            self._solve_group(group, layers, statistics.pop(group), producers.get(group))
            for name in group.names:
                del self.schemes[name]
                advance(name)

    def _groups(
        self,
        block: nn.Module,
        layers: Mapping[str, Layer],
        schemes: Mapping[str, Scheme],
        calls: Sequence[Call],
        hidden: Sequence[Tensor | None],
    ) -> tuple[list[Siblings], dict[Siblings, Producer]]:
        if not calls:
            return [Siblings((name,), scheme) for name, scheme in schemes.items()], {}
        groups = siblings(block, calls[0], hidden[0], layers, schemes)
        if not any(ALGORITHMS[scheme.algorithm].smooths for scheme in schemes.values()):
            return groups, {}
        linears = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        args, kwargs = calls[0].arguments(hidden[0])
        found = find_groups(block, trace(block, args, kwargs), linears, model=self.model)
        producers = {frozenset(f.consumers): f.producer for f in found if f.producer is not None}
        return groups, {g: producers[key] for g in groups if (key := frozenset(g.names)) in producers}

    def _statistics(
        self,
        block: nn.Module,
        layers: Mapping[str, Layer],
        groups: list[Siblings],
        calls: Sequence[Call],
        hidden: Sequence[Tensor | None],
    ) -> dict[Siblings, Statistics]:
        """Those of every group; a group whose layers turn out to read different tensors is taken apart."""
        while True:
            statistics = {group: _empty(layers[group.names[0]], group.scheme) for group in groups}
            if not any(s.needs for s in statistics.values()):
                return statistics
            wrong = observe(block, calls, hidden, layers, groups, statistics)
            if not wrong:
                return statistics
            for group in wrong:
                place = groups.index(group)
                groups[place : place + 1] = [Siblings((name,), group.scheme) for name in group.names]

    def _solve_group(
        self,
        group: Siblings,
        layers: Mapping[str, Layer],
        statistics: Statistics,
        producer: Producer | None,
    ) -> None:
        members = [layers[name] for name in group.names]
        if statistics.needs and statistics.rows == 0:
            self.unseen.extend(group.names)
        solution = ALGORITHMS[group.scheme.algorithm].solve(
            _problem(members, group.scheme, statistics, producer)
        )
        smooth_scales = solution.smooth_scales
        if smooth_scales is not None and producer is not None:
            try:
                producer.fold(smooth_scales)
            except ValueError:
                # It would overflow float16, and is what it was: the layers smooth for themselves.
                self._solve_group(group, layers, statistics, None)
                return
            self.folded.update(dict.fromkeys(group.names, producer.describe()))
            smooth_scales = None
        self._replace(members, solution, group.scheme, smooth_scales)

    def _replace(
        self, members: Sequence[Layer], solution: Solution, scheme: Scheme, smooth_scales: Tensor | None
    ) -> None:
        deployed = {
            layer: deploy(layer, scheme, weight, solution.inputs, smooth_scales)
            for layer, weight in zip(members, solution.weights, strict=True)
        }
        share([*deployed.values()])
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            if module in deployed:
                self.model.set_submodule(name, deployed[module])


def _needs(scheme: Scheme) -> frozenset[str]:
    return ALGORITHMS[scheme.algorithm].needs(scheme)


def _within(layer: str, blocks: Sequence[str]) -> bool:
    return any(layer.startswith(f"{name}.") for name in blocks)


def _empty(layer: Layer, scheme: Scheme) -> Statistics:
    images = isinstance(layer, nn.Conv2d)
    channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    return Statistics(channels, _needs(scheme), layer.weight.device, images=images)


def _problem(
    members: Sequence[Layer], scheme: Scheme, statistics: Statistics, producer: Producer | None
) -> Problem:
    weights = tuple(layer.weight.detach().flatten(1).float() for layer in members)
    first = members[0]
    options: dict[str, Any] = {}
    if isinstance(first, nn.Conv2d):
        options["apply"] = partial(_convolution, first)
    if producer is not None:
        options["tie"] = producer.reduce
        options["attain"] = producer.attainable
    return Problem(weights, statistics, scheme, first.weight.dtype, **options)


def _convolution(layer: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    kernel = weight.unflatten(1, layer.weight.shape[1:])
    return F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation, layer.groups)
