"""Text that is on every machine that can run this package: the source code of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

# Files the demo's model has never seen. They are named one by one, and not drawn by a rule, so that the
# split is the same for every Python version: all of them come with Python 3.10 to 3.14.
HELD_OUT = (
    "bisect.py",
    "colorsys.py",
    "concurrent/futures/thread.py",
    "csv.py",
    "fnmatch.py",
    "graphlib.py",
    "heapq.py",
    "json/encoder.py",
    "queue.py",
    "sched.py",
    "shelve.py",
    "statistics.py",
    "textwrap.py",
    "wsgiref/handlers.py",
)

# Not part of the library, not installed everywhere (tests), or tables that a program wrote (encodings,
# pydoc_data).
_NOT_TRAINED_ON = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)

# A byte that does not occur in source code separates the files, so a model can learn where a file begins.
SEPARATOR = b"\0"


def standard_library() -> Path:
    """Return the folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def training_text() -> bytes:
    """Return the standard library's source files, without the held-out ones, in the order of their paths.

    Raises:
        FileNotFoundError: this Python comes without the source files of its library.
    """
    root = standard_library()
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return _join(
        root, [n for n in names if n not in HELD_OUT and _NOT_TRAINED_ON.isdisjoint(n.split("/"))], "training"
    )


def evaluation_text() -> bytes:
    """Return the held-out source files (:data:`HELD_OUT`) that this Python has, in the order of their paths.

    The choice of files is the same for every Python version; their text differs a little from one to the
    next, and so does the loss measured on it.

    Raises:
        FileNotFoundError: this Python comes without the source files of its library.
    """
    root = standard_library()
    return _join(root, [name for name in HELD_OUT if (root / name).is_file()], "evaluation")


def _join(root: Path, names: list[str], purpose: str) -> bytes:
    if not names:
        raise FileNotFoundError(
            f"{purpose} text: {root} holds no source files of the standard library; "
            f"a Python whose library is not packed into a zip file is needed"
        )
    return SEPARATOR.join((root / name).read_bytes().replace(b"\r\n", b"\n") for name in names)
