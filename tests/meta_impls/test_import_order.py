"""torch_npu after this package, with a package of that name that would do anything to be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_TOO_LATE = """
import npu_fusion, importlib.util
print(importlib.util.find_spec("torch_npu") is not None)
import torch_npu
"""
_MESSAGE = (
    "ImportError: torch_npu is imported after npu_fusion, which has defined the operators of the npu "
    "namespace because torch_npu was not there; accepted: 'import torch_npu' before 'import npu_fusion'"
)


def _run(source: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PATH": ""}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", source]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=300)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text("print('imported')\n")
    return tmp_path


def test_too_late_is_refused_and_asking_for_it_is_not(package: Path) -> None:
    done = _run(_TOO_LATE, package)
    assert done.stdout == "True\n"
    assert done.stderr.splitlines()[-1] == _MESSAGE


def test_before_is_fine_and_so_is_importing_it_again(package: Path) -> None:
    done = _run("import torch_npu\nimport npu_fusion\nimport torch_npu", package)
    assert (done.stdout, done.returncode) == ("imported\n", 0)


def test_where_it_is_not_installed_the_error_is_pythons_own(tmp_path: Path) -> None:
    done = _run(_TOO_LATE, tmp_path)
    assert done.stdout == "False\n"
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'torch_npu'"
