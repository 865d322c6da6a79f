"""``npu-fusion quantize``: a model of transformers in a folder becomes a quantized one in another."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npu_fusion._cli_model import UsageError, positive

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
)
_BYTES = 256
"""Size of the vocabulary of a model that reads bytes and needs no tokenizer."""


def add_command(commands: Any) -> None:
    """Add it to the subparsers of the command line."""
    parser = commands.add_parser(
        "quantize",
        help="quantize a transformers model and write safetensors and a description",
        description="MODEL_DIR is a folder as transformers' save_pretrained writes it, with safetensors. The "
        "layers are calibrated on text, one block at a time. Load the result with "
        "npu_fusion.quantization.load_model(DIR). Without --data the text is the source code of Python's "
        "standard library, which is on every machine: take text like the model's own instead.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", type=Path)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--preset", metavar="NAME", help="AMCT's name or one of ours, e.g. W8A8_DYNAMIC_CFG")
    wanted.add_argument("--config", metavar="FILE", type=Path, help="a configuration as JSON")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="must not exist, or be empty")
    parser.add_argument("--form", choices=("npu_fusion", "ascend"), default="npu_fusion", help="of the files")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of what stays in float")
    parser.add_argument("--data", metavar="FILE", type=Path, help="text to calibrate on")
    parser.add_argument("--batches", type=positive, default=8, help="forward passes (batch_num)")
    parser.add_argument("--batch-size", type=positive, default=4, help="sequences in each")
    parser.add_argument("--length", type=positive, default=512, help="tokens in each sequence, at most")
    parser.add_argument(
        "--evaluate", action="store_true", help="print the loss on other text of --data before and after"
    )
    parser.set_defaults(run=_quantize)


def _quantize(arguments: argparse.Namespace) -> int:
    import npu_fusion
    from npu_fusion.quantization import QuantizationWarning, parse, save_checkpoint

    out: Path = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out is {str(out)!r}, which is there already; accepted: a new or an empty folder")
    try:
        config = parse(_config(arguments))
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    model = _load(arguments.model, DTYPES[arguments.dtype])
    tokens = _tokens(arguments, model)
    wanted = arguments.batches * arguments.batch_size * min(arguments.length, _context(model))
    with warnings.catch_warnings():
        # The same layers are in the summary below.
        warnings.simplefilter("ignore", QuantizationWarning)
        with torch.no_grad():
            before = _loss(model, tokens[wanted:], arguments) if arguments.evaluate else None
            try:
                state = npu_fusion.quantize(model, dataclasses.replace(config, batch_num=arguments.batches))
            except ValueError as error:
                raise UsageError(str(error)) from error
            for batch in _batches(tokens[:wanted], arguments, model):
                model(batch, use_cache=False)
            npu_fusion.convert(model, prepare=False)
            print(state)
            if before is not None:
                after = _loss(model, tokens[wanted:], arguments)
                print(f"loss in nats per token: {before:.4f} in {arguments.dtype}, {after:.4f} quantized")
    out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, out, form=arguments.form)
    config_file = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))
    config_file |= {"dtype": arguments.dtype}
    (out / "config.json").write_text(json.dumps(config_file, indent=2) + "\n", encoding="utf-8")
    for pattern in _COPIED:
        for path in arguments.model.glob(pattern):
            if not (out / path.name).exists():
                shutil.copy(path, out / path.name)
    sizes = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (arguments.model, out)]
    print(f"written to {out}: {sizes[0] / 1e6:,.1f} MB of weights became {sizes[1] / 1e6:,.1f} MB")
    return 0


def _config(arguments: argparse.Namespace) -> Any:
    if arguments.preset is not None:
        return arguments.preset
    try:
        return json.loads(arguments.config.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"--config is {str(arguments.config)!r}, which cannot be read: {error}") from error


def _load(folder: Path, dtype: torch.dtype) -> Any:
    if not (folder / "config.json").is_file():
        raise UsageError(f"MODEL_DIR is {str(folder)!r}; accepted: a folder with config.json and safetensors")
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UsageError("quantize needs transformers: pip install npu-fusion[demo]") from error
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise UsageError(f"the model in {str(folder)!r} cannot be loaded: {error}") from error


def _tokens(arguments: argparse.Namespace, model: Any) -> Tensor:
    """The calibration text as token ids [n]."""
    text = _text(arguments)
    if any(arguments.model.glob("tokenizer*")):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        ids = tokenizer(text.decode("utf-8", errors="replace"), return_tensors="pt").input_ids[0]
    elif model.config.vocab_size == _BYTES:
        ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    else:
        raise UsageError(
            f"MODEL_DIR is {str(arguments.model)!r}, which has no tokenizer; accepted: one with it"
        )
    length = min(arguments.length, _context(model))
    needed = arguments.batches * arguments.batch_size * length + (2 * length if arguments.evaluate else 0)
    if ids.numel() < needed:
        raise UsageError(
            f"the calibration text has {ids.numel():,} tokens; accepted: {needed:,} or more for --batches "
            f"{arguments.batches} --batch-size {arguments.batch_size} --length {length}"
        )
    return ids


def _text(arguments: argparse.Namespace) -> bytes:
    if arguments.data is None:
        from npu_fusion.demo.corpus import training_text

        print("no --data: calibrating on the source code of Python's standard library", file=sys.stderr)
        return training_text()[: 4 << 20]
    try:
        return arguments.data.read_bytes()
    except OSError as error:
        raise UsageError(f"--data is {str(arguments.data)!r}, which cannot be read: {error}") from error


def _context(model: Any) -> int:
    return int(getattr(model.config, "max_position_embeddings", 1 << 30))


def _batches(ids: Tensor, arguments: argparse.Namespace, model: Any) -> Iterator[Tensor]:
    length = min(arguments.length, _context(model))
    rows = ids[: ids.numel() // length * length].view(-1, length)
    yield from rows.split(arguments.batch_size)


def _loss(model: Any, ids: Tensor, arguments: argparse.Namespace) -> float:
    """Mean cross entropy on up to 32 sequences."""
    length = min(arguments.length, _context(model))
    rows = ids[: min(32, ids.numel() // length) * length].view(-1, length)
    losses = [
        nn.functional.cross_entropy(model(row[None], use_cache=False).logits[0, :-1].float(), row[1:]).item()
        for row in rows
    ]
    return sum(losses) / len(losses)
