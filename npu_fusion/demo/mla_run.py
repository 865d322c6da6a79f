"""Multi-head latent attention, end to end, on this machine's CPU: what ``npu-fusion demo --model mla`` runs.

A trained byte-level decoder reads the beginnings of some held-out texts into its caches. Then it decodes one
byte of each at a time: eagerly as it is, and prepared and compiled with npu_fusion, on caches of their own.
Shown: every fusion, the operators before and after, whether both write the same bytes, the loss of both on
the texts, decoded byte by byte too, how far their logits are apart, and what the passes cost.

All of it is in float32, so that the bytes are the same: the fusions sum products in another order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

import npu_fusion
from npu_fusion.demo import _show
from npu_fusion.demo.corpus import evaluation_text
from npu_fusion.demo.mla_model import CHECKPOINT, Cache, Output, load_byte_mla
from npu_fusion.demo.model import context_length, facts

# Parts of the held-out text, decoded side by side.
SEQUENCES, FIRST = 8, 100_000
PROMPT = 64
ABSORB, PROLOG = "mla_absorb", "npu_mla_prolog_v3_functional"

Step = Callable[[Tensor, Tensor, Sequence[Cache]], Output]
"""The model, or what torch.compile made of it: tokens [B, S], positions [S] and caches."""


@dataclass(frozen=True)
class Result:
    """What the demo measured."""

    eager: Tensor
    fused: Tensor
    """Bytes [SEQUENCES, length] that were written after the prompts."""
    loss_eager: float
    loss_fused: float
    largest_difference: float
    """Of the logits, fused against eager, over all steps of the texts."""
    seconds_capture: float
    seconds_passes: float
    report: npu_fusion.FusionReport


def longest() -> int:
    """Most bytes that can be written after a prompt: what is left of the context."""
    return context_length(CHECKPOINT) - PROMPT


def run(host: str = "auto", dump_dir: str = "npu_fusion_dump", length: int = 160) -> Result:
    """Run the demo and print it; returns what was measured.

    Raises:
        ValueError: ``length`` is more than :func:`longest`.
    """
    if length > longest():
        raise ValueError(f"the demo's mla model: length is {length}; accepted: up to {longest()}")
    console = Console()
    # The model is tiny: more threads only wait for each other.
    torch.set_num_threads(1)
    console.rule("[bold]npu_fusion demo[/]: latent attention on fused operators, on the CPU")
    texts = _texts()
    prompts = texts[:, :PROMPT]
    with _show.step(console, "load the trained model and decode eagerly"), torch.no_grad():
        model = load_byte_mla()
        logits_eager = read(model, texts, model.new_caches(SEQUENCES))
        caches = model.new_caches(SEQUENCES)
        first = model(prompts, torch.arange(PROMPT), caches).logits[:, -1:].argmax(-1)
        eager = write(model, first, length, _copied(caches))
    _show.origin(console, facts(CHECKPOINT)["training"])
    with _show.step(console, "lay out the weights of attention, merge gate and up"):
        prepared = npu_fusion.prepare(model)
    console.print(f"  {prepared}")

    expect = dict.fromkeys((ABSORB, PROLOG), len(model.layers))
    backend = npu_fusion.get_npu_backend(
        host=host, fusion_config={"dump_dir": dump_dir, "numerics": "relaxed", "expect": expect}
    )
    compiled = torch.compile(model, backend=backend, dynamic=True)
    compiling = f"compile the decoding of one byte with npu_fusion, host {backend.host}"
    started = time.perf_counter()
    with _show.step(console, compiling), _show.no_caches(), torch.no_grad():
        compiled(texts[:, :1].clone(), torch.tensor([0]), model.new_caches(SEQUENCES))
    total = time.perf_counter() - started
    report = backend.reports[0]
    capture = report.began - started
    with _show.step(console, "decode with the fused model"), torch.no_grad():
        logits_fused = read(compiled, texts, model.new_caches(SEQUENCES))
        fused = write(compiled, first, length, _copied(caches))

    loss_eager, loss_fused = loss(logits_eager, texts), loss(logits_fused, texts)
    difference = float((logits_fused - logits_eager).abs().max())
    same = int((eager == fused).sum())
    _show.fusions(console, report, {ABSORB, PROLOG})
    _show.numbers(
        console,
        [
            ("bytes decoded, the same as by eager", f"{same:,} of {eager.numel():,}"),
            ("loss, eager", f"{loss_eager:.4f} nats per byte"),
            ("loss, fused", f"{loss_fused:.4f}"),
            (
                "largest difference of logits, fused against eager",
                f"{difference:.2e} (largest logit {float(logits_eager.abs().max()):.1f})",
            ),
            *_show.compilation(report, capture, total),
        ],
    )
    _show.written(console, "written by the fused model", bytes(prompts[0].tolist()), bytes(fused[0].tolist()))
    _show.other_graphs(console, backend.reports)
    return Result(eager, fused, loss_eager, loss_fused, difference, capture, report.seconds, report)


def read(step: Step, texts: Tensor, caches: Sequence[Cache]) -> Tensor:
    """Logits [B, S - 1, 256] after each byte of ``texts`` [B, S] but the last, read one at a time."""
    return torch.cat(
        [
            step(texts[:, at : at + 1].clone(), torch.tensor([at]), caches).logits
            for at in range(texts.shape[1] - 1)
        ],
        dim=1,
    )


def write(step: Step, token: Tensor, length: int, caches: Sequence[Cache]) -> Tensor:
    """The likeliest ``length`` bytes [B, length], one at a time; the first, ``token`` [B, 1], is given."""
    tokens = [token]
    for at in range(PROMPT, PROMPT + length - 1):
        tokens.append(step(tokens[-1], torch.tensor([at]), caches).logits.argmax(-1))
    return torch.cat(tokens, dim=1)


def _texts() -> Tensor:
    """[SEQUENCES, context]"""
    context = context_length(CHECKPOINT)
    text = evaluation_text()[FIRST : FIRST + SEQUENCES * context]
    return torch.tensor(list(text)).view(SEQUENCES, context)


def _copied(caches: Sequence[Cache]) -> list[Cache]:
    return [Cache(cache.latent.clone(), cache.rotary.clone()) for cache in caches]


def loss(logits: Tensor, texts: Tensor) -> float:
    """Mean cross entropy in nats per byte."""
    return torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), texts[:, 1:].flatten()).item()
