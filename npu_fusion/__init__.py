"""npu_fusion: plain PyTorch models on the fused operators of Ascend NPUs."""

from __future__ import annotations

from npu_fusion import _compat

_compat.require_torch()

from npu_fusion import kernels as _kernels  # noqa: E402
from npu_fusion._version import __version__  # noqa: E402
from npu_fusion.meta_impls import _registry  # noqa: E402

_kernels.load()
_registry.register_all()

from npu_fusion._recorded import reports  # noqa: E402
from npu_fusion.attach import enable, npugraph_ex_options  # noqa: E402
from npu_fusion.backend import NpuBackend, get_npu_backend  # noqa: E402
from npu_fusion.config import FusionConfig  # noqa: E402
from npu_fusion.explain import explain  # noqa: E402
from npu_fusion.passes.pipeline import FusionError, FusionExpectationError  # noqa: E402
from npu_fusion.passes.verify import FusionVerificationError  # noqa: E402
from npu_fusion.prepare import prepare  # noqa: E402
from npu_fusion.quantization import algorithm_register, convert, quantize  # noqa: E402
from npu_fusion.report import FusionReport, Refusal  # noqa: E402

__all__ = [
    "FusionConfig",
    "FusionError",
    "FusionExpectationError",
    "FusionReport",
    "FusionVerificationError",
    "NpuBackend",
    "Refusal",
    "__version__",
    "algorithm_register",
    "convert",
    "enable",
    "explain",
    "get_npu_backend",
    "npugraph_ex_options",
    "prepare",
    "quantize",
    "reports",
]
