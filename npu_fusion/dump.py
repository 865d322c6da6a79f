"""Writing a report to disk: the code of every stage, ``report.json`` and ``report.html``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from npu_fusion import report_html
from npu_fusion.report import FusionReport


def write(report: FusionReport, directory: str | Path) -> Path:
    """Write ``report`` into a new folder ``<directory>/<graph name>`` and return it.

    The folder holds one file per stage, ``0_before.py``, ``1_<stage>.py`` ... in the order of
    ``report.stages``, ``report.json`` and ``report.html``. A folder that is there already is left alone: the
    new one gets ``_1``, ``_2`` ... behind its name. Sets ``report.dump_dir``.

    Raises OSError if the folder cannot be made or written.
    """
    folder = _new_folder(Path(directory), _file_name(report.graph))
    report.dump_dir = str(folder)
    digits = len(str(len(report.stages)))
    for number, (stage, code) in enumerate(report.stages):
        name = f"{number:0{digits}}_{_file_name(stage)}.py"
        (folder / name).write_text(code, encoding="utf-8")
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    (folder / "report.html").write_text(report_html.render(report), encoding="utf-8")
    return folder


def debug_directory() -> Path | None:
    """Where ``TORCH_COMPILE_DEBUG=1`` wants our files, beside Inductor's; None where it is not set.

    ``torch_compile_debug/run_<time>-pid_<pid>/npu_fusion``, or below Inductor's ``trace.debug_dir`` if the
    user has set that; TORCH_COMPILE_DEBUG_DIR is honoured through Dynamo.
    """
    if os.environ.get("TORCH_COMPILE_DEBUG", "0") != "1":
        return None
    # Only here: importing Inductor's configuration and Dynamo takes seconds.
    from torch._dynamo.utils import get_debug_dir
    from torch._inductor import config

    return Path(config.trace.debug_dir or get_debug_dir()) / "npu_fusion"


def _new_folder(directory: Path, name: str) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            folder = directory / (f"{name}_{number}" if number else name)
            try:
                # Fails if another graph, thread or process has taken the name.
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                return folder
    except OSError as error:
        raise OSError(
            error.errno,
            f"dump_dir is {str(directory)!r}, where no folder can be made ({error.strerror}); "
            "accepted: a directory that is writable or can be made",
        ) from error


def _file_name(name: str) -> str:
    """``name`` with what some file system refuses replaced; never empty, hidden or a path."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("._")[:100] or "graph"
