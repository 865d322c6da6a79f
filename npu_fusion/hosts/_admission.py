"""What the installed torch_npu and torchair take: asked for every call that a replacement needs.

A call is admitted if

* there is a kernel for it on an NPU;
* the installed torch_npu and the target (SoC and release) have the operator and every argument passed;
* for graphs that go to GE: torchair has a converter for it, and the converter means the same
  (:mod:`npu_fusion.hosts._ge_limits`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from npu_fusion import targets
from npu_fusion.config import FusionConfig
from npu_fusion.hosts import _ge_limits, _torchair_api
from npu_fusion.passes.rewrite import Admission

_ANY_DEVICE = ("PrivateUse1", "CompositeImplicitAutograd", "CompositeExplicitAutograd")


def _runs_on_npu(operator: Any) -> bool:
    """Is there a kernel, so that torch_npu does not take the operator back to the CPU?"""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has_kernel(operator.name(), key) for key in _ANY_DEVICE)


def of(config: FusionConfig, *, for_ge: bool) -> tuple[FusionConfig, Admission]:
    """The configuration with the target of the device in it (offline: of the one that is claimed to be
    there), where none is chosen, and what is admitted.

    ``for_ge``: the graph is lowered to GE, so that everything needs a converter.
    """
    if config.target is None:
        config = config.replace(target=targets.detect())
    target = targets.resolve(config)

    def admission(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        if not isinstance(operator, torch._ops.OpOverload):
            return None  # items of a result and arithmetic on sizes
        why_not = targets.missing(target, operator, args, kwargs)
        if why_not is None and not _runs_on_npu(operator):
            why_not = f"torch_npu has no kernel for {operator}"
        if why_not is None and for_ge:
            if not _torchair_api.has_ge_converter(operator):
                return f"torchair has no GE converter for {operator}"
            why_not = _ge_limits.why_not(operator, args, kwargs)
        return why_not

    return config, admission
