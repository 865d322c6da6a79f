"""The same model and data quantized by torchao and by llm-compressor, beside this package.

::

    make bench-quantization-peers                     installs both into an environment of their own, and runs
    this python -m benchmarks.quantization_peers --update docs/quantization.md

Neither is a dependency: llm-compressor alone brings half a gigabyte. What they cannot do on a CPU is not in
the table. The last row is llm-compressor's GPTQ function beside ours, for one weight [256, 512], the same
scales and Gram matrix.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.quantization import (
    BATCHES,
    SEQUENCES,
    Rows,
    calibration,
    configured,
    loss,
    planted,
    quantized,
    update,
    weights,
)
from npu_fusion.demo.model import context_length
from npu_fusion.quantization import PRESETS

Peer = Callable[[float], nn.Module]


def torchao(config: Callable[[], Any]) -> Peer:
    def make(size: float) -> nn.Module:
        from torchao.quantization import quantize_

        model = planted(size)
        quantize_(model, config(), filter_fn=lambda m, name: type(m) is nn.Linear and name != "lm_head")
        return model

    return make


def int8_dynamic() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def llm_compressor(recipe: Callable[[], list[Any]]) -> Peer:
    def make(size: float) -> nn.Module:
        from datasets import Dataset
        from llmcompressor import oneshot
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        # It wants a tokenizer, and does not use it: the data are token ids already.
        words = Tokenizer(models.WordLevel({f"{i:02x}": i for i in range(256)}, unk_token="00"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="00")
        rows = [row.tolist() for batch in calibration() for row in batch]
        data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        with tempfile.TemporaryDirectory() as folder:
            planted(size).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return oneshot(
                model=folder,
                processor=tokenizer,
                dataset=data,
                recipe=recipe(),
                num_calibration_samples=BATCHES * SEQUENCES,
                max_seq_length=context_length(),
                batch_size=SEQUENCES,
            )

    return make


def _scheme(bits: int, **inputs: Any) -> dict[str, Any]:
    group = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    channel = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    scheme: dict[str, Any] = {"targets": ["Linear"], "weights": channel if inputs else group}
    return {"group_0": scheme | ({"input_activations": inputs} if inputs else {})}


_PER_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def rounded(bits: int, **inputs: Any) -> list[Any]:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return [QuantizationModifier(config_groups=_scheme(bits, **inputs), ignore=["lm_head"])]


def smoothed() -> list[Any]:
    from llmcompressor.modifiers.smoothquant import SmoothQuantModifier

    return [SmoothQuantModifier(smoothing_strength=0.5), *rounded(8, **_PER_TOKEN)]


def gptq(bits: int) -> list[Any]:
    from llmcompressor.modifiers.quantization import GPTQModifier

    return [GPTQModifier(config_groups=_scheme(bits), ignore=["lm_head"])]


def ours(config: Any) -> Peer:
    return lambda size: quantized(config, size)


INT4 = weights("int4", "group", 32)
CASES: dict[str, dict[str, Peer]] = {
    "int8, weights per channel, inputs per token": {
        "npu_fusion": ours(PRESETS["W8A8_DYNAMIC_CFG"]),
        "torchao": torchao(int8_dynamic),
        "llm-compressor": llm_compressor(lambda: rounded(8, **_PER_TOKEN)),
    },
    "the same with SmoothQuant, 0.5": {
        "npu_fusion": ours(PRESETS["W8A8_DYNAMIC_SMOOTHQUANT_CFG"]),
        "llm-compressor": llm_compressor(smoothed),
    },
    "int4 in groups of 32, to nearest": {
        "npu_fusion": ours(configured({"minmax"}, INT4)),
        "llm-compressor": llm_compressor(lambda: rounded(4)),
    },
    "int4 in groups of 32, GPTQ": {
        "npu_fusion": ours(configured({"gptq"}, INT4)),
        "llm-compressor": llm_compressor(lambda: gptq(4)),
    },
}
LIBRARIES = ("npu_fusion", "torchao", "llm-compressor")


def table() -> Rows:
    rows = [["", "size", *LIBRARIES]]
    rows.append(["bfloat16", "any", f"{loss(planted()):.4f}", "", ""])
    for name, makers in CASES.items():
        for size in (1, 256):
            losses = {library: f"{loss(make(size)):.4f}" for library, make in makers.items()}
            rows.append([name, str(size), *(losses.get(library, "-") for library in LIBRARIES)])
    same = f"{equal_codes():.2%} of the codes equal"
    rows.append(["the GPTQ functions alone, int4 in groups of 64, act_order", "", same, "", ""])
    return Rows("loss in nats per byte", rows)


def equal_codes() -> float:
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    from npu_fusion.quantization.algorithms.gptq import gptq_numbers, prepare
    from npu_fusion.quantization.qparams import spread, weight_parameters
    from npu_fusion.quantization.scheme import WeightScheme

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 512, generator=generator) @ torch.randn(512, 512, generator=generator)
    weight, gram = torch.randn(256, 512, generator=generator), x.t() @ x / len(x)
    scheme = WeightScheme("int4", True, "group", 64)
    scale, _ = weight_parameters(weight, scheme)
    hessian = prepare(gram)
    assert hessian is not None
    ours = gptq_numbers(weight, hessian, scheme, scale)
    arguments = QuantizationArgs(
        num_bits=4, symmetric=True, strategy="group", group_size=64, actorder="static"
    )
    stacked = (weight[None].clone(), gram[None].clone(), scale[None], torch.zeros_like(scale)[None])
    theirs, *_ = quantize_weight(*stacked, None, arguments)
    return float(((theirs[0] / spread(scale, scheme, 512)).round() == ours).float().mean())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--update", type=Path, metavar="FILE", help="put the table into this document")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = table()
    rows.print()
    if arguments.update:
        text = arguments.update.read_text(encoding="utf-8")
        arguments.update.write_text(update(text, "peers", rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
