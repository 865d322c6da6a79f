"""Launching a kernel over rows: its block sizes are measured once for each width, never for a number of rows.

::

    first call with a width ──▶ time every choice on a sample of rows ──▶ remember the fastest
    every call              ──▶ kernel[min(rows, 65535)](arguments, rows, constants, choice)

The sample has thousands of rows whatever the call has, so that a first call with one token does not decide
for prompts. What is compiled depends on widths, dtypes and options, and on whether addresses and strides are
multiples of 16: the kernels do not specialize on ``rows``. While a CUDA graph is captured nothing can be
timed: a width that is met there first runs with the first choice, and is measured later. In Triton's
interpreter (CPU tensors) the first choice is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

MOST_PROGRAMS = 65535
"""On an Ascend device; the programs of a kernel over rows loop over the rest."""

_SAMPLE_BYTES = 2**28
_WARMUP_MS, _TIMED_MS = 5, 20

_WIDEST_HELD, _HELD_WARPS, _LEAST_PER_THREAD, _MOST_PER_THREAD = 32768, (4, 8, 16), 4, 64
_LOOPED_BLOCKS = (1024, 2048, 4096)


@dataclass(frozen=True)
class Choice:
    """Constants of one variant of a kernel, and the warps that it runs on."""

    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    """How many iterations ahead a loop over matrix products loads."""


def power_of_two(least: int) -> int:
    """The smallest power of two that is not below ``least``."""
    return 1 << max(least - 1, 0).bit_length()


def blocks(width: int) -> tuple[int, int]:
    """MAIN and TAIL of a held row (``_rows.py``)."""
    main = power_of_two(width + 1) // 2
    return main, power_of_two(width - main) if width > main else 0


def held_or_looped(constants: dict[str, Any]) -> list[Choice]:
    """For kernels that read a row again after a reduction over it, or keep it in registers."""
    width = constants["WIDTH"]
    main, tail = blocks(width)
    held = [
        Choice({"MAIN": main, "TAIL": tail, "LOOPED": False}, warps)
        for warps in _HELD_WARPS
        if width <= _WIDEST_HELD
        and main <= _MOST_PER_THREAD * 32 * warps
        and (main >= _LEAST_PER_THREAD * 32 * warps or warps == _HELD_WARPS[0])
    ]
    return held + looped(constants)


def looped(constants: dict[str, Any]) -> list[Choice]:
    """For rows that need not be kept, or cannot."""
    sizes = {min(block, power_of_two(constants["WIDTH"])) for block in _LOOPED_BLOCKS}
    return [
        Choice({"MAIN": size, "TAIL": 0, "LOOPED": True}, 8 if size > 2048 else 4) for size in sorted(sizes)
    ]


class RowKernel:
    """A ``triton.jit`` function over rows with the choices that it has.

    ``per_row`` names the arguments whose tensors have one row (or element) for each row of the call;
    ``choices`` gives, for the constants of a call, the variants that are measured; ``programs`` how many
    programs rows and constants need (by default one for each row).
    """

    def __init__(
        self,
        kernel: Any,
        per_row: Sequence[str],
        choices: Callable[[dict[str, Any]], list[Choice]],
        *,
        programs: Callable[[int, dict[str, Any]], int] = lambda rows, constants: rows,
        sample_rows: int = 4096,
    ) -> None:
        self.kernel = kernel
        self.choices = choices
        self._per_row = per_row
        self._programs = programs
        self._sample_rows = sample_rows
        self._best: dict[tuple[Any, ...], Choice] = {}

    def __call__(
        self, rows: int, arguments: dict[str, Any], constants: dict[str, Any], device: torch.device
    ) -> None:
        """Run on ``rows`` rows; ``arguments`` are tensors, numbers or None, ``constants`` are compiled in."""
        if rows == 0:
            return
        if device.type != "cuda":
            self._launch(self.choices(constants)[0], rows, arguments, constants)
            return
        kinds = tuple(a.dtype if isinstance(a, Tensor) else type(a) for a in arguments.values())
        key = (device, kinds, *constants.values())
        # Triton launches on the current device, whatever the tensors are on.
        with torch.cuda.device(device):
            choice = self._best.get(key)
            if choice is None:
                choices = self.choices(constants)
                choice = choices[0]
                if len(choices) > 1 and not torch.cuda.is_current_stream_capturing():
                    choice = self._best[key] = self._fastest(choices, arguments, constants)
            self._launch(choice, rows, arguments, constants)

    def _launch(
        self, choice: Choice, rows: int, arguments: dict[str, Any], constants: dict[str, Any]
    ) -> None:
        constants = constants | choice.constants
        grid = (min(self._programs(rows, constants), MOST_PROGRAMS),)
        self.kernel[grid](
            **arguments, rows=rows, **constants, num_warps=choice.warps, num_stages=choice.stages
        )

    def _fastest(self, choices: list[Choice], arguments: dict[str, Any], constants: dict[str, Any]) -> Choice:
        rowwise = {name: arguments[name] for name in self._per_row if arguments[name] is not None}
        row_bytes = sum(a[:1].numel() * a.element_size() for a in rowwise.values())
        rows = max(1, min(self._sample_rows, _SAMPLE_BYTES // row_bytes))
        # Ones: zeros and what lies in fresh memory take the slow ways through a division.
        sample = arguments | {name: a.new_ones((rows, *a.shape[1:])) for name, a in rowwise.items()}
        measured: list[tuple[float, Choice]] = []
        for choice in choices:
            try:
                milliseconds = do_bench(
                    functools.partial(self._launch, choice, rows, sample, constants),
                    warmup=_WARMUP_MS,
                    rep=_TIMED_MS,
                )
            except OutOfResources:  # this variant needs more registers or shared memory than there are
                continue
            measured.append((milliseconds, choice))
        if not measured:
            raise RuntimeError(f"no variant of {self.kernel.__name__} fits on this GPU: {constants}")
        return min(measured, key=lambda pair: pair[0])[1]


def row_major(x: Tensor) -> Tensor:
    """``x`` as [rows, width], contiguous."""
    return (
        x.reshape(-1, x.shape[-1]).contiguous() if x.numel() else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    )


def group_ends(counts: Tensor | None, *, running: bool = False) -> tuple[Tensor | None, int, int]:
    """``(ends, GROUPS, GROUP_BLOCK)`` for :func:`_rows.group_of`: int32 ends of the groups of ``counts``.

    With ``running`` these are ends already. Without groups ``(None, 0, 1)``.
    """
    if counts is None:
        return None, 0, 1
    if not running:
        counts = counts.clamp(min=0).cumsum(0)
    groups = counts.shape[0]
    return counts.to(torch.int32).contiguous(), groups, power_of_two(groups)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
