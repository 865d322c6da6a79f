"""``load_model``: a quantized model out of a folder, with nothing else at hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from npu_fusion.prepare import prepare as prepare_weights
from npu_fusion.quantization.checkpoints._load import load_checkpoint


def load_model(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, prepare: bool = True, **options: Any
) -> nn.Module:
    """Make the model of transformers that ``path`` describes, and load its quantized weights.

    Args:
        path: a folder with ``config.json`` and a checkpoint that
            :func:`~npu_fusion.quantization.checkpoints.load_checkpoint` reads.
        dtype: of what is in float; default: that of ``config.json``.
        prepare: lay out weights for the fusions, by :func:`npu_fusion.prepare`.
        options: of ``AutoModelForCausalLM.from_config`` (``attn_implementation``).

    Returns:
        The model, in evaluation mode. No memory was needed for weights in float.

    Raises:
        ImportError: transformers or safetensors is not installed.
        ValueError: ``path`` has no ``config.json``, or see ``load_checkpoint``.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"load_model: path is {str(folder)!r}; accepted: a folder with config.json")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError("load_model needs transformers: pip install npu-fusion[demo]") from error
    config = AutoConfig.from_pretrained(folder)
    # What says how the file is quantized is for load_checkpoint; transformers would look for another library.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype, **options)
    load_checkpoint(model.eval(), folder)
    if prepare:
        prepare_weights(model)
    return model
