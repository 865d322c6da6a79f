"""Compile the CPU kernels: ``python -m npu_fusion.kernels.cpu`` (installation does it, too).

    src/<family>.cpp  x  instruction set  ──▶  object files  ──▶  _kernels.so
    src/parallel.cpp, src/variants.cpp, once ──────┘

Plain C functions, without a header or a library of PyTorch, Python or OpenMP: one build serves every version
of each. What the processor has is found out at run time, so one build also serves every processor of an
architecture. This file needs nothing but the standard library and a C++ compiler (``CXX``, or c++, g++ or
clang++ from the path), because ``setup.py`` loads it before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "src"
LIBRARY = HERE / "_kernels.so"

ONCE = ("parallel.cpp", "variants.cpp")
"""Sources that are the same for every instruction set."""

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512")
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"avx512": (*_AVX2, *_AVX512), "avx2": _AVX2},
    "aarch64": {"neon": ("-march=armv8.2-a+dotprod",)},
}
"""For each architecture its instruction sets, best first, with the compiler's flags."""

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-fno-trapping-math",
    # a * b + c is two roundings, as in the reference kernels; where one is wanted the sources say fma.
    "-ffp-contract=off",
    "-Wall",
    "-Wno-psabi",
    # GCC 12 suspects its own AVX-512 headers.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)


class BuildError(Exception):
    """The kernels cannot be compiled; the message says why."""


def variants(machine: str | None = None) -> tuple[str, ...]:
    """The instruction sets that this architecture's kernels are compiled for, best first."""
    return tuple(VARIANTS.get(machine or platform.machine(), {}))


def digest() -> str:
    """Of everything that the library is made of. A library with another one belongs to other sources."""
    content = hashlib.sha256(repr((FLAGS, VARIANTS)).encode())
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:16]


def build(output: Path = LIBRARY, *, compiler: str | None = None, machine: str | None = None) -> Path:
    """Compile all sources into ``output``.

    Raises :class:`BuildError` where the architecture has no kernels, no compiler is found, or it fails.
    """
    machine = machine or platform.machine()
    if machine not in VARIANTS:
        raise BuildError(f"there are no compiled kernels for {machine}; there are for {', '.join(VARIANTS)}")
    command = _compiler(compiler)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        jobs = [[*command, *FLAGS, *flags, "-c", "-o", f"{directory}/{name}.o", str(source)]
                for name, source, flags in _units(machine)]  # fmt: skip
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, jobs))
        objects = [job[-2] for job in jobs]
        built = Path(directory) / output.name
        _run([*command, "-shared", "-Wl,--as-needed", "-Wl,-z,defs", "-o", str(built), *objects, "-lpthread"])
        # Another process may be loading the old one: it is replaced in one step, not written over.
        staged = output.with_name(f".{output.name}.{os.getpid()}")
        shutil.copyfile(built, staged)
        staged.replace(output)
    return output


def _units(machine: str) -> list[tuple[str, Path, tuple[str, ...]]]:
    """(object's name, source, flags) for everything that is compiled."""
    units: list[tuple[str, Path, tuple[str, ...]]] = []
    for source in sorted(SOURCES.glob("*.cpp")):
        if source.name in ONCE:
            units.append((source.stem, source, (f'-DNPU_DIGEST="{digest()}"',)))
            continue
        for variant, flags in VARIANTS[machine].items():
            units.append((f"{source.stem}_{variant}", source, (*flags, f"-DNPU_VARIANT={variant}")))
    return units


def _compiler(given: str | None) -> list[str]:
    named = given or os.environ.get("CXX")
    if named:
        return shlex.split(named)
    for candidate in ("c++", "g++", "clang++"):
        if shutil.which(candidate):
            return [candidate]
    raise BuildError("there is no C++ compiler: none of c++, g++ and clang++ is on the path, CXX is not set")


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\nfailed:\n{done.stderr[-4000:]}")
