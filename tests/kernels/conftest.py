"""These tests are about the reference kernels; those in cpu and triton hold the others to them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from npu_fusion import kernels


@pytest.fixture(autouse=True)
def _reference_kernels() -> Iterator[None]:
    with kernels.use("reference"):
        yield
