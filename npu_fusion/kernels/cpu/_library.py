"""The compiled kernels as Python sees them: the library, the instruction set, threads.

``NPU_FUSION_CPU_VARIANT=avx2`` takes another instruction set than the best one that the processor has.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from npu_fusion.kernels.cpu import _build

VARIANT = "NPU_FUSION_CPU_VARIANT"

DONE, NO_MEMORY = 0, 1
"""What a kernel returns, with others for refusals: ``Status`` in src/isa.h."""

# The entry points of src/parallel.h, by their names in every OpenMP runtime.
_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_in_parallel")


def finished(status: int) -> bool:
    """Whether a kernel did its work; otherwise the reference kernel has to say what is wrong.

    Raises ``MemoryError``.
    """
    if status == NO_MEMORY:
        raise MemoryError("a CPU kernel could not allocate its buffers")
    return status == DONE


class _Fork:
    """Whether this process is a forked child: its copy of torch's pool has no threads to run anything on."""

    happened = False

    @classmethod
    def in_child(cls) -> None:
        cls.happened = True


os.register_at_fork(after_in_child=_Fork.in_child)


class UnavailableError(Exception):
    """There is no library for this machine and these sources; the message says why and what helps."""


class Library:
    """An open library, of which one variant is called."""

    def __init__(self, handle: ctypes.CDLL, variant: str) -> None:
        self._handle = handle
        self.variant = variant

    def function(self, name: str, fields: str) -> Callable[..., int]:
        """The kernel ``name`` (``NPU_KERNEL(name)`` in the sources). It releases the GIL while it runs.

        Its one argument in C is a struct whose members have 8 bytes each: ``fields`` has ``q`` for an integer
        or an address, ``d`` for a double. (ctypes converts an argument for each of 20 parameters in the time
        that a kernel takes for a token; a packed struct is a tenth of that.)
        """
        function = getattr(self._handle, f"npu_{name}_{self.variant}")
        function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_int64
        pack = struct.Struct(f"={fields}").pack

        def call(*values: float) -> int:
            return function(pack(*values))

        return call


def open_library(path: Path = _build.LIBRARY) -> Library:
    """Raises :class:`UnavailableError`; ``ValueError`` for a variant that does not exist."""
    if not path.exists():
        raise UnavailableError(f"they are not built: {_rebuild()}")
    try:
        handle = ctypes.CDLL(str(path))
        handle.npu_digest.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise UnavailableError(f"{path.name} cannot be loaded ({error}): {_rebuild()}") from error
    if handle.npu_digest().decode() != _build.digest():
        raise UnavailableError(f"{path.name} was built from other sources: {_rebuild()}")
    variant = _variant(handle)
    _use_openmp(handle)
    return Library(handle, variant)


@functools.cache
def library() -> Library | None:
    """The library of this installation. Where there is none one warning says so, and this is None."""
    try:
        return open_library()
    except UnavailableError as error:
        warnings.warn(
            f"npu_fusion runs its slow reference kernels, because there are no compiled ones: {error}",
            stacklevel=2,
        )
        return None


def kernel(name: str, fields: str) -> Callable[[], Callable[..., int] | None]:
    """Gives :meth:`Library.function` of the library, which is opened at the first call; None without one."""

    @functools.cache
    def function() -> Callable[..., int] | None:
        found = library()
        return None if found is None else found.function(name, fields)

    return function


def _rebuild() -> str:
    return "with a C++ compiler, `python -m npu_fusion.kernels.cpu` builds them"


def _variant(handle: ctypes.CDLL) -> str:
    offered = _build.variants()
    able = [name for name in offered if handle.npu_runs(name.encode())]
    if not able:
        raise UnavailableError(f"this processor has none of {', '.join(offered)}")
    asked = os.environ.get(VARIANT)
    if not asked:
        return able[0]
    if asked not in able:
        raise ValueError(f"{VARIANT} is {asked!r}; this processor can run {', '.join(able)}")
    return asked


def _use_openmp(handle: ctypes.CDLL) -> None:
    """Hand over the runtime that torch uses. Where it has none, kernels stay on one thread."""
    if _Fork.happened:
        return
    # A symbol is looked up in a library and in everything that this library was linked to.
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        runtime = ctypes.CDLL(str(torch_library))
        entries = [ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in _OPENMP]
    except (OSError, AttributeError) as error:
        warnings.warn(
            f"npu_fusion's CPU kernels run on one thread: no OpenMP runtime ({error})", stacklevel=2
        )
        return
    handle.npu_use_openmp.argtypes, handle.npu_use_openmp.restype = [ctypes.c_void_p] * len(_OPENMP), None
    handle.npu_use_openmp(*entries)
