"""Old versions, missing parts, and what differs between versions of torch."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from npu_fusion import _compat


@pytest.mark.parametrize(
    ("version", "parsed"), [("2.13.0+cpu", (2, 13)), ("2.6.0a0+git123", (2, 6)), ("3.0", (3, 0))]
)
def test_versions_are_read(monkeypatch: pytest.MonkeyPatch, version: str, parsed: tuple[int, int]) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert _compat.torch_version() == parsed
    _compat.require_torch()


def test_a_torch_that_is_too_old_is_refused_on_import() -> None:
    code = "import torch; torch.__version__ = '2.5.1+cpu'; import npu_fusion"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.strip().endswith(
        "ImportError: npu_fusion needs torch 2.6 or later; this is torch 2.5.1+cpu"
    )


def test_the_import_is_light() -> None:
    code = (
        "import sys, npu_fusion; heavy = {'transformers', 'triton', 'torch_npu', 'rich', 'safetensors'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_why_inductor_cannot_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert _compat.why_no_inductor() == "the headers of Python are not installed"
    (tmp_path / "Python.h").touch()
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert "there is no C++ compiler" in str(_compat.why_no_inductor())


def test_the_recompile_limit_is_lifted_and_restored() -> None:
    before = torch._dynamo.config.recompile_limit
    with _compat.no_recompile_limit():
        assert torch._dynamo.config.recompile_limit > 1000
    assert torch._dynamo.config.recompile_limit == before
