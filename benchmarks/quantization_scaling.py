"""What calibrating a model of seven billion parameters takes, measured on blocks of its size.

::

    python -m benchmarks.quantization_scaling                                some minutes, 8 GB of memory
    python -m benchmarks.quantization_scaling --update docs/quantization.md

Models of one and of two decoder blocks of Llama-2-7B's size, with random weights in bfloat16, are
calibrated and converted, each in a process of its own, because the peak of a process never falls. Blocks are
quantized one after the other, so the seconds and the weights grow by the same amount with each, and what is
beside the weights does not grow: the table shows it, and the last column goes on from there to 32 blocks.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import npu_fusion
from benchmarks.quantization import Rows, configured, update, weights
from npu_fusion.quantization import PRESETS

SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
BLOCKS = 32
MEASURED = (1, 2)
BATCHES, TOKENS = 4, 512
CONFIGS = {
    "W8A8_DYNAMIC_SMOOTHQUANT_CFG": PRESETS["W8A8_DYNAMIC_SMOOTHQUANT_CFG"],
    "int4 in groups of 128, gptq": configured({"gptq"}, weights("int4", "group", 128)),
}


def table() -> Rows:
    rows = [["algorithm", "blocks", "weights", "peak", "beside the weights", "time", "32 blocks"]]
    for name in CONFIGS:
        measured = [_in_child(name, blocks) for blocks in MEASURED]
        for blocks, (gb, peak, seconds) in zip(MEASURED, measured, strict=True):
            sizes = (f"{size:.2f} GB" for size in (gb, peak, peak - gb))
            rows.append([name, str(blocks), *sizes, f"{seconds:.0f} s", ""])
        (gb_1, _, s_1), *_, (gb_n, _, s_n) = measured
        more = BLOCKS - 1
        per_block = [(last - first) / (MEASURED[-1] - 1) for first, last in ((gb_1, gb_n), (s_1, s_n))]
        gb = gb_1 + more * per_block[0] + max(peak - size for size, peak, _ in measured)
        rows[-1][-1] = f"{gb:.1f} GB, {(s_1 + more * per_block[1]) / 60:.0f} min"
    return Rows(
        f"Llama-2-7B in bfloat16, {BATCHES} x {TOKENS} tokens, {torch.get_num_threads()} threads", rows
    )


def _in_child(name: str, blocks: int) -> tuple[float, float, float]:
    command = [sys.executable, "-m", "benchmarks.quantization_scaling", "--measure", name, str(blocks)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    gb, peak, seconds = json.loads(done.stdout.splitlines()[-1])
    return gb, peak, seconds


def measure(name: str, blocks: int) -> tuple[float, float, float]:
    """Size of the weights and peak of the process, GB, and seconds for calibrating and converting."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = LlamaConfig(**SIZES, num_hidden_layers=blocks, use_cache=False)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    gb = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    batches = torch.randint(0, SIZES["vocab_size"], (BATCHES, 1, TOKENS))
    started = time.perf_counter()
    npu_fusion.quantize(model, {**CONFIGS[name], "batch_num": BATCHES}, progress=False)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    npu_fusion.convert(model)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return gb, peak * 1024 / 1e9, seconds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--update", type=Path, metavar="FILE", help="put the table into this document")
    parser.add_argument("--measure", nargs=2, metavar=("CONFIG", "BLOCKS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], int(arguments.measure[1]))))
        return 0
    rows = table()
    rows.print()
    if arguments.update:
        text = arguments.update.read_text(encoding="utf-8")
        arguments.update.write_text(update(text, "scaling", rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
