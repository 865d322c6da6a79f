"""How the compiled kernels are found and chosen, and that they may be called from everywhere."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fusion
from npu_fusion.kernels.cpu import _build, _library
from npu_fusion.kernels.reference.add_rms_norm_dynamic_quant import (
    npu_add_rms_norm_dynamic_quant as reference,
)
from tests.kernels.cpu._agreement import assert_agrees, normal, positive

OP = torch.ops.npu.npu_add_rms_norm_dynamic_quant

# Each operator with kernels of this room, on a row of numbers and some more.
EVERY_OPERATOR = """
import torch, npu_fusion
g = torch.Generator().manual_seed(0)
x, other, heads = (torch.randn(s, generator=g).bfloat16() for s in ((6, 310), (6, 310), (2, 3, 5, 62)))
gamma, cos = torch.rand(310, generator=g).bfloat16(), torch.randn(2, 1, 5, 62, generator=g).bfloat16()
scale, npu = torch.full((310,), 0.02), torch.ops.npu
acc = torch.randint(-99999, 99999, (6, 310), generator=g, dtype=torch.int32)
results = [
    npu.npu_dynamic_quant(x), npu.npu_dynamic_quant(x, smooth_scales=gamma, quant_mode="pertensor"),
    npu.npu_dynamic_quant_asymmetric(x), [npu.npu_quantize(x, scale, None, 1, 1)],
    npu.npu_rms_norm(x, gamma), npu.npu_add_rms_norm(x, other, gamma),
    npu.npu_add_rms_norm_quant(x, other, gamma, scale, None),
    npu.npu_add_rms_norm_dynamic_quant(x, other, gamma),
    [npu.npu_swiglu(x)], npu.npu_swiglu_quant(x, quant_mode=1),
    npu.npu_dequant_swiglu_quant(acc, weight_scale=scale, quant_mode=1),
    [npu.npu_rotary_mul(heads, cos, cos)], [npu.npu_rotary_mul(heads, cos, cos, "interleave")],
    [npu.npu_interleave_rope(heads, cos, cos)],
]
"""


def inputs(rows: int = 64, width: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    x1, x2 = (normal(rows, width, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    return x1, x2, positive(width, seed=2, dtype=torch.bfloat16)


def in_child(program: str, **environment: str) -> str:
    """What the program prints; it must not end with an error."""
    variables = {**os.environ, **environment}
    command = [sys.executable, "-W", "always", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# -- which library, which variant ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", _build.variants())
def test_every_variant_of_this_processor_agrees(variant: str, tmp_path: Path) -> None:
    handle = ctypes.CDLL(str(_build.LIBRARY))
    if not handle.npu_runs(variant.encode()):
        pytest.skip(f"this processor does not run {variant}")
    save = f"""
    from npu_fusion.kernels.cpu._library import library
    assert library().variant == {variant!r}
    torch.save(results, {str(tmp_path / "compiled")!r})
    """
    in_child(EVERY_OPERATOR + textwrap.dedent(save), NPU_FUSION_CPU_VARIANT=variant)
    scope: dict[str, Any] = {}
    with npu_fusion.kernels.use("reference"):
        exec(EVERY_OPERATOR, scope)
    for results, expected in zip(torch.load(tmp_path / "compiled"), scope["results"], strict=True):
        assert_agrees(results, expected)


def test_the_best_variant_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_library.VARIANT, raising=False)
    handle = ctypes.CDLL(str(_build.LIBRARY))
    able = [name for name in _build.variants() if handle.npu_runs(name.encode())]
    assert _library.open_library().variant == able[0]


def test_a_variant_that_does_not_exist_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_library.VARIANT, "sse2")
    with pytest.raises(ValueError, match="NPU_FUSION_CPU_VARIANT is 'sse2'; this processor can run "):
        _library.open_library()


def test_without_a_library_one_warning_says_so_and_the_reference_runs() -> None:
    program = """
    import pathlib
    from npu_fusion.kernels.cpu import _build, _library
    _library.open_library.__defaults__ = (pathlib.Path("/nowhere/_kernels.so"),)
    import torch, npu_fusion
    x = torch.ones(2, 4)
    print(torch.ops.npu.npu_dynamic_quant(x)[0].tolist(), torch.ops.npu.npu_swiglu(x).shape)
    """
    printed = in_child(program)
    assert "[[127, 127, 127, 127], [127, 127, 127, 127]] torch.Size([2, 2])" in printed
    warning = (
        "npu_fusion runs its slow reference kernels, because there are no compiled ones: they are not built"
    )
    assert printed.count(warning) == 1


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "digest", lambda: "another")
    with pytest.raises(
        _library.UnavailableError, match="was built from other sources: with a C\\+\\+ compiler"
    ):
        _library.open_library()


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "_kernels.so"
    path.write_text("not a library")
    with pytest.raises(_library.UnavailableError, match="_kernels.so cannot be loaded"):
        _library.open_library(path)


def test_every_source_changes_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _build.digest()
    sources = tmp_path / "src"
    sources.mkdir()
    for path in _build.SOURCES.iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(_build, "SOURCES", sources)
    assert _build.digest() == before
    (sources / "simd.h").write_text("another\n")
    assert _build.digest() != before


def test_the_build_says_why_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        _build.BuildError, match="there are no compiled kernels for riscv64; there are for x86_64"
    ):
        _build.build(tmp_path / "_kernels.so", machine="riscv64")
    with pytest.raises(_build.BuildError, match="cannot run /nowhere/c"):
        _build.build(tmp_path / "_kernels.so", compiler="/nowhere/c++")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(_build.BuildError, match="there is no C\\+\\+ compiler"):
        _build.build(tmp_path / "_kernels.so")


# -- threads and processes ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    x1, x2, gamma = inputs()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(OP(x1, x2, gamma))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert_agrees(results[0], reference(x1, x2, gamma))


def test_the_number_of_threads_is_torchs() -> None:
    program = """
    import os, torch, npu_fusion
    torch.set_num_threads({threads})
    before = len(os.listdir("/proc/self/task"))
    torch.ops.npu.npu_dynamic_quant(torch.ones(512, 4096))
    print("new threads:", len(os.listdir("/proc/self/task")) - before)
    """
    if sys.platform != "linux":
        pytest.skip("counts threads in /proc")
    for threads in (1, 2, 3):
        assert f"new threads: {threads - 1}\n" in in_child(program.format(threads=threads))


@pytest.mark.usefixtures("threads")
def test_several_python_threads_call_at_once() -> None:
    torch.set_num_threads(2)
    x1, x2, gamma = inputs()
    expected = OP(x1, x2, gamma)
    failures: list[str] = []

    def call() -> None:
        for _ in range(50):
            if not all(torch.equal(a, b) for a, b in zip(OP(x1, x2, gamma), expected, strict=True)):
                failures.append("a wrong result")

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


def test_inside_of_a_parallel_region() -> None:
    """A thread of the pool that calls a kernel runs it alone."""
    program = """
    import ctypes, pathlib, torch, npu_fusion
    torch.set_num_threads(2)
    x = torch.randn(512, 4096)
    y, _ = torch.ops.npu.npu_dynamic_quant(x)
    same = []
    body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
        lambda data: same.append(torch.equal(torch.ops.npu.npu_dynamic_quant(x)[0], y))
    )
    runtime = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    runtime.GOMP_parallel(body, None, 2, 0)
    print("same:", same)
    """
    assert "same: [True, True]\n" in in_child(program)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_alone() -> None:
    """The threads of the pool do not exist in the child; waiting for them would never end."""
    program = """
    import os, torch, npu_fusion
    torch.set_num_threads(2)
    x = torch.randn(512, 4096)
    y, scale = torch.ops.npu.npu_dynamic_quant(x)
    child = os.fork()
    if child == 0:
        again, scale_again = torch.ops.npu.npu_dynamic_quant(x)
        torch.set_num_threads(1)  # torch's own loops would wait for the threads
        os._exit(0 if torch.equal(y, again) and torch.equal(scale, scale_again) else 1)
    print("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    again, _ = torch.ops.npu.npu_dynamic_quant(x)
    print("parent:", torch.equal(y, again))
    """
    printed = in_child(program)
    assert "child: 0\n" in printed
    assert "parent: True\n" in printed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_that_opens_the_library_first_computes_alone() -> None:
    """The parent has used torch's threads only: nothing of the library noted the fork."""
    program = """
    import os, torch, npu_fusion
    torch.set_num_threads(2)
    x = torch.randn(512, 4096)
    torch.relu(x)
    child = os.fork()
    if child == 0:
        y, _ = torch.ops.npu.npu_dynamic_quant(x)
        os._exit(0 if y.numpy().max() == 127 else 1)
    print("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert "child: 0\n" in in_child(program)
