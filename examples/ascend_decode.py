"""Decode with latent attention and a W8A8 MLP: on an Ascend machine, offline, or on any CPU, unchanged.

::

    python examples/ascend_decode.py       # an Ascend machine: torchair; elsewhere: Inductor
    python -m npu_fusion.hosts.offline -- python examples/ascend_decode.py    # torchair without a device

The model is plain PyTorch, built like DeepSeek-V3 (npu_fusion/demo/mla_model.py) with random weights, and of
sizes that the fused operators take on the hardware. Only the few lines around ``torch.compile`` know of
npu_fusion. On an Ascend machine both models are timed; offline torchair lowers the graph to GE, and what it
lowered is run on the CPU, operator by operator.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import npu_fusion
from npu_fusion.demo.mla_model import Attention, ByteMla, Cache, MlaConfig
from npu_fusion.quantization import quantize_linears

PAGE = 128


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode some tokens eagerly and fused, and compare.")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024, help="7168 is DeepSeek-V3's")
    parser.add_argument("--heads", type=int, default=8, help="128 is DeepSeek-V3's")
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="tokens to decode")
    parser.add_argument("--dump", default=None, metavar="DIR", help="where graphs and reports go")
    return parser.parse_args()


class PagedAttention(Attention):
    """Attention whose caches are pages, [pages, PAGE, 1, C], as torchair updates them without a copy.

    Each sequence has pages of its own, one after the other.
    """

    def __init__(self, config: MlaConfig) -> None:
        super().__init__(config)
        self.places = config.max_position_embeddings

    def cached(
        self, cache: Cache, positions: torch.Tensor, latent: torch.Tensor, k_rot: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = latent.shape[0]
        first = torch.arange(batch, device=positions.device).unsqueeze(1) * self.places
        slots = (first + positions).flatten()
        for pages, rows in zip(cache, (latent, k_rot), strict=True):
            pages.view(-1, rows.shape[-1]).index_copy_(0, slots, rows.reshape(-1, rows.shape[-1]))
        read = [pages.view(batch, 1, self.places, -1) for pages in cache]
        return read[0], read[1]


class PagedMla(ByteMla):
    def __init__(self, config: MlaConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn = PagedAttention(config)

    def new_caches(self, batch: int) -> list[Cache]:
        return [
            Cache(*(kept.view(-1, PAGE, 1, kept.shape[-1]) for kept in cache))
            for cache in super().new_caches(batch)
        ]


def build(given: argparse.Namespace, device: torch.device) -> PagedMla:
    """The model in bfloat16, its MLPs quantized: int8 weights per channel, int8 activations per token."""
    torch.manual_seed(0)
    config = MlaConfig(
        hidden_size=given.hidden,
        intermediate_size=given.intermediate,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    model = PagedMla(config).to(torch.bfloat16).eval()
    for layer in model.layers:
        quantize_linears(layer.mlp)
    return model.to(device)


def decode(
    step: Callable[..., Any], model: PagedMla, batch: int, steps: int
) -> tuple[torch.Tensor, list[float]]:
    """Logits [steps, batch, vocabulary] of a fixed sequence of tokens, and the seconds of each step."""
    device = model.embed_tokens.weight.device
    caches = model.new_caches(batch)
    logits, seconds = [], []
    for position in range(steps):
        tokens = (
            torch.arange(batch, device=device).unsqueeze(1) * 31 + position * 7
        ) % model.config.vocab_size
        started = time.perf_counter()
        output = step(tokens % model.config.vocab_size, torch.tensor([position], device=device), caches)
        logits.append(output.logits[:, -1].float().cpu())  # waits for the device
        seconds.append(time.perf_counter() - started)
    return torch.stack(logits), seconds


def main() -> None:
    given = arguments()
    backend = npu_fusion.get_npu_backend(fusion_config={"numerics": "relaxed", "dump_dir": given.dump})
    on_npu = backend.host in ("torchair", "npugraph_ex") and os.environ.get("NPU_FUSION_OFFLINE") != "1"
    model = build(given, torch.device("npu" if on_npu else "cpu"))

    with torch.no_grad():
        expected, eager_seconds = decode(model, model, given.batch, given.steps)
        npu_fusion.prepare(model)
        compiled = torch.compile(model, backend=backend)
        got, fused_seconds = decode(compiled, model, given.batch, given.steps)

    print(f"host {backend.host}, device {'npu' if on_npu else 'cpu'}")
    for report in backend.reports:
        report.print()
    difference = float((got - expected).abs().max())
    same = int((got.argmax(-1) == expected.argmax(-1)).sum())
    print(f"largest difference of logits: {difference:.2e}, largest logit {float(expected.abs().max()):.2f}")
    print(f"same token: {same} of {given.steps * given.batch}")
    if len(fused_seconds) > 2:
        warm = [1e3 * statistics.median(times[2:]) for times in (eager_seconds, fused_seconds)]
        print(f"a step, median: eager {warm[0]:.2f} ms, compiled {warm[1]:.2f} ms")


if __name__ == "__main__":
    main()
