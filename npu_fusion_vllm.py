"""Plugin of vLLM (entry point group ``vllm.general_plugins``): switched on by ``ENABLE_NPU_FUSION=1``.

vLLM loads its plugins in every process that it starts. This module is not part of the package because loading
it must not change a process in which npu_fusion is not wanted: importing the package registers operators.
"""

from __future__ import annotations

import os

SWITCH = "ENABLE_NPU_FUSION"
_VALUES = {"": False, "0": False, "false": False, "1": True, "true": True}


def register() -> None:
    """Install npu_fusion in vllm-ascend if wanted, configured by the ``NPU_FUSION_*`` variables."""
    text = os.environ.get(SWITCH, "")
    wanted = _VALUES.get(text.strip().lower())
    if wanted is None:
        raise ValueError(f"environment variable {SWITCH} is {text!r}; accepted: 0, 1, false, true")
    if not wanted:
        return
    import torch_npu  # noqa: F401  (before npu_fusion, which else defines its operators itself)

    from npu_fusion.hosts.vllm_ascend import install

    install()
