"""What computes the operators where no NPU does."""

from __future__ import annotations

import importlib

from npu_fusion.meta_impls._calls import use

__all__ = ["load", "use"]


def load() -> None:
    """Import the kernels, which register themselves with the operators of :mod:`npu_fusion.meta_impls`."""
    for room in ("reference", "cpu", "triton"):
        importlib.import_module(f"npu_fusion.kernels.{room}")
