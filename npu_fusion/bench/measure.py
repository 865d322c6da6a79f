"""One operator at one size, beside what else could compute it and the least that the machine needs for it.

========= ================================================================================================
fused     the operator, by the kernels that are on (:func:`npu_fusion.kernels.use`)
reference the operator by its reference kernel, if asked for
eager     the formula of :mod:`npu_fusion.bench.formulas`, operator by operator
inductor  the same under ``torch.compile``, for exactly these sizes and this number of threads
code      what Inductor made of it, called without Dynamo: the guards of a compiled function cost ten
          microseconds and more, and in a compiled model they are paid once, not for each operator
bound     for what reads and writes memory: a copy of as much memory, into existing memory. It reads half of
          the bytes that the operator reads and writes together, from the operator's own inputs, and
          writes as many. For what has matrix products in it: these alone, one after the other, each in
          its faster layout
========= ================================================================================================

All take turns on the same inputs; what they return is freed at once, so results lie where earlier ones did
(but above 32 MB, where the C library gives memory back to the system each time and gets it page by page).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from npu_fusion import _compat, kernels
from npu_fusion.bench.cases import CASES
from npu_fusion.bench.products import MATMULS, PROLOGS, Call
from npu_fusion.bench.timing import BLOCK, Times, interleaved

REFERENCE = "reference"
SEED = 0
CHOICE_SECONDS = 0.5
"""For the choice of the products' layouts."""


@dataclass(frozen=True)
class Measured:
    """Median seconds of one call."""

    operator: str
    tokens: int
    width: int | None
    """None where the operator has sizes of its own."""
    threads: int
    fused: float
    eager: float
    inductor: float | None
    """None where Inductor cannot compile."""
    bound: float
    code: float | None = None
    reference: float | None = None
    disturbed: float = 0.0
    """The part of all blocks during which the system gave the processor to something else."""

    @property
    def gain(self) -> float | None:
        """How many times as fast as Inductor."""
        return None if self.inductor is None else self.inductor / self.fused

    @property
    def of_bound(self) -> float:
        """The time of the copy, or of the products alone, over that of the operator."""
        return self.bound / self.fused


def measure(
    operator: str,
    tokens: int,
    width: int | None,
    seconds: float = 1.0,
    *,
    reference: bool = False,
    inductor: bool = True,
) -> Measured:
    """Measure ``operator`` of ``CASES``, ``MATMULS`` or ``PROLOGS`` with ``torch.get_num_threads()`` threads.

    ``seconds`` are for all columns together, compilation not counted.
    """
    random = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        call = _call(operator, tokens, width, random)
        calls = {"fused": call.fused, "eager": lambda: call.eager(*call.args)}
        if reference:
            calls[REFERENCE] = _by_reference(call.fused)
        if inductor and _compat.why_no_inductor() is None:
            compiled = _compiled(call.eager, call.args)
            code = _code(call.eager, call.args)
            calls["inductor"] = lambda: compiled(*call.args)
            calls["code"] = lambda: code(*call.args)
        calls["bound"] = _bound(call)
        times = interleaved(calls, seconds)
    optional = {
        name: times[name].median if name in times else None for name in ("inductor", "code", REFERENCE)
    }
    return Measured(
        operator,
        tokens,
        width,
        torch.get_num_threads(),
        fused=times["fused"].median,
        eager=times["eager"].median,
        bound=times["bound"].median,
        disturbed=_disturbed(times),
        **optional,
    )


def _call(operator: str, tokens: int, width: int | None, random: torch.Generator) -> Call:
    if operator in PROLOGS:
        return PROLOGS[operator](tokens, random)
    assert width is not None
    if operator in MATMULS:
        return MATMULS[operator](tokens, width, random)
    case = CASES[operator]
    inputs = case.inputs(tokens, width, random)
    return Call(lambda: case.fused(*inputs), case.eager, inputs, [])


def _by_reference(fused: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with kernels.use("reference"):
            return fused()

    return call


def _compiled(function: Callable[..., Any], args: Sequence[Tensor]) -> Callable[..., Any]:
    """For these sizes and this number of threads.

    The first graph has static sizes, which are no slower than symbolic ones. Asking for them by ``dynamic``,
    for one graph by ``fullgraph`` or for threads by ``options`` would cost every call four microseconds.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function)
    with _threads_of_inductor():
        compiled(*args)
    return compiled


def _code(function: Callable[..., Any], args: Sequence[Tensor]) -> Callable[..., Any]:
    graph = make_fx(function)(*args)
    with _threads_of_inductor():
        compiled: Callable[..., Any] = torch._inductor.compile(graph, list(args))
        compiled(*args)
    return compiled


def _threads_of_inductor() -> Any:
    return inductor_config.patch({"cpp.threads": torch.get_num_threads()})


def _bound(call: Call) -> Callable[[], Any]:
    if not call.products:
        return copy(call.args, _bytes(call.args) + _bytes(call.fused()))
    candidates = {
        (index, layout): product
        for index, layouts in enumerate(call.products)
        for layout, product in layouts.items()
    }
    # Several products do not find their weights in a cache; one alone does, as its operator does.
    times = interleaved(candidates, CHOICE_SECONDS, block=BLOCK if len(call.products) == 1 else 0.0)
    chosen = []
    for index, layouts in enumerate(call.products):
        medians = {layout: times[index, layout].median for layout in layouts}
        chosen.append(layouts[min(medians, key=medians.__getitem__)])

    def products() -> None:
        for product in chosen:
            product()

    return products


def copy(inputs: Sequence[Tensor], total: int) -> Callable[[], None]:
    """Copies half of ``total`` bytes out of ``inputs``, the first ones first, in words of four bytes."""
    left = total // 2
    pieces = []
    for tensor in inputs:
        words = tensor.view(-1).view(torch.int32)[: left // 4]
        left -= 4 * words.numel()
        if words.numel():
            pieces.append((torch.zeros_like(words), words))

    def call() -> None:
        for destination, source in pieces:
            destination.copy_(source)

    return call


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(tensors))


def _disturbed(times: Mapping[str, Times]) -> float:
    disturbed = sum(len(t.disturbed) for t in times.values())
    return disturbed / (disturbed + sum(len(t.undisturbed) for t in times.values()))
