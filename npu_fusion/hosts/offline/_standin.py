"""The stand-in for CANN: shared libraries with the symbols that torch_npu's libraries leave undefined.

::

    wheel's libraries ──▶ symbols wanted, minus those of the wheel, torch and the system
                              │
       generated.cpp (weak): every one of them throws "offline stand-in: X needs CANN and a device"
       answers.cpp (of this package): the few that loading and tracing need are answered instead
                              ▼
       libnpu_fusion_standin.so, and one library per missing soname that is linked with it

Both files become one library, where a definition of ``answers.cpp`` takes the place of the weak refusal. What
torch_npu looks up by name (``dlsym``) it finds only if ``answers.cpp`` has it; for the rest torch_npu itself
says what it misses.

The result is kept beside the wheel under a name made of everything it depends on.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from npu_fusion.hosts.offline import _elf
from npu_fusion.hosts.offline._errors import OfflineError

_ANSWERS = Path(__file__).with_name("answers.cpp")
_NAME = "libnpu_fusion_standin.so"
_SYSTEM = ("libc", "libdl", "libgcc_s", "libm", "libpthread", "librt", "libstdc++")
_ATTRIBUTE = re.compile(r'\.attr\(\s*"(\w+)"')
_COMPILERS = ("c++", "g++", "clang++")

_REFUSE = """\
// Generated: what nobody else defines. Each throws, so that the caller gets a Python error with the name.
#include <cxxabi.h>
#include <cstdlib>
#include <stdexcept>
#include <string>

[[noreturn]] static void refuse(const char *symbol) {
    int status = 0;
    char *readable = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
    std::string name(status == 0 ? readable : symbol);
    std::free(readable);
    throw std::runtime_error("offline stand-in: " + name + " needs CANN and a device");
}

"""


def standin(wheel: Path, torch_libraries: Path, cache: Path, version: str) -> Path:
    """The folder with the stand-in for the torch_npu unpacked at ``wheel``; built if it is not there yet.

    ``torch_libraries`` is torch's ``lib`` folder, ``cache`` where the result is kept, ``version`` that of
    the wheel. Raises :class:`OfflineError` where there is no C++ compiler, or it fails.
    """
    folder = cache / f"standin-{version}-{platform.machine()}-{_key(wheel)}"
    if folder.is_dir():
        return folder
    symbols, sonames = missing(
        [_elf.read(path) for path in sorted(wheel.rglob("*.so*"))],
        [_elf.read(path) for path in sorted(torch_libraries.glob("*.so*"))],
    )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".standin-") as scratch:
        built = Path(scratch) / "lib"
        built.mkdir()
        build(symbols, sonames, attribute_names(wheel), built)
        try:
            built.rename(folder)
        except OSError:
            # Another process was first; its folder is as good.
            if not folder.is_dir():
                raise
    return folder


def missing(wheel: Iterable[_elf.Library], torch: Iterable[_elf.Library]) -> tuple[list[str], list[str]]:
    """Symbols that nobody defines and sonames that nobody has, each in order, of the wheel's libraries."""
    wheel = list(wheel)
    present = [*wheel, *torch]
    defined = frozenset().union(*(library.defined for library in present))
    wanted = frozenset().union(*(library.wanted for library in wheel)) - defined
    sonames = {name for library in wheel for name in library.needed} - {library.soname for library in present}
    system = {name for name in sonames if name.split(".so")[0] in _SYSTEM or name.startswith("ld-linux")}
    loaded = [ctypes.CDLL(name) for name in sorted(system)]

    def given(symbol: str) -> bool:
        # Python's own are in the interpreter, which is not looked into: it may have anything loaded.
        return symbol.startswith(("Py", "_Py")) or any(hasattr(library, symbol) for library in loaded)

    return sorted(symbol for symbol in wanted if not given(symbol)), sorted(sonames - system)


def attribute_names(wheel: Path) -> list[str]:
    """Optional attributes that torchair's converters can name: ``.attr("name", default)`` in its sources."""
    sources = sorted((wheel / "torch_npu" / "dynamo" / "torchair").rglob("*.py"))
    return sorted({name for path in sources for name in _ATTRIBUTE.findall(path.read_text(encoding="utf-8"))})


def build(symbols: Iterable[str], sonames: Iterable[str], attributes: Iterable[str], folder: Path) -> None:
    """Compile the stand-in for ``symbols`` into ``folder``, with a library of each name in ``sonames``.

    ``attributes``: what the stand-in says that an operator may have.
    """
    generated = folder / "generated.cpp"
    generated.write_text(_generated(symbols, attributes), encoding="utf-8")
    shared = [*_compiler(), "-shared", "-fPIC", "-O1", "-std=c++17"]
    _run([*shared, f"-Wl,-soname,{_NAME}", "-o", folder / _NAME, _ANSWERS, generated])
    empty = folder / "empty.cpp"
    empty.touch()
    for soname in sonames:
        link: list[str | Path] = [
            "-Wl,--no-as-needed",
            folder / _NAME,
            "-Wl,-rpath,$ORIGIN",
            f"-Wl,-soname,{soname}",
        ]
        _run([*shared, "-o", folder / soname, empty, *link])
    empty.unlink()


def _generated(symbols: Iterable[str], attributes: Iterable[str]) -> str:
    refusals = (
        f'extern "C" __attribute__((weak)) void {symbol}() {{ refuse("{symbol}"); }}\n' for symbol in symbols
    )
    names = "".join(f'    "{name}",\n' for name in attributes)
    table = f'\nextern "C" const char *const npu_fusion_attribute_names[] = {{\n{names}    nullptr,\n}};\n'
    return _REFUSE + "".join(refusals) + table


def _key(wheel: Path) -> str:
    """Everything that the stand-in depends on: this generator, the answers, and the wheel's libraries."""
    digest = hashlib.sha256()
    for path in (Path(__file__), Path(_elf.__file__), _ANSWERS):
        digest.update(path.read_bytes())
    for path in sorted(wheel.rglob("*.so*")):
        digest.update(f"{path.relative_to(wheel)} {path.stat().st_size}\0".encode())
    return digest.hexdigest()[:16]


def _compiler() -> list[str]:
    chosen = os.environ.get("CXX")
    candidates = [chosen] if chosen else list(_COMPILERS)
    for command in map(shlex.split, candidates):  # CXX may be "ccache g++"
        if shutil.which(command[0]) is not None:
            return command
    looked = "CXX names" if chosen else "none found of"
    raise OfflineError(
        f"the stand-in for CANN is compiled once, and there is no C++ compiler ({looked} "
        f"{', '.join(candidates)}); install one, e.g. apt-get install g++, or name it in CXX"
    )


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        shown = "\n".join(done.stderr.strip().splitlines()[:8])
        raise OfflineError(f"the stand-in for CANN does not compile with {command[0]}:\n{shown}")
