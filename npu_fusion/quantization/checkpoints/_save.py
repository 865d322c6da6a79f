"""``save_checkpoint``: a quantized model to a folder, in our own form or in Ascend's."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from npu_fusion.quantization.api import is_calibrating
from npu_fusion.quantization.checkpoints import ascend, saved
from npu_fusion.quantization.checkpoints._contents import contents
from npu_fusion.quantization.checkpoints._files import INDEX_SUFFIX, SUFFIX, require_safetensors
from npu_fusion.quantization.checkpoints._write import write_json, write_tensors

FORMS = ("npu_fusion", "ascend")
SHARD_SIZE = 5_000_000_000


def save_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, form: str = "npu_fusion", shard_size: int = SHARD_SIZE
) -> None:
    """Save a model with deployed layers as safetensors and a description in JSON.

    Keys are those of the model before :func:`npu_fusion.prepare`. Without quantized layers it is a
    checkpoint of floats in the same form.

    Args:
        path: a folder, made if need be. It must not have a checkpoint already.
        form: ``npu_fusion``: what :func:`load_checkpoint` makes the same model of, bit for bit, without the
            original weights. ``ascend``: ``quant_model_description.json`` and
            ``quant_model_weights-*.safetensors`` as msmodelslim's AscendV1, for int8 and int4 weights and
            int8 inputs.
        shard_size: bytes after which another file is begun.

    Raises:
        TypeError: ``model`` is no module, or ``path`` no path.
        ValueError: ``form`` or ``shard_size`` is not accepted; the folder has a checkpoint; the model is
            being calibrated, or has tensors without values; or, in Ascend's form, a layer has a scheme that
            the form has not. Nothing is written then.
        ImportError: safetensors is not installed.
        OSError: the folder cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save_checkpoint: model is a {type(model).__name__}; accepted: torch.nn.Module")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"save_checkpoint: path is a {type(path).__name__}; accepted: a string or a path")
    if form not in FORMS:
        raise ValueError(f"save_checkpoint: form is {form!r}; accepted: {', '.join(FORMS)}")
    if type(shard_size) is not int or shard_size < 1:
        raise ValueError(
            f"save_checkpoint: shard_size is {shard_size!r}; accepted: a positive number of bytes"
        )
    require_safetensors("save_checkpoint")
    if is_calibrating(model):
        raise ValueError("save_checkpoint: model is being calibrated; call npu_fusion.convert(model) first")
    folder = Path(path)
    _check_folder(folder)
    found = contents(model)
    if form == "ascend":
        writer = ascend.AscendWriter(found)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder, ascend.STEM, writer.tensors(), shard_size, always_index=True)
        write_json(folder / ascend.DESCRIPTION, writer.description)
        return
    described = {name: layer.describe() for name, layer in found.layers.items()}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = (*found.tensors.items(), *found.buffers.items())
    weights = write_tensors(folder, "model", tensors, shard_size)
    write_json(
        folder / saved.DESCRIPTION, saved.description(weights, described, found.shared, list(found.buffers))
    )


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_checkpoint: path is {str(folder)!r}, a file; accepted: a folder")
    names = (saved.DESCRIPTION, ascend.DESCRIPTION, f"*{SUFFIX}", f"*{INDEX_SUFFIX}")
    there = next((file for name in names for file in folder.glob(name)), None)
    if there is not None:
        raise ValueError(
            f"save_checkpoint: {there} is there already; accepted: a folder without a checkpoint"
        )
