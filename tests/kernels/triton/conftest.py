"""The tests of the kernels need triton, and a GPU or its interpreter (TRITON_INTERPRET=1, set before triton
is imported): ``make test-triton``. Those of the registration run anywhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from npu_fusion import kernels

ANYWHERE = ("test_registration.py",)

collect_ignore = []
if importlib.util.find_spec("triton") is None:
    here = Path(__file__).parent
    collect_ignore = [path.name for path in here.glob("test_*.py") if path.name not in ANYWHERE]


@pytest.fixture(autouse=True)
def _triton_kernels(_reference_kernels: None) -> Iterator[None]:
    with kernels.use("compiled"):
        yield
