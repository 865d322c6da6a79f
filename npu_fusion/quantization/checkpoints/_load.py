"""``load_checkpoint``: a quantized checkpoint into a float model, all of it or nothing."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from npu_fusion.quantization.api import QuantizationWarning
from npu_fusion.quantization.checkpoints._detect import FORMATS, detect
from npu_fusion.quantization.checkpoints._files import Tensors, require_safetensors
from npu_fusion.quantization.checkpoints._swap import swap
from npu_fusion.quantization.checkpoints._target import Target
from npu_fusion.quantization.modules import share


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint has made of a model."""

    format: str
    layers: Mapping[str, str]
    """Layer -> what it became, in words: ``int4 weights (group, asymmetric)``."""
    left: Mapping[str, str]
    """Layers that are quantized in the file and float in the model, with the same numbers -> why."""
    ignored: tuple[str, ...]
    """Tensors of the file that the model does not want."""

    def __str__(self) -> str:
        kinds: defaultdict[str, int] = defaultdict(int)
        for kind in self.layers.values():
            kinds[kind] += 1
        lines = [f"load_checkpoint: {len(self.layers)} quantized layers, of a {self.format} checkpoint"]
        lines += [f"  {count} x {kind}" for kind, count in kinds.items()]
        reasons: defaultdict[str, list[str]] = defaultdict(list)
        for name, reason in self.left.items():
            reasons[reason].append(name)
        lines += [f"  loaded as floats: {_some(names)}: {reason}" for reason, names in reasons.items()]
        if self.ignored:
            lines.append(f"  not wanted by the model: {_some(self.ignored)}")
        return "\n".join(lines)


def _some(names: list[str] | tuple[str, ...]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if names[1:] else names[0]


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, format: str | None = None) -> Loaded:
    """Load a quantized checkpoint into the float model that it is of, in place.

    Quantized ``torch.nn.Linear`` (of our own form also ``torch.nn.Conv2d``) are replaced by deployed layers
    with the codes, offsets and scales of the file; all other parameters and buffers get the values of the
    file, in the dtype of the model. A weight in a form that no deployed layer has (blocks, scattered groups,
    sizes that are no multiples) is loaded as floats into the layer that is there. Weights without quantized
    inputs have scales in the dtype of the model, as their operator wants it: an AWQ checkpoint, whose scales
    are float16, is exact in a float16 or float32 model, and in a bfloat16 one its scales are rounded.

    Everything is read, checked and made before the model is changed: after an error it is what it was.
    Nothing is unpickled.

    Args:
        model: of the architecture, in float. Parameters may be on the meta device; so may buffers, if the
            file has them (our own form) or the model can compute them (transformers 5 and later). Call
            :func:`npu_fusion.prepare` afterwards, not before.
        path: a folder with safetensors and what describes them; or one safetensors file, or an index, beside
            that.
        format: ``npu_fusion``, ``ascend``, ``awq``, ``gptq``, ``compressed-tensors`` or ``fp8``, to refuse
            others. By default what the description or ``config.json`` says.

    Returns:
        What each layer became, and what was left as floats and why. The latter is also in one
        :class:`~npu_fusion.quantization.api.QuantizationWarning`, unless all layers of the format are.

    Raises:
        TypeError: ``model`` is no module, or ``path`` no path.
        ValueError: the format is unknown, or not ``format``; a file is damaged, hostile, or not of this
            model. The message names file and tensor.
        ImportError: safetensors is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_checkpoint: model is a {type(model).__name__}; accepted: torch.nn.Module")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"load_checkpoint: path is a {type(path).__name__}; accepted: a string or a path")
    if format is not None and format not in FORMATS:
        raise ValueError(f"load_checkpoint: format is {format!r}; accepted: {', '.join(FORMATS)}")
    require_safetensors("load_checkpoint")
    reader, location = detect(Path(path), format)
    # Also inside of "with torch.device('meta')", where a model may have been made just before.
    with closing(Tensors(location)) as tensors, torch.device("cpu"), torch.no_grad():
        target = Target(model, tensors)
        reader.read(tensors, target)
        target.rest()
        target.complete()
    swap(model, target.changes)
    if reader.siblings:
        for parent in model.modules():
            share(list(parent.children()))
    loaded = Loaded(reader.name, target.became, target.left, tuple(target.ignored))
    if target.left and reader.deploys:
        _warn(loaded)
    return loaded


def _warn(loaded: Loaded) -> None:
    lines = [line.strip() for line in str(loaded).splitlines() if "loaded as floats" in line]
    warnings.warn(f"load_checkpoint: {'; '.join(lines)}", QuantizationWarning, stacklevel=3)
