"""The worked example of CONTRIBUTING.md works: added to a copy of the package, its files pass its tests."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"^\*\*`(?P<path>[\w/]+\.py)`\*\*\n\n```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
FLAG = re.compile(r"^```python\n(?P<flag>    \w+: bool = True\n)```$", re.MULTILINE)


@pytest.mark.slow
def test_the_worked_example_passes_its_own_tests(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = {match["path"]: match["code"] for match in BLOCK.finditer(text)}
    assert [Path(name).name.removeprefix("test_") for name in files] == ["fast_gelu.py"] * 6
    for folder in ("npu_fusion", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, code in files.items():
        assert not (tmp_path / name).exists(), f"{name} is no example any more"
        (tmp_path / name).write_text(code, encoding="utf-8")
    config = tmp_path / "npu_fusion" / "config.py"
    (flag,) = FLAG.findall(text)
    before, swiglu, after = config.read_text(encoding="utf-8").partition("    swiglu: bool = True\n")
    config.write_text(before + swiglu + flag + after, encoding="utf-8")

    tests = [name for name in files if name.startswith("tests/")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d{2} passed", done.stdout)
    for lint in (["check"], ["format", "--check"]):
        if importlib.util.find_spec("ruff") is not None:
            command = [sys.executable, "-m", "ruff", *lint, *files]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
