"""Tokens per second of a whole model: W8A8 on fused operators beside what Inductor and torchao make of it.

::

    python -m benchmarks.end_to_end                                16 layers of hidden size 2048, all variants
    python -m benchmarks.end_to_end --layers 2 --threads 1         less of it
    python -m benchmarks.end_to_end --variants npu_fusion int8     some variants, by their names
    python -m benchmarks.end_to_end --update docs/performance.md   put the tables into the document

The model is the demo's Llama (:mod:`npu_fusion.demo.model`) with the sizes of a model of one billion
parameters, random weights, and the demo's vocabulary of 256 bytes, so its head costs nothing.

=========================== ==============================================================================
npu_fusion                  ``quantize_linears`` and ``prepare``, compiled with this package, host "inductor"
int8                        the same module, compiled by Inductor alone
torchao                     ``Int8DynamicActivationInt8WeightConfig`` on all linears but the head; Inductor
bfloat16                    not quantized, compiled by Inductor
.., float32                 what is not int8 is float32
.., freezing                Inductor's ``freezing``: weights are constants, packed for its kernels
=========================== ==============================================================================

Attention is the same code for all: PyTorch's ``scaled_dot_product_attention`` for a prompt, two matrix
products per key-value head for a step, which for one token is twenty times as fast on a CPU and would be the
first thing that anybody changes.

torchao is asked for only by its own variants (``pip install torchao``); without it they are left out. A
decode step is one compiled call with a static cache (64 tokens in it, 128 places) for one token of each
sequence; a prefill is 512 tokens of one sequence without a cache, of which the last one's logits are
computed. Every variant of a scenario is built from the same random weights in one process and takes turns
with the others. The logits are compared: variants must compute the same model, up to what quantization costs.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache
from transformers.masking_utils import eager_mask

import npu_fusion
from npu_fusion.bench.table import Rows, update
from npu_fusion.bench.timing import Times, interleaved
from npu_fusion.demo.model import new_byte_llama
from npu_fusion.quantization import quantize_linears

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, LAYERS = 2048, 8192, 32, 8, 16
PROMPT, PLACES, PREFILL = 64, 128, 512
SECONDS = 60.0
GOAL = 1.5


@dataclass(frozen=True)
class Scenario:
    name: str
    batch: int
    tokens: int
    """Per sequence and call."""

    @property
    def cached(self) -> bool:
        return self.tokens == 1


SCENARIOS = (
    Scenario("decode, batch 1", 1, 1),
    Scenario("decode, batch 16", 16, 1),
    Scenario("prefill", 1, PREFILL),
)


# -- variants -----------------------------------------------------------------------------------------------


def new_model(layers: int, hidden: int = HIDDEN, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The demo's architecture, always with the same random weights (rounded to bfloat16 in any dtype)."""
    torch.manual_seed(0)
    config = {
        "vocab_size": 256,
        "hidden_size": hidden,
        "intermediate_size": hidden * INTERMEDIATE // HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "max_position_embeddings": 2 * PREFILL,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return new_byte_llama(config, torch.bfloat16).to(dtype).eval()


def _quantized(layers: int, hidden: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = new_model(layers, hidden, dtype)
    quantize_linears(model)
    npu_fusion.prepare(model)
    return model


def _torchao(layers: int, hidden: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = new_model(layers, hidden, dtype)

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name != "lm_head"

    # Its own settings for Inductor are process-wide, and made for GPUs.
    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), filter_fn=chosen)
    return model


_quantized_float32 = functools.partial(_quantized, dtype=torch.float32)
_torchao_float32 = functools.partial(_torchao, dtype=torch.float32)


@dataclass(frozen=True)
class Variant:
    build: Callable[[int, int], nn.Module]
    ours: bool = False
    freezing: bool = False


VARIANTS: dict[str, Variant] = {
    "npu_fusion": Variant(_quantized, ours=True),
    "npu_fusion, float32": Variant(_quantized_float32, ours=True),
    "int8": Variant(_quantized),
    "int8, freezing": Variant(_quantized, freezing=True),
    "int8, float32": Variant(_quantized_float32),
    "torchao": Variant(_torchao),
    "torchao, freezing": Variant(_torchao, freezing=True),
    "torchao, float32": Variant(_torchao_float32),
    "bfloat16": Variant(new_model),
    "bfloat16, freezing": Variant(new_model, freezing=True),
}


def available() -> tuple[str, ...]:
    """The variants that can be run here."""
    found = importlib.util.find_spec("torchao") is not None
    return tuple(name for name in VARIANTS if found or not name.startswith("torchao"))


def _attention_of_steps(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, N, S, D], key and value [B, N_kv, S_kv, D], a mask.

    The heads that share a key are rows of one product: key and value are not repeated.
    """
    batch, heads, length, width = query.shape
    shared = key.shape[1]
    rows = query.reshape(batch, shared, heads // shared * length, width)
    scores = torch.matmul(rows, key.transpose(-1, -2)) * scaling
    scores = scores.view(batch, shared, heads // shared, length, -1) + mask.unsqueeze(1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype).flatten(2, 3)
    out = torch.matmul(weights, value).view(batch, heads, length, width)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("steps", _attention_of_steps)
AttentionMaskInterface.register("steps", eager_mask)


class _Step(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, cache: StaticCache) -> Tensor:
        return self.model(tokens, past_key_values=cache).logits


class _Prompt(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False, logits_to_keep=1).logits


def call(variant: str, model: nn.Module, scenario: Scenario) -> Callable[[], Tensor]:
    """What is timed. It compiles when it is called first."""
    random = torch.Generator().manual_seed(1)
    count = PROMPT if scenario.cached else scenario.tokens
    tokens = torch.randint(0, 256, (scenario.batch, count), generator=random)
    if not scenario.cached:
        return functools.partial(_compiled(variant, _Prompt(model)), tokens)
    cache = _cache(model, scenario.batch)
    model.set_attn_implementation("steps")
    _Step(model)(tokens, cache)
    step, last = _compiled(variant, _Step(model)), tokens[:, -1:].clone()

    def decode() -> Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)
        return step(last, cache)

    return decode


def _cache(model: nn.Module, batch: int) -> StaticCache:
    config = model.config
    cache = StaticCache(config=config, max_cache_len=PLACES)
    cache.early_initialization(
        batch_size=batch,
        num_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        dtype=model.dtype,
        device=torch.device("cpu"),
    )
    return cache


def _compiled(variant: str, module: nn.Module) -> Callable[..., Tensor]:
    # Code of its own: Dynamo keeps all graphs of a code object together, and tries the guards of each.
    kind = type(module)
    code = kind.forward.__code__.replace()
    module.__class__ = type(kind.__name__, (kind,), {"forward": types.FunctionType(code, globals())})
    if VARIANTS[variant].ours:
        backend = npu_fusion.get_npu_backend(host="inductor", fusion_config={"strict": True})
        return torch.compile(module, backend=backend, dynamic=False, fullgraph=True)
    options = {"freezing": True} if VARIANTS[variant].freezing else None
    return torch.compile(module, dynamic=False, fullgraph=True, options=options)


# -- measuring ----------------------------------------------------------------------------------------------

PARTS = ("products", "attention", "other fused operators", "Inductor's code and the rest")
_PRODUCTS = (
    "aten::_int_mm",
    "aten::mm",
    "aten::addmm",
    "mkldnn::_linear_pointwise",
    "onednn::",
    "npu::npu_quant_matmul",
)
_ATTENTION = ("aten::_scaled_dot_product", "aten::bmm")
_FUSED = ("npu::",)


@dataclass(frozen=True)
class Run:
    """One variant in one scenario."""

    variant: str
    scenario: Scenario
    times: Times
    apart: float
    """Largest difference of the logits from those of the first variant, over the largest logit."""
    parts: dict[str, float]
    """Seconds of one call by ``PARTS``, as a profiler sees them."""

    @property
    def tokens_per_second(self) -> float:
        return self.scenario.batch * self.scenario.tokens / self.times.median


@torch.no_grad()
def measure(
    scenario: Scenario, variants: Sequence[str], layers: int, hidden: int = HIDDEN, seconds: float = SECONDS
) -> list[Run]:
    """Build the variants, compile each, and let them take turns for ``seconds``."""
    torch._dynamo.reset()
    gc.collect()
    models: dict[Callable[[int, int], nn.Module], nn.Module] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    logits: dict[str, Tensor] = {}
    for variant in variants:
        with _progress(f"{scenario.name}: {variant}, built and compiled"):
            build = VARIANTS[variant].build
            if build not in models:
                models[build] = build(layers, hidden)
            calls[variant] = call(variant, models[build], scenario)
            logits[variant] = calls[variant]().float()
    with _progress(f"{scenario.name}: measured"):
        times = interleaved(calls, seconds)
    first = logits[variants[0]]
    return [
        Run(
            variant,
            scenario,
            times[variant],
            float((logits[variant] - first).abs().max() / first.abs().max()),
            parts(calls[variant]),
        )
        for variant in variants
    ]


def parts(step: Callable[[], Any], repeats: int = 3) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(repeats):
            step()
    found = dict.fromkeys(PARTS, 0.0)
    events = profiled.events()
    for event in events:
        part = _part(event.name)
        if part is not None and all(_part(parent.name) is None for parent in _parents(event)):
            found[part] += event.cpu_time_total
        if event.cpu_parent is None:
            found[PARTS[-1]] += event.cpu_time_total
    found[PARTS[-1]] -= sum(found[part] for part in PARTS[:-1])
    return {part: microseconds / repeats / 1e6 for part, microseconds in found.items()}


def _part(name: str) -> str | None:
    for part, prefixes in zip(PARTS, (_PRODUCTS, _ATTENTION, _FUSED), strict=False):
        if name.startswith(prefixes):
            return part
    return None


def _parents(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


# -- showing ------------------------------------------------------------------------------------------------


def tables(runs: Sequence[Run]) -> list[Rows]:
    """Speed of every variant, what is won over the best of the others, and where a call's time goes."""
    scenarios = list(dict.fromkeys(run.scenario for run in runs))
    by = {(run.variant, run.scenario): run for run in runs}
    variants = list(dict.fromkeys(run.variant for run in runs))
    speed = [
        [variant]
        + [
            cell
            for s in scenarios
            for cell in (f"{by[variant, s].tokens_per_second:,.1f}", f"{by[variant, s].apart:.2f}")
        ]
        for variant in variants
    ]
    header = ["variant", *(cell for s in scenarios for cell in (f"{s.name}, tokens/s", "logits apart"))]
    shown = [Rows("speed", "Tokens per second", header, speed)]
    if any(VARIANTS[v].ours for v in variants) and not all(VARIANTS[v].ours for v in variants):
        shown.append(_gains(runs, scenarios))
    split = [
        [f"{run.scenario.name}: {run.variant}", f"{run.times.median * 1e3:,.1f}"]
        + [f"{run.parts[part] * 1e3:,.1f}" for part in PARTS]
        for run in runs
    ]
    shown.append(Rows("parts", "Where the time of a call goes, in ms", ("call", "measured", *PARTS), split))
    return shown


def _gains(runs: Sequence[Run], scenarios: Sequence[Scenario]) -> Rows:
    rows = []
    for s in scenarios:
        ours, best = (
            max(
                (run for run in runs if run.scenario == s and VARIANTS[run.variant].ours == own),
                key=lambda run: run.tokens_per_second,
            )
            for own in (True, False)
        )
        gain = ours.tokens_per_second / best.tokens_per_second
        most = sum(best.parts.values()) / (best.parts["products"] + best.parts["attention"])
        met = "yes" if gain >= GOAL else "no"
        rows.append([s.name, ours.variant, best.variant, f"{gain:.2f}", f"{GOAL}", met, f"{most:.2f}"])
    header = ("scenario", "ours", "best of the others", "gain", "goal", "met", "without the rest")
    return Rows("gain", "Against the goal", header, rows)


@contextmanager
def _progress(what: str) -> Iterator[None]:
    console = Console(stderr=True)
    with console.status(what):
        began = time.perf_counter()
        yield
    console.print(f"{what}: {time.perf_counter() - began:.0f} s")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all that can be run")
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--scenarios", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"default: {LAYERS}")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help=f"a multiple of 128; default: {HIDDEN}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"per scenario; default: {SECONDS:.0f}"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--markdown", action="store_true", help="print Markdown")
    how.add_argument("--update", type=Path, metavar="FILE", help="replace the marked tables of this document")
    arguments = parser.parse_args(argv)
    for name in ("layers", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; accepted: 1 or more")
    if arguments.hidden < 128 or arguments.hidden % 128:
        parser.error(f"--hidden is {arguments.hidden}; accepted: multiples of 128")
    torch.set_num_threads(arguments.threads)
    variants: Sequence[str] = arguments.variants or available()
    runs = []
    for scenario in (s for s in SCENARIOS if s.name in arguments.scenarios):
        runs += measure(scenario, variants, arguments.layers, arguments.hidden, arguments.seconds)
    shown = tables(runs)
    if arguments.update is not None:
        arguments.update.write_text(update(arguments.update.read_text(), "end to end", shown))
    elif arguments.markdown:
        print("\n\n".join(f"{rows.title}:\n\n{rows.markdown()}" for rows in shown))
    else:
        for rows in shown:
            rows.print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
