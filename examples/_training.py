"""What the training scripts of the demo's models share: options, batches, the loop, the files."""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors.torch import save_model

from npu_fusion.demo import evaluate_loss, evaluation_text, generate, training_text
from npu_fusion.demo.model import load_weights


def parser_of(description: str | None, checkpoint: Path, **defaults: Any) -> argparse.ArgumentParser:
    """The options that do not depend on the kind of model, with defaults for some of them."""
    parser = argparse.ArgumentParser(
        description=(description or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=2800, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=12, help="sequences per step")
    parser.add_argument("--sequence", type=int, default=256, help="bytes per sequence, the model's context")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak of the cosine schedule")
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warmup")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the matrices; norms have none")
    parser.add_argument(
        "--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of the matrix products"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--evaluate-every", type=int, default=400, help="steps between two looks at the held-out text"
    )
    parser.add_argument(
        "--output", type=Path, default=checkpoint, help="checkpoint; the facts go beside it as .json"
    )
    parser.set_defaults(**defaults)
    return parser


def batches(data: bytes, sequence: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield int64 [batch, sequence + 1] forever; within an epoch no byte is predicted twice."""
    stream = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(sequence + 1)
    while True:
        # Another cut in every epoch, so that the windows do not begin at the same places again.
        first = int(torch.randint(sequence, (1,), generator=generator))
        starts = torch.arange(first, len(stream) - sequence, sequence)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for chosen in starts.split(batch):
            if len(chosen) == batch:
                yield stream[chosen[:, None] + steps].long()


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Linear warmup to ``peak``, then half a cosine down to a hundredth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    arguments: argparse.Namespace, config: dict[str, Any], new_model: Callable[[dict[str, Any]], Any]
) -> None:
    """Train ``new_model(config)`` as the options say, and write its checkpoint and facts."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = new_model(config).train()
    parameters = sum(p.numel() for p in model.parameters())
    train_text, held_out = training_text(), evaluation_text()
    print(
        f"{parameters:,} parameters, {len(train_text):,} bytes to train on, {len(held_out):,} held out, "
        f"{arguments.steps} steps of {arguments.batch} x {arguments.sequence} bytes"
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": arguments.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=arguments.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    source = batches(train_text, arguments.sequence, arguments.batch, arguments.seed)
    glimpse = held_out[: 64 * arguments.sequence]

    started = time.perf_counter()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}")) as progress:
        task = progress.add_task("", total=arguments.steps)
        for step in range(arguments.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, arguments.learning_rate, arguments.warmup, arguments.steps)
            tokens = next(source)
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bfloat16"):
                logits = model(tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rate = (step + 1) * arguments.batch * arguments.sequence / (time.perf_counter() - started)
            progress.update(task, advance=1, description=f"loss {loss.item():.3f}  {rate:,.0f} bytes/s")
            if (step + 1) % arguments.evaluate_every == 0:
                model.eval()
                seen = evaluate_loss(model, glimpse, arguments.sequence)
                model.train()
                progress.print(f"step {step + 1}: train {loss.item():.3f}, held out {seen:.3f} nats/byte")
    seconds = time.perf_counter() - started

    save_model(model.half(), str(arguments.output))
    # The loss that is reported is the loss of the file, read back and run in float32.
    model = new_model(config).eval()
    load_weights(model, arguments.output)
    validation = evaluate_loss(model, held_out, arguments.sequence)
    facts = {
        "config": config,
        "training": {
            "command": shlex.join(["python", *sys.argv]),
            "parameters": parameters,
            "steps": arguments.steps,
            "batch": arguments.batch,
            "sequence": arguments.sequence,
            "peak_learning_rate": arguments.learning_rate,
            "seed": arguments.seed,
            "precision": arguments.precision,
            "train_bytes": len(train_text),
            "bytes_seen": arguments.steps * arguments.batch * arguments.sequence,
            "validation_bytes": len(held_out),
            "validation_loss_nats_per_byte": round(validation, 4),
            "seconds": round(seconds),
            "bytes_per_second": round(arguments.steps * arguments.batch * arguments.sequence / seconds),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    arguments.output.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    size = arguments.output.stat().st_size
    print(f"{arguments.output}: {size:,} bytes, {validation:.4f} nats/byte, {seconds:.0f} s")
    prompt = b"def main():\n"
    print((prompt + generate(model, prompt, 300, context=arguments.sequence)).decode(errors="replace"))
