"""torch_npu and torchair on a machine without CANN and without an NPU, to see what a model lowers to.

::

    npu-fusion offline-setup                      torch_npu's wheel, and libraries that stand in for CANN
    npu-fusion lower MODEL:FACTORY --out DIR      the fused FX graph and the GE graph of a model
    python -m npu_fusion.hosts.offline -- COMMAND any command, with an importable torch_npu

Importing torch_npu, its schemas and Meta kernels, torchair's passes and its GE converters are the real ones.
What needs a device (a kernel, a collective, compiling a GE graph) raises an error that says so. All of it
happens in child processes: nothing here imports torch_npu.
"""

from __future__ import annotations

from npu_fusion.hosts.offline._environment import SOCS, environment, setup
from npu_fusion.hosts.offline._errors import OfflineError
from npu_fusion.hosts.offline._lower import MODES, LoweredGraph, Lowering, LoweringError, lower

__all__ = [
    "MODES",
    "SOCS",
    "LoweredGraph",
    "Lowering",
    "LoweringError",
    "OfflineError",
    "environment",
    "lower",
    "setup",
]
