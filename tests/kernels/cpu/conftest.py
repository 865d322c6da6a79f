from __future__ import annotations

from collections.abc import Iterator

import pytest

from npu_fusion import kernels


@pytest.fixture(autouse=True)
def _compiled_kernels(_reference_kernels: None) -> Iterator[None]:
    with kernels.use("compiled"):
        yield
