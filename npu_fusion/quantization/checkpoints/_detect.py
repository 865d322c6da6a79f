"""Which format a checkpoint has, by what lies beside its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from npu_fusion.quantization.checkpoints import ascend, saved
from npu_fusion.quantization.checkpoints._files import Location, locate
from npu_fusion.quantization.checkpoints._json import entry, read_json
from npu_fusion.quantization.checkpoints._reader import Reader
from npu_fusion.quantization.checkpoints.ascend import AscendReader
from npu_fusion.quantization.checkpoints.awq import AwqReader
from npu_fusion.quantization.checkpoints.compressed_tensors import CompressedTensorsReader
from npu_fusion.quantization.checkpoints.deepseek_fp8 import DeepSeekFp8Reader
from npu_fusion.quantization.checkpoints.gptq import GptqReader
from npu_fusion.quantization.checkpoints.saved import SavedReader

READERS: tuple[type[Reader], ...] = (
    SavedReader,
    AscendReader,
    AwqReader,
    GptqReader,
    CompressedTensorsReader,
    DeepSeekFp8Reader,
)
FORMATS = tuple(reader.name for reader in READERS)

_DESCRIPTIONS = {saved.DESCRIPTION: SavedReader, ascend.DESCRIPTION: AscendReader}
_LONE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files of AutoGPTQ and AutoAWQ from before ``config.json`` said it."""


def detect(path: Path, format: str | None) -> tuple[Reader, Location]:
    """The reader of a checkpoint, and where its tensors are.

    Raises ``ValueError`` if nothing says what format it has, if it is none of ours, or not ``format``.
    """
    folder = path if path.is_dir() else path.parent
    found = _described(folder) or _configured(folder)
    if found is None:
        locate(path)  # a pickle, or no file at all, is the better message
        files = ", ".join((*_DESCRIPTIONS, "config.json with quantization_config", *_LONE))
        raise ValueError(f"{folder}: nothing says how it is quantized; accepted: one of {files}")
    reader, config, where = found
    if format is not None and reader.name != format:
        raise ValueError(
            f"{where}: is of format {reader.name!r}; accepted: {format!r}, as load_checkpoint was told"
        )
    made = reader(config, where)
    return made, locate(folder / made.weights if path.is_dir() and made.weights is not None else path)


def _described(folder: Path) -> tuple[type[Reader], Mapping[str, Any], str] | None:
    for name, reader in _DESCRIPTIONS.items():
        if (folder / name).is_file():
            return reader, read_json(folder / name), str(folder / name)
    return None


def _configured(folder: Path) -> tuple[type[Reader], Mapping[str, Any], str] | None:
    path = folder / "config.json"
    if path.is_file():
        config = read_json(path)
        text = entry(config, "text_config", dict, str(path), {})
        given = entry(config, "quantization_config", dict, str(path), text.get("quantization_config"))
        if given is not None:
            where = f"{path}: quantization_config"
            if not isinstance(given, dict):
                raise ValueError(f"{where} is {given!r}; accepted: an object")
            return _by_method(entry(given, "quant_method", str, where), where), given, where
    for name, method in _LONE.items():
        if (folder / name).is_file():
            return _by_method(method, name), read_json(folder / name), str(folder / name)
    return None


def _by_method(method: str, where: str) -> type[Reader]:
    for reader in READERS:
        if method in reader.methods:
            return reader
    accepted = ", ".join(repr(m) for reader in READERS for m in reader.methods)
    raise ValueError(f"{where}: quant_method is {method!r}; accepted: {accepted}")
