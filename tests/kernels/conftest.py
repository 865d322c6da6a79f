"""These tests are about the reference kernels; those in cpu and triton hold the others to them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from npu_fusion import kernels


@pytest.fixture(autouse=True)
def _reference_kernels() -> Iterator[None]:
    with kernels.use("reference"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    """The kernels share their work out among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
