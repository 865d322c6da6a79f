"""The kernels of another processor, called in an emulator through their usual Python functions.

kernel's function ──▶ Library.function(name, fields)(values)      values: numbers, and addresses of tensors
                                 │
             tensors that were seen, as bytes ──▶ emulated_call in qemu ──▶ bytes, written back
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from npu_fusion.kernels import cpu
from npu_fusion.kernels.cpu import _library

DRIVER = Path(__file__).with_name("_emulated_call.cpp")


class Storages(TorchDispatchMode):
    """The memory of every tensor that passes by, by address; it stays alive."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, torch.UntypedStorage] = {}

    def see(self, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.known[storage.data_ptr()] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.see((args, kwargs, results))
        return results

    def find(self, address: int) -> tuple[int, int] | None:
        """Where a storage begins that has something at ``address``, and the offset in it."""
        for begin, storage in self.known.items():
            if 0 <= address - begin < storage.nbytes():
                return begin, address - begin
        return None


class EmulatedLibrary:
    """Stands in for :class:`npu_fusion.kernels.cpu._library.Library`."""

    def __init__(self, command: list[str], library: Path, variant: str, directory: Path) -> None:
        self._command = command
        self._library = library
        self._directory = directory
        self.variant = variant
        self.storages = Storages()

    def function(self, name: str, fields: str) -> Callable[..., int]:
        pack = struct.Struct(f"={fields}")

        def call(*values: float) -> int:
            words = struct.unpack(f"={pack.size // 8}q", pack.pack(*values))
            return self._call(f"npu_{name}_{self.variant}", words, values)

        return call

    def _call(self, function: str, words: tuple[int, ...], values: tuple[float, ...]) -> int:
        buffers: list[int] = []
        request = [struct.pack("=q", len(words))]
        for word, value in zip(words, values, strict=True):
            found = self.storages.find(word) if isinstance(value, int) else None
            if found is None:
                request.append(struct.pack("=qq", -1, word))
                continue
            if found[0] not in buffers:
                buffers.append(found[0])
            request.append(struct.pack("=qq", buffers.index(found[0]), found[1]))
        request.append(struct.pack("=q", len(buffers)))
        sizes = [self.storages.known[begin].nbytes() for begin in buffers]
        for begin, size in zip(buffers, sizes, strict=True):
            request += struct.pack("=q", size), ctypes.string_at(begin, size)
        given, got = self._directory / "request", self._directory / "response"
        given.write_bytes(b"".join(request))
        subprocess.run([*self._command, str(self._library), function, str(given), str(got)], check=True)
        response = got.read_bytes()
        at = 8
        for begin, size in zip(buffers, sizes, strict=True):
            ctypes.memmove(begin, response[at : at + size], size)
            at += size
        assert at == len(response)
        return struct.unpack("=q", response[:8])[0]

    @contextmanager
    def used(self) -> Iterator[None]:
        """All compiled kernels run in the emulator."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_library, "open_library", lambda: self)
            _forget()
            try:
                yield
            finally:
                _forget()

    def run(self, kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.storages = Storages()
        self.storages.see((args, kwargs))
        with self.storages:
            return kernel(*args, **kwargs)


def _forget() -> None:
    """What the kernels' modules remember of the library."""
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{cpu.__name__}."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
