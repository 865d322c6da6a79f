"""Triton's compiler for an NVIDIA GPU that is not there: kernels become machine code and do not run."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)


class _Absent:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, launching a kernel compiles it for :data:`TARGET`; the arguments may be CPU tensors."""
    launch = JITFunction.__getitem__
    JITFunction.__getitem__ = lambda kernel, grid: (
        lambda *args, **kwargs: kernel.run(*args, grid=grid, warmup=True, **kwargs)
    )
    driver.set_active(_Absent())
    try:
        yield
    finally:
        JITFunction.__getitem__ = launch
        driver._active = None


def variants(kernel: JITFunction) -> dict[str, Any]:
    """What has been compiled of a kernel, by its key."""
    return kernel.device_caches[0][0]


def spilled(cubin: bytes) -> int:
    """Bytes of memory that each thread of a compiled kernel keeps for what its registers do not hold."""
    (tool,) = (Path(path) / "bin" / "cuobjdump" for path in triton.backends.nvidia.__path__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return sum(map(int, re.findall(r"STACK:(\d+)", done.stdout)))
