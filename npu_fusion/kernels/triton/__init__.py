"""Triton kernels: what runs on a CUDA device.

    torch.ops.npu.X(..) on CUDA ──▶ fake's checks ──▶ <family>.py here, imported at its first call ──▶ result
                                                          │ no triton, or NotImplemented
                                                          ▼
                                                  reference kernel, and one warning

A family's file holds the kernels and the function with the operator's signature that launches them; it
returns NotImplemented for the calls that it does not take. Only these files import triton. They keep to what
triton-ascend (Triton 3.2 for Ascend devices) supports too: no inline assembly, no libdevice, no descriptors,
at most 65535 programs on one axis; a row that is too wide for the memory near a core goes through it in
blocks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

from npu_fusion.meta_impls._registry import cuda_kernel

FAMILIES = {
    "npu_add_rms_norm_dynamic_quant": "add_rms_norm_dynamic_quant",
    "npu_dequant_swiglu_quant": "dequant_swiglu_quant",
    "npu_dynamic_quant": "dynamic_quant",
    "npu_mla_prolog_v3": "mla_prolog",
    "npu_mla_prolog_v3_functional": "mla_prolog",
    "npu_quant_matmul": "quant_matmul",
    "npu_swiglu_quant": "swiglu_quant",
}
"""Operator -> the file that has a function of its name."""


def _lazily(name: str, family: str) -> Callable[..., Any]:
    """The function ``name`` of a family, which is imported when it is called first."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not available():
            return NotImplemented
        module = importlib.import_module(f"{__name__}.{family}")
        result = getattr(module, name)(*args, **kwargs)
        if result is NotImplemented:
            _say(f"{name} has no Triton kernel for these arguments; the slow reference kernel runs")
        return result

    call.__name__ = name
    return call


@functools.cache
def available() -> bool:
    """Whether triton is installed. Where it is not one warning says so."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        _say("triton is not installed: the slow reference kernels run on the GPU; `pip install triton` helps")
    return found


@functools.cache
def _say(what: str) -> None:
    warnings.warn(f"npu_fusion: {what}", RuntimeWarning, stacklevel=2)


for _name, _family in FAMILIES.items():
    cuda_kernel(_name)(_lazily(_name, _family))
