"""The version, and a fingerprint of the code that makes compiled graphs."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

__version__ = "0.1.0"


@functools.cache
def fingerprint() -> str:
    """Hash of the version and of every source file of the package.

    A cached graph must not outlive an edit of the passes in a development checkout, where the version stays.
    """
    package = Path(__file__).parent
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
