"""Tensors in safetensors files, one file or several with an index: read one at a time, and never trusted.

Nothing here unpickles: files of other kinds are refused by their name. Every error is a ``ValueError`` that
names the file and, where there is one, the tensor.

Traps:

* safetensors reads a header with a key twice and takes the last. The header is parsed again here, for that.
* The tensors that safetensors gives are views of the mapped file: a file that is shortened later ends the
  process. They are copied.
* An index could name files outside of its folder. Only plain names are accepted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npu_fusion import _compat
from npu_fusion.quantization.checkpoints._json import parse_json, read_json

SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_DTYPES: Mapping[str, torch.dtype | None] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": _compat.E8M0,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def require_safetensors(function: str) -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{function} needs safetensors: pip install npu-fusion[checkpoints]") from error


def refuse_pickle(path: Path) -> None:
    """Raise ``ValueError`` for a file that could run code when it is loaded."""
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path}: is a pickle by its name, and loading one can run any code; accepted: {SUFFIX} files"
        )


@dataclass(frozen=True)
class Location:
    """Where the tensors of a checkpoint are."""

    folder: Path
    files: tuple[Path, ...]
    listed: Mapping[str, Path] | None = None
    """Tensor -> file, if there is an index."""


def locate(path: Path) -> Location:
    """The files of a checkpoint: a folder, a safetensors file, or the index of several.

    In a folder: the index if there is one, otherwise the only safetensors file.

    Raises ``ValueError`` if there is none, or more than one, and for an index that names files elsewhere.
    """
    if path.is_dir():
        indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
        files = sorted(path.glob(f"*{SUFFIX}"))
        found = indices or files
        if len(found) == 1:
            return locate(found[0])
        if not found:
            for other in sorted(path.iterdir()):
                refuse_pickle(other)
            raise ValueError(f"{path}: has no {SUFFIX} file")
        names = ", ".join(f.name for f in found[:4])
        raise ValueError(
            f"{path}: has {len(found)} of them ({names}); accepted: one index, or one {SUFFIX} file"
        )
    refuse_pickle(path)
    if not path.is_file():
        raise ValueError(f"{path}: is no file and no folder")
    if path.name.endswith(INDEX_SUFFIX):
        return _indexed(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: accepted: a folder, a {SUFFIX} file, or an {INDEX_SUFFIX} file")
    return Location(path.parent, (path,))


def _indexed(index: Path) -> Location:
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ValueError(
            f"{index}: weight_map is {type(entries).__name__}; accepted: tensors and their files"
        )
    listed: dict[str, Path] = {}
    for tensor, name in entries.items():
        if not isinstance(name, str) or not _plain(name):
            raise ValueError(
                f"{index}: {tensor} is in {name!r}; accepted: the name of a {SUFFIX} file beside it"
            )
        listed[tensor] = index.parent / name
    files = tuple(sorted(set(listed.values())))
    for file in files:
        if not file.is_file():
            raise ValueError(f"{index}: names {file.name}, which is not there")
    return Location(index.parent, files, listed)


def _plain(name: str) -> bool:
    """Whether it is a file in the same folder, on every system."""
    return name.endswith(SUFFIX) and not name.startswith(".") and not any(c in name for c in "/\\:\0")


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class Tensors:
    """The tensors of a checkpoint by name. :meth:`take` remembers what was asked for."""

    def __init__(self, location: Location) -> None:
        """Read the headers of all files. Raises ``ValueError`` as the module's docstring says."""
        self._entries: dict[str, _Entry] = {}
        self._open: dict[Path, Any] = {}
        self._taken: set[str] = set()
        for file in location.files:
            for name, entry in self._header(file):
                if name in self._entries:
                    raise ValueError(f"{file}: {name} is in {self._entries[name].file.name}, too")
                if location.listed is not None and location.listed.get(name) != file:
                    raise ValueError(f"{file}: {name} is not listed for this file in the index")
                self._entries[name] = entry
        for name, file in (location.listed or {}).items():
            if name not in self._entries:
                raise ValueError(f"{file}: {name} is listed in the index, and not there")

    def _header(self, file: Path) -> Iterator[tuple[str, _Entry]]:
        from safetensors import SafetensorError, safe_open

        try:
            # Checks sizes, offsets and shapes against each other and against the length of the file.
            self._open[file] = safe_open(file, framework="pt", device="cpu")
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = parse_json(stream.read(size))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{file}: is no safetensors file, or is damaged: {error}") from error
        header.pop("__metadata__", None)
        for name, facts in header.items():
            dtype = _DTYPES.get(facts["dtype"])
            if dtype is None:
                raise ValueError(f"{file}: {name} has dtype {facts['dtype']}; accepted: {', '.join(_DTYPES)}")
            yield name, _Entry(file, dtype, tuple(facts["shape"]))

    def close(self) -> None:
        self._open.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def left(self) -> list[str]:
        """Names that nobody has asked for."""
        return [name for name in self._entries if name not in self._taken]

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ``ValueError`` if there is no such tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def file(self, name: str) -> Path:
        return self._entry(name).file

    def pass_over(self, name: str) -> None:
        self._taken.add(name)

    def problem(self, name: str, what: str) -> ValueError:
        """An error about a tensor, with the name of its file."""
        return ValueError(f"{self._entry(name).file}: {name} {what}")

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            stem = name.rpartition(".")[0]
            beside = next((e.file for n, e in self._entries.items() if n.rpartition(".")[0] == stem), None)
            where = beside or next((e.file for e in self._entries.values()), Path())
            raise ValueError(f"{where}: {name} is missing")
        return self._entries[name]

    def take(self, name: str, dtypes: Collection[torch.dtype], shape: Sequence[int] | None = None) -> Tensor:
        """A tensor, in memory of its own.

        Raises ``ValueError`` if there is none, or it has another dtype, or not the given shape.
        """
        entry = self._entry(name)
        if entry.dtype not in dtypes or (shape is not None and entry.shape != tuple(shape)):
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            sizes = "" if shape is None else f" {list(shape)}"
            given = f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"
            raise self.problem(name, f"is {given}; accepted: {accepted}{sizes}")
        from safetensors import SafetensorError

        try:
            tensor: Tensor = self._open[entry.file].get_tensor(name).clone()
        except (SafetensorError, OSError, RuntimeError) as error:
            raise self.problem(name, f"cannot be read: {error}") from error
        self._taken.add(name)
        return tensor

    def scale(self, name: str, *shapes: Sequence[int], positive: bool = False) -> Tensor:
        """Scales as fp32, in one of these shapes: finite, not negative, and not all of them 0.

        Args:
            positive: none of them is 0, because something is divided by them.
        """
        if self.shape(name) not in [tuple(shape) for shape in shapes]:
            accepted = " or ".join(str(list(shape)) for shape in shapes)
            raise self.problem(name, f"has shape {list(self.shape(name))}; accepted: {accepted}")
        scale = self.take(name, FLOATS)
        if not bool(scale.isfinite().all()) or bool((scale < 0).any()):
            raise self.problem(name, "has NaN, infinities or negative numbers; accepted: scales")
        fp32 = scale.to(torch.float32)
        if scale.dtype == torch.float64 and not torch.equal(fp32.double(), scale):
            raise self.problem(name, "is float64 with numbers that float32 has not; accepted: float32")
        zero = fp32 == 0
        if bool(zero.any()) if positive else bool(zero.all()):
            raise self.problem(name, f"is 0{'' if positive else ' everywhere'}; accepted: positive scales")
        return fp32
