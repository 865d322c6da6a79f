"""torch_npu's wheel, unpacked into a folder of its own with the packages that only torchair needs.

::

    <cache>/ascend/torch_npu-2.13.0-cp311/     torch_npu, torchair in it, google.protobuf, yaml

Never into the environment of the package: torch_npu's autoload entry point would break ``import torch`` where
there is no CANN. What else it imports (numpy, packaging ...) comes from the user's environment.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from npu_fusion.hosts.offline._errors import OfflineError

COMMAND = "npu-fusion offline-setup"
_COMPANIONS = ("protobuf", "pyyaml")
_FROM_THE_USER = ("numpy", "packaging")
_MACHINES = ("x86_64", "aarch64")


def cache_root() -> Path:
    """Where the wheel and the stand-in are kept: ``NPU_FUSION_CACHE`` or ``~/.cache/npu_fusion``."""
    given = os.environ.get("NPU_FUSION_CACHE")
    if given:
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "npu_fusion"


def torch_release() -> str:
    """The release of the installed torch without build and pre-release labels: ``2.13.0``."""
    version = importlib.metadata.version("torch")
    match = re.match(r"\d+(\.\d+)*", version)
    assert match is not None, version
    return match.group()


def require_platform() -> None:
    """Raise :class:`OfflineError` where there is no wheel of torch_npu."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        raise OfflineError(
            f"this is {sys.platform} on {platform.machine()}; torch_npu has wheels for Linux on "
            f"{' and '.join(_MACHINES)}"
        )
    if sys.implementation.name != "cpython":
        raise OfflineError(f"this is {sys.implementation.name}; torch_npu has wheels for CPython")


def wheel_folder(root: Path) -> Path:
    """Where torch_npu for this torch and this Python lies below ``root``, there or not."""
    return root / "ascend" / f"torch_npu-{torch_release()}-{python_tag()}"


def python_tag() -> str:
    return f"cp{sys.version_info.major}{sys.version_info.minor}"


def installed(root: Path) -> Path:
    """The folder with torch_npu. Raises :class:`OfflineError` with the command to run if it is not there."""
    require_platform()
    folder = wheel_folder(root)
    if not folder.is_dir():
        others = sorted(path.name for path in folder.parent.glob("torch_npu-*"))
        besides = f" (there is {', '.join(others)})" if others else ""
        raise OfflineError(
            f"torch_npu for torch {torch_release()} and {python_tag()} is not in {folder.parent}{besides}; "
            f"get it with: {COMMAND}"
        )
    missing = [name for name in _FROM_THE_USER if importlib.util.find_spec(name) is None]
    if missing:
        raise OfflineError(
            f"torch_npu imports {' and '.join(missing)}, not installed here; "
            f"{sys.executable} -m pip install {' '.join(missing)}"
        )
    return folder


def version(folder: Path) -> str:
    """The version of the torch_npu in ``folder``, with its post release."""
    (found,) = importlib.metadata.distributions(name="torch_npu", path=[str(folder)])
    return found.version


def install(root: Path, wheel: Path | None = None) -> Path:
    """Put torch_npu and its companions below ``root`` with pip, and return their folder; nothing to do if
    they are there.

    ``wheel``: the file of torch_npu's wheel; wheels of protobuf and PyYAML beside it are taken as well, so
    that no network is needed. Raises :class:`OfflineError` for a wheel that is for another torch, Python or
    machine, and with pip's message where pip fails.
    """
    require_platform()
    if wheel is not None:
        _check(wheel)
    folder = wheel_folder(root)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as scratch:
        unpacked = Path(scratch) / "site"
        _pip(unpacked, wheel)
        try:
            unpacked.rename(folder)
        except OSError:
            # Another process was first; its folder is as good.
            if not folder.is_dir():
                raise
    return folder


def _check(wheel: Path) -> None:
    if not wheel.is_file():
        raise OfflineError(f"--wheel is {str(wheel)!r}, which is no file")
    match = re.fullmatch(r"torch_npu-([^-]+)-(cp\d+)-[^-]+-([^-]+)\.whl", wheel.name)
    if match is None:
        raise OfflineError(f"--wheel is {wheel.name!r}; accepted: torch_npu-VERSION-cpXY-cpXY-PLATFORM.whl")
    release, tag, machines = match.groups()
    wanted = torch_release()
    if not re.match(re.escape(wanted) + r"(\D|$)", release):
        raise OfflineError(f"{wheel.name} is for torch {release}; installed is torch {wanted}")
    if tag != python_tag():
        raise OfflineError(f"{wheel.name} is for Python {tag}; this is {python_tag()}")
    if not machines.endswith(platform.machine()):
        raise OfflineError(f"{wheel.name} is for {machines}; this is {platform.machine()}")


def _pip(target: Path, wheel: Path | None) -> None:
    where: list[str] = []
    if wheel is not None:
        where = ["--find-links", str(wheel.absolute().parent)]
        beside = [path.name.lower() for path in wheel.absolute().parent.glob("*.whl")]
        if all(any(name.startswith(f"{c}-") for name in beside) for c in _COMPANIONS):
            where.append("--no-index")
    command = [
        *(sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"),
        *("--no-deps", "--only-binary=:all:", "--target", str(target), *where),
        # A post release mends torch_npu for the same torch.
        str(wheel) if wheel is not None else f"torch_npu=={torch_release()}.*",
        *_COMPANIONS,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-6:])
        if "No module named pip" in said:
            raise OfflineError(f"{sys.executable} has no pip; install it, e.g. {sys.executable} -m ensurepip")
        raise OfflineError(
            f"pip cannot get torch_npu for torch {torch_release()}, {python_tag()}, {platform.machine()}:\n"
            f"{said}\n"
            f"without network: {COMMAND} --wheel PATH, with wheels of {' and '.join(_COMPANIONS)} beside it"
        )
