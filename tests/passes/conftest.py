"""A pass is judged by the specification of its operator: bit-identical means the reference kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from npu_fusion import kernels


@pytest.fixture(autouse=True)
def _reference_kernels() -> Iterator[None]:
    with kernels.use("reference"):
        yield
