"""Which dynamic symbols a shared library defines, which it wants, and which libraries it names.

A small reader of ELF64 files (x86-64 and aarch64 are both little-endian), so that no binutils are needed.

Source: System V ABI, chapters "Object Files" and "Dynamic Linking"; symbol versions: LSB Core specification.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

_DYNAMIC, _DYNSYM, _VERSYM = 6, 11, 0x6FFFFFFF  # section types
_NEEDED, _SONAME = 1, 14  # tags of the dynamic section
_WEAK = 2
_UNVERSIONED = 1  # indices 0 (local) and 1 (global) say that no version was asked for


@dataclass(frozen=True)
class Library:
    """The dynamic symbols of one shared library."""

    path: Path
    soname: str
    needed: tuple[str, ...]
    """Libraries that it is linked with, by soname."""
    defined: frozenset[str]
    wanted: frozenset[str]
    """Undefined symbols that must be found and that no versioned library was named for."""


def read(path: Path) -> Library:
    """Read a shared library. Raises ``ValueError`` if ``path`` is not a little-endian ELF64 file."""
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path} is not a shared library for 64-bit Linux")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, data, header)


def _read(path: Path, data: mmap.mmap, header: bytes) -> Library:
    (start,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, start + i * size) for i in range(count)]
    by_type = {section[1]: section for section in sections}

    def content(section: tuple[int, ...]) -> bytes:
        return data[section[4] : section[4] + section[5]]

    def strings(section: tuple[int, ...]) -> bytes:
        return content(sections[section[6]])

    needed: list[str] = []
    soname = path.name
    if _DYNAMIC in by_type:
        names = strings(by_type[_DYNAMIC])
        for tag, value in struct.iter_unpack("<QQ", content(by_type[_DYNAMIC])):
            if tag == _NEEDED:
                needed.append(_string(names, value))
            elif tag == _SONAME:
                soname = _string(names, value)
    defined: set[str] = set()
    wanted: set[str] = set()
    if _DYNSYM in by_type:
        names = strings(by_type[_DYNSYM])
        symbols = content(by_type[_DYNSYM])
        versions = content(by_type[_VERSYM]) if _VERSYM in by_type else bytes(len(symbols) // 12)
        for (version,), (name, info, _other, section, _value, _size) in zip(
            struct.iter_unpack("<H", versions), struct.iter_unpack("<IBBHQQ", symbols), strict=True
        ):
            if name == 0:
                continue
            if section != 0:
                defined.add(_string(names, name))
            elif info >> 4 != _WEAK and version & 0x7FFF <= _UNVERSIONED:
                wanted.add(_string(names, name))
    return Library(path, soname, tuple(needed), frozenset(defined), frozenset(wanted))


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.index(b"\0", offset)].decode()
