"""Tests with the real torch_npu, which only the offline environment has: `make test-ascend` runs them."""

from __future__ import annotations

import os

OFFLINE = os.environ.get("NPU_FUSION_OFFLINE") == "1"

if OFFLINE:
    import torch_npu  # noqa: F401  (first: npu_fusion then defines only what torch_npu does not)
else:
    collect_ignore_glob = ["*.py"]


def pytest_report_header() -> str | None:
    return None if OFFLINE else "tests/ascend is left out: run `make test-ascend`"
