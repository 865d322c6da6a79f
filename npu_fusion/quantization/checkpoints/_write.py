"""Writing safetensors: one file, or several with an index, of which no reader sees a part."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from npu_fusion.quantization.checkpoints._files import INDEX_SUFFIX, SUFFIX

_PART = ".part"


def write_tensors(
    folder: Path,
    stem: str,
    tensors: Iterable[tuple[str, Tensor]],
    shard_size: int,
    *,
    always_index: bool = False,
) -> str:
    """Write tensors one after the other; only those of one file are held at a time.

    Files get their names when the last is complete, since these have the number of files in them.

    Args:
        stem: ``model`` for ``model.safetensors``, or ``model-00001-of-00002.safetensors`` and so on.
        shard_size: bytes after which another file is begun. A tensor is never divided.
        always_index: number the file, and write an index, also if there is only one.

    Returns:
        The name of the file, or of the index.
    """
    parts: list[Path] = []
    listed: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    taken: set[int] = set()
    size = total = 0
    try:
        for name, tensor in tensors:
            count = tensor.numel() * tensor.element_size()
            if held and size + count > shard_size:
                parts.append(_part(folder, stem, len(parts), held))
                held, size, taken = {}, 0, set()
            held[name] = _alone(tensor, taken)
            taken.add(held[name].data_ptr())
            listed[name] = len(parts)
            size, total = size + count, total + count
        parts.append(_part(folder, stem, len(parts), held))
        if len(parts) == 1 and not always_index:
            parts[0].replace(folder / f"{stem}{SUFFIX}")
            return f"{stem}{SUFFIX}"
        names = [f"{stem}-{i + 1:05d}-of-{len(parts):05d}{SUFFIX}" for i in range(len(parts))]
        for part, name in zip(parts, names, strict=True):
            part.replace(folder / name)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in listed.items()}}
    write_json(folder / f"{stem}{INDEX_SUFFIX}", index)
    return f"{stem}{INDEX_SUFFIX}"


def _part(folder: Path, stem: str, number: int, tensors: dict[str, Tensor]) -> Path:
    from safetensors.torch import save_file

    path = folder / f"{stem}-{number + 1:05d}{_PART}"
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _alone(tensor: Tensor, taken: set[int]) -> Tensor:
    """On the CPU, contiguous, and in memory of its own, as safetensors wants it."""
    own = tensor.detach().cpu().contiguous()
    whole = own.untyped_storage().nbytes() == own.numel() * own.element_size()
    return own if whole and own.data_ptr() not in taken else own.clone()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object, at once: the file is complete or not there. Raises ``ValueError`` for NaN in it."""
    text = json.dumps(value, indent=2, allow_nan=False)
    part = path.with_name(path.name + _PART)
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
