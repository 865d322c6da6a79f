"""Train the demo's byte-level Llama on the source code of Python's standard library.

    python examples/train_byte_llama.py

writes ``npu_fusion/demo/byte_llama.safetensors`` (float16 weights) and ``npu_fusion/demo/byte_llama.json``
(the model's configuration and how it was trained). On two cores of a CPU with AVX-512 bfloat16 it takes about
twelve minutes; ``--precision float32`` suits any CPU and takes about twice as long. Needs
``pip install npu-fusion[demo]``.

The model is transformers' ``LlamaForCausalLM`` (SwiGLU, RMSNorm, RoPE, grouped-query attention) over the 256
bytes. The files that measure its loss (``npu_fusion.demo.corpus.HELD_OUT``) are not trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

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
from safetensors.torch import load_model, save_model

from npu_fusion.demo import evaluate_loss, evaluation_text, generate, training_text
from npu_fusion.demo.model import CHECKPOINT, new_byte_llama


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2800, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=12, help="sequences per step")
    parser.add_argument("--sequence", type=int, default=256, help="bytes per sequence, the model's context")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--intermediate", type=int, default=640, help="width of the SwiGLU")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=2, help="key and value heads")
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
        "--output", type=Path, default=CHECKPOINT, help="checkpoint; the facts go beside it as .json"
    )
    return parser.parse_args()


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


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    config = {
        "vocab_size": 256,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "max_position_embeddings": arguments.sequence,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
    }
    model = new_byte_llama(config).train()
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
    model = new_byte_llama(config).eval()
    load_model(model, str(arguments.output))
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


if __name__ == "__main__":
    main()
