"""Checkpoints of quantized models: those of other tools in, ours and Ascend's in and out.

::

    load_checkpoint(model, "Llama-3-8B-AWQ")     the float architecture gets quantized layers
    save_checkpoint(model, "out")                safetensors and a description in JSON
    load_checkpoint(fresh_model, "out")          without the original weights, and with the same bits
    model = load_model("out")                    where transformers' config.json is beside them
"""

from __future__ import annotations

from npu_fusion.quantization.checkpoints._load import Loaded, load_checkpoint
from npu_fusion.quantization.checkpoints._models import load_model
from npu_fusion.quantization.checkpoints._save import save_checkpoint

__all__ = ["Loaded", "load_checkpoint", "load_model", "save_checkpoint"]
