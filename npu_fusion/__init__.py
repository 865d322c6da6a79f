"""npu_fusion: plain PyTorch models on the fused operators of Ascend NPUs."""

from __future__ import annotations

from npu_fusion._version import __version__
from npu_fusion.kernels import reference as _reference
from npu_fusion.meta_impls import _registry

_registry.register_all()

__all__ = ["__version__"]
