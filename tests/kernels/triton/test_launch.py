"""Which variant of a kernel runs, and how often that is measured. No kernel runs here."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from npu_fusion.kernels.triton import _launch
from npu_fusion.kernels.triton._launch import (
    MOST_PROGRAMS,
    Choice,
    RowKernel,
    blocks,
    group_ends,
    held_or_looped,
    looped,
)

CUDA = torch.device("cuda")


class Recorder:
    """In the place of a kernel; ``milliseconds`` says how long it would take with a choice."""

    __name__ = "recorder"

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**arguments: Any) -> None:
            if arguments["BLOCK"] == 99:
                raise OutOfResources(2, 1, "registers")
            self.launches.append((grid, arguments))

        return launch


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock by which a block of 8 is the fastest; returns what was measured."""
    measured: list[int] = []

    def bench(run: Any, **_: Any) -> float:
        run()
        block = run.args[0].constants["BLOCK"]
        measured.append(block)
        return abs(block - 8.0)

    monkeypatch.setattr(_launch, "do_bench", bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    return measured


def kernel(*sizes: int) -> tuple[Recorder, RowKernel]:
    recorder = Recorder()
    choices = [Choice({"BLOCK": size}) for size in sizes]
    return recorder, RowKernel(recorder, ("x", "y"), lambda constants: choices)


def call(row_kernel: RowKernel, rows: int, width: int = 16, device: torch.device = CUDA) -> None:
    tensors = {"x": torch.zeros(rows, width), "y": None, "z": torch.zeros(3)}
    row_kernel(rows, tensors, {"WIDTH": width}, device)


def test_the_fastest_is_measured_once_for_a_width_whatever_the_rows(timed: list[int]) -> None:
    recorder, row_kernel = kernel(4, 8, 16)
    for rows in (1, 2, 4096, 1):
        call(row_kernel, rows)
    assert timed == [4, 8, 16]
    measuring, calls = recorder.launches[:3], recorder.launches[3:]
    # On thousands of rows, though the first call had one; what is not for each row stays as it is.
    assert [arguments["x"].shape for _, arguments in measuring] == [(4096, 16)] * 3
    assert all(arguments["z"].shape == (3,) for _, arguments in measuring)
    assert [(grid, arguments["rows"], arguments["BLOCK"]) for grid, arguments in calls] == [
        ((rows,), rows, 8) for rows in (1, 2, 4096, 1)
    ]
    call(row_kernel, 1, width=32)
    assert timed == [4, 8, 16] * 2


def test_the_sample_has_a_limit_in_bytes(timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_SAMPLE_BYTES", 10 * 64)
    recorder, row_kernel = kernel(4, 8)
    call(row_kernel, 1)
    assert recorder.launches[0][1]["x"].shape == (10, 16)


def test_a_choice_that_does_not_fit_is_left_out(timed: list[int]) -> None:
    recorder, row_kernel = kernel(99, 4)
    call(row_kernel, 1)
    assert recorder.launches[-1][1]["BLOCK"] == 4
    with pytest.raises(RuntimeError, match="no variant of recorder fits"):
        call(kernel(99, 99)[1], 1)


def test_nothing_is_measured_of_one_choice_in_the_interpreter_or_while_capturing(
    timed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    call(kernel(4)[1], 1)
    call(kernel(4, 8)[1], 1, device=torch.device("cpu"))
    recorder, row_kernel = kernel(4, 8)
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        call(row_kernel, 1)
    assert timed == []
    assert recorder.launches[-1][1]["BLOCK"] == 4
    call(row_kernel, 1)
    assert recorder.launches[-1][1]["BLOCK"] == 8


def test_no_rows_launch_nothing_and_many_are_looped_over(timed: list[int]) -> None:
    recorder, row_kernel = kernel(4)
    call(row_kernel, 0)
    assert recorder.launches == []
    call(row_kernel, MOST_PROGRAMS + 5, width=1)
    assert recorder.launches[0][0] == (MOST_PROGRAMS,)
    assert recorder.launches[0][1]["rows"] == MOST_PROGRAMS + 5


@pytest.mark.parametrize("width", [1, 2, 3, 33, 1536, 4096, 5120, 7168, 9216, 18432, 65536])
def test_blocks_cover_a_row(width: int) -> None:
    main, tail = blocks(width)
    assert main <= width < 2 * main
    assert width <= main + tail <= 1.5 * width + 1
    choices = held_or_looped({"WIDTH": width})
    held = [choice for choice in choices if not choice.constants["LOOPED"]]
    assert len(held) == 0 if width > 32768 else 1 <= len(held) <= 3
    assert len({choice.warps for choice in held}) == len(held)
    assert [choice for choice in choices if choice.constants["LOOPED"]] == looped({"WIDTH": width})
    # A block of the wide rows is small enough for the memory near a core everywhere.
    assert all(choice.constants["MAIN"] <= 4096 for choice in looped({"WIDTH": width}))


def test_ends_of_groups() -> None:
    ends, groups, block = group_ends(torch.tensor([2, -1, 3]))
    assert ends is not None and (ends.tolist(), ends.dtype, groups, block) == ([2, 2, 5], torch.int32, 3, 4)
    ends, *_ = group_ends(torch.tensor([2, 5], dtype=torch.int32), running=True)
    assert ends is not None and ends.tolist() == [2, 5]
    assert group_ends(None) == (None, 0, 1)
