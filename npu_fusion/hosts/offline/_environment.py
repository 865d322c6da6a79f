"""The environment variables of a process that can import torch_npu without CANN."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from npu_fusion.hosts.offline import _wheel
from npu_fusion.hosts.offline._errors import OfflineError
from npu_fusion.hosts.offline._standin import standin

SOCS = {
    "ascend910b": "Ascend910B1",
    "ascend910_93": "Ascend910_9391",
    "ascend950": "Ascend950PR_9599",
}
"""SoC family of ``FusionConfig.target`` -> one of its names in torch_npu's table."""


def setup(wheel: Path | None = None, root: Path | None = None) -> Path:
    """Get torch_npu and build the stand-in for CANN below ``root`` (default: the cache folder), once.

    Returns the folder with torch_npu. Raises :class:`OfflineError` with what to do.
    """
    root = _wheel.cache_root() if root is None else root.absolute()
    folder = _wheel.install(root, wheel)
    _built(root, folder)
    return folder


def environment(
    soc: str | None = None, cann: str | None = None, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Environment variables for a child process that imports torch_npu: those of ``base`` and ours.

    ``soc``: a family (``"ascend910b"``, ``"ascend910_93"``, ``"ascend950"``) or a name as the runtime gives
    it (``"Ascend910B3"``); default Ascend910B1. ``cann``: the release that CANN claims to be; default 9.1.0.
    ``base``: default ``os.environ``. torch is not imported in this process.

    Raises :class:`OfflineError` where torch_npu is not set up (with the command to run) or the stand-in
    cannot be built.
    """
    root = _wheel.cache_root()
    folder = _wheel.installed(root)
    made = dict(os.environ if base is None else base)
    made |= {
        "LD_LIBRARY_PATH": _joined(_built(root, folder), made.get("LD_LIBRARY_PATH")),
        "PYTHONPATH": _joined(folder, made.get("PYTHONPATH")),
        # As where torch_npu is installed: `import torch` imports it, and so before npu_fusion.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        # Kernels are launched, and so refused, in the thread that calls them.
        "TASK_QUEUE_ENABLE": "0",
        "NPU_FUSION_OFFLINE": "1",
    }
    # Not NPU_FUSION_...: these are read by the stand-in, and such variables are fields of FusionConfig.
    if soc is not None:
        made["OFFLINE_ASCEND_SOC"] = SOCS.get(soc, soc)
    if cann is not None:
        made["OFFLINE_ASCEND_CANN"] = cann
    return made


def _built(root: Path, folder: Path) -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise OfflineError("torch is not installed")
    return standin(folder, Path(found.origin).parent / "lib", root / "ascend", _wheel.version(folder))


def _joined(first: Path, rest: str | None) -> str:
    return os.pathsep.join([str(first), rest] if rest else [str(first)])
