"""What computes the operators where no NPU does."""

from __future__ import annotations

import importlib


def load() -> None:
    """Import the kernels, which register themselves with the operators of :mod:`npu_fusion.meta_impls`."""
    importlib.import_module("npu_fusion.kernels.reference")
