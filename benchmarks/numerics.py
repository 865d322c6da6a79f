"""How far eager and fused results are from the exact value, for every fusion.

::

    python -m benchmarks.numerics                            a table of all fusions
    python -m benchmarks.numerics swiglu rotary_mul          of some
    python -m benchmarks.numerics --markdown                 as Markdown, one table per fusion
    python -m benchmarks.numerics --update docs/fusions.md   put these tables into the document

Each formula below is written once, with the dtypes that it rounds to as parameters. Eager evaluates it in the
model's dtypes, the exact value is the same formula on the same inputs in float64, and the fused result comes
out of ``torch.compile`` with the whole pipeline, on the reference kernels: measured is the arithmetic of the
operators, not the order in which a fast kernel sums. The script fails unless exactly the fusion that is
measured was made.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import npu_fusion
from npu_fusion.passes.pattern import FUSIONS

TOKENS, HIDDEN = 256, 2048
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ALL = tuple(SHORT)
NARROW = (torch.bfloat16, torch.float16)
EPSILON = 1e-6

Outputs = dict[str, Tensor]
"""``y``: the result; ``scale``: of each token; ``step``: a given scale, no output; ``sum``: x1 + x2."""
Formula = Callable[..., Outputs]


@dataclass(frozen=True)
class Sizes:
    tokens: int = TOKENS
    hidden: int = HIDDEN


@dataclass(frozen=True)
class Case:
    """One fusion: its source, inputs, and the dtypes in which models have it."""

    formula: Formula
    """``formula(*inputs, narrow, wide)``: the model's dtype, and the one that it widens to in between."""
    inputs: Callable[[Sizes, torch.Generator], list[Tensor]]
    """float32 (taken in the model's dtype) and integers; float64 is what stays float32 in any model."""
    dtypes: Sequence[torch.dtype] = ALL


# -- formulas -----------------------------------------------------------------------------------------------


def normalized(x: Tensor, gamma: Tensor, narrow: torch.dtype, wide: torch.dtype) -> Tensor:
    """As transformers' LlamaRMSNorm: rounded before the weight."""
    h = x.to(wide)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPSILON)
    return gamma * h.to(narrow)


def per_token(h: Tensor, wide: torch.dtype) -> Outputs:
    h = h.to(wide)
    scale = h.abs().amax(-1, keepdim=True) / 127
    return {"y": (h / scale).round().clamp(-128, 127).to(torch.int8), "scale": scale}


def static(h: Tensor, step: Tensor, wide: torch.dtype) -> Outputs:
    return {"y": (h.to(wide) / step).round().clamp(-128, 127).to(torch.int8), "step": step}


def gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def dequantized(
    q: Tensor, weight: Tensor, channel: Tensor, token: Tensor, narrow: torch.dtype, wide: torch.dtype
) -> Tensor:
    return (torch._int_mm(q, weight).to(wide) * channel * token).to(narrow)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rms_norm(x: Tensor, gamma: Tensor, narrow: torch.dtype, wide: torch.dtype) -> Outputs:
    return {"y": normalized(x, gamma, narrow, wide)}


def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, narrow: torch.dtype, wide: torch.dtype) -> Outputs:
    total = x1 + x2
    return {"y": normalized(total, gamma, narrow, wide), "sum": total}


def add_rms_norm_quant(
    x1: Tensor, x2: Tensor, gamma: Tensor, step: Tensor, narrow: torch.dtype, wide: torch.dtype
) -> Outputs:
    total = x1 + x2
    return {**static(normalized(total, gamma, narrow, wide), step, wide), "sum": total}


def add_rms_norm_dynamic_quant(
    x1: Tensor, x2: Tensor, gamma: Tensor, narrow: torch.dtype, wide: torch.dtype
) -> Outputs:
    total = x1 + x2
    return {**per_token(normalized(total, gamma, narrow, wide), wide), "sum": total}


def swiglu(x: Tensor, narrow: torch.dtype, wide: torch.dtype) -> Outputs:
    return {"y": gated(x)}


def swiglu_quant(x: Tensor, narrow: torch.dtype, wide: torch.dtype) -> Outputs:
    return per_token(gated(x), wide)


def dynamic_quant(x: Tensor, narrow: torch.dtype, wide: torch.dtype) -> Outputs:
    return per_token(x, wide)


def quantize(x: Tensor, step: Tensor, narrow: torch.dtype, wide: torch.dtype) -> Outputs:
    return static(x, step, wide)


def quant_matmul(
    q: Tensor, weight: Tensor, channel: Tensor, token: Tensor, narrow: torch.dtype, wide: torch.dtype
) -> Outputs:
    return {"y": dequantized(q, weight, channel, token, narrow, wide)}


def dequant_swiglu_quant(
    q: Tensor, weight: Tensor, channel: Tensor, token: Tensor, narrow: torch.dtype, wide: torch.dtype
) -> Outputs:
    return per_token(gated(dequantized(q, weight, channel, token, narrow, wide)), wide)


def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, narrow: torch.dtype, wide: torch.dtype) -> Outputs:
    return {"y": rotated(x, cos, sin)}


def interleave_rope(x: Tensor, cos: Tensor, sin: Tensor, narrow: torch.dtype, wide: torch.dtype) -> Outputs:
    pairs = x.view(*x.shape[:-1], x.shape[-1] // 2, 2)
    return {"y": rotated(pairs.transpose(-1, -2).reshape(x.shape), cos, sin)}


def mla_absorb(
    query: Tensor,
    turned: Tensor,
    latent: Tensor,
    rotary: Tensor,
    weight: Tensor,
    narrow: torch.dtype,
    wide: torch.dtype,
) -> Outputs:
    """As transformers' DeepSeek: keys and values expanded from the latent of all tokens."""
    heads, width = query.shape[1], query.shape[3]
    both = F.linear(latent, weight).unflatten(-1, (heads, -1)).transpose(1, 2)
    key = torch.cat((both[..., :width], rotary[:, None].expand(-1, heads, -1, -1)), -1)
    scores = torch.cat((query, turned), -1) @ key.transpose(2, 3) * key.shape[-1] ** -0.5
    return {"y": F.softmax(scores, -1, dtype=wide).to(narrow) @ both[..., width:]}


def mla_prolog(
    x: Tensor,
    w_dq: Tensor,
    w_uq: Tensor,
    w_uk: Tensor,
    w_dkv: Tensor,
    g_cq: Tensor,
    g_ckv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    kv_cache: Tensor,
    kr_cache: Tensor,
    narrow: torch.dtype,
    wide: torch.dtype,
) -> Outputs:
    """As transformers' DeepSeek, attention absorbed; of the caches the new rows."""
    plain, latent = w_uk.shape[1:]

    def turned(part: Tensor) -> Tensor:
        even, odd = part[..., 0::2], part[..., 1::2]
        return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)

    q = F.linear(normalized(F.linear(x, w_dq), g_cq, narrow, wide), w_uq).unflatten(-1, (w_uk.shape[0], -1))
    kv = F.linear(x, w_dkv)
    rows = normalized(kv[..., :latent], g_ckv, narrow, wide), turned(kv[:, None, latent:]).squeeze(1)
    kv_cache, kr_cache = (
        cache.index_copy(0, slots, new) for cache, new in zip((kv_cache, kr_cache), rows, strict=True)
    )
    query = torch.einsum("tnd,ndc->tnc", q[..., :plain], w_uk)
    return {
        "query": query,
        "query_rope": turned(q[..., plain:]),
        "kv": kv_cache[slots],
        "kr": kr_cache[slots],
    }


def kv_rmsnorm_rope_cache(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    latents: Tensor,
    keys: Tensor,
    narrow: torch.dtype,
    wide: torch.dtype,
) -> Outputs:
    """Of the caches the new rows: ``y`` of the latents, ``k`` of the keys."""
    kv = F.linear(x, weight)
    y = normalized(kv[..., : gamma.shape[0]], gamma, narrow, wide)
    k = interleave_rope(kv[:, None, :, gamma.shape[0] :], cos, sin, narrow, wide)["y"]
    latents, keys = (t.index_copy(0, slots, new.flatten(0, -2)) for t, new in ((latents, y), (keys, k)))
    return {"y": latents[slots], "k": keys[slots]}


# -- inputs -------------------------------------------------------------------------------------------------


def activations(count: int, sizes: Sizes, g: torch.Generator) -> list[Tensor]:
    """Normally distributed, with a few channels ten times as large, as in the residual stream of a Llama."""
    outliers = torch.ones(sizes.hidden)
    outliers[:: max(1, sizes.hidden // 8)] = 10
    return [torch.randn(sizes.tokens, sizes.hidden, generator=g) * outliers for _ in range(count)]


def weight(sizes: Sizes, g: torch.Generator) -> Tensor:
    return 1 + 0.2 * torch.randn(sizes.hidden, generator=g)


def steps(sizes: Sizes, g: torch.Generator) -> Tensor:
    """Given scales, one per channel, that clip almost nothing; float32 in any model."""
    return (0.5 + torch.rand(sizes.hidden, generator=g)).double() / 16


def matmul(sizes: Sizes, g: torch.Generator, columns: int) -> list[Tensor]:
    """Quantized operands and their float32 scales; the product has a standard deviation of about 1.5."""
    depth = sizes.hidden // 2
    q = torch.randint(-127, 128, (sizes.tokens, depth), generator=g, dtype=torch.int8)
    w = torch.randint(-127, 128, (depth, columns), generator=g, dtype=torch.int8)
    channel = (0.5 + torch.rand(columns, generator=g)) / 74 / depth**0.5
    token = (0.5 + torch.rand(sizes.tokens, 1, generator=g)) / 50
    return [q, w, channel.double(), token.double()]


def heads(sizes: Sizes, g: torch.Generator, width: int) -> list[Tensor]:
    """Queries [1, heads, tokens, width] with the cosines and sines of their positions."""
    x = torch.randn(1, max(2, sizes.hidden // width), sizes.tokens, width, generator=g)
    angles = torch.arange(sizes.tokens)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.cat((angles, angles), -1)[None, None]
    return [x, angles.cos(), angles.sin()]


def latents(sizes: Sizes, g: torch.Generator) -> list[Tensor]:
    """Four queries of eight heads, the normalized latents of all tokens, and the weight that expands them."""
    queries, heads = 4, 8
    rank, width, turned = sizes.hidden // 4, sizes.hidden // 16, sizes.hidden // 32
    return [
        torch.randn(1, heads, queries, width, generator=g),
        torch.randn(1, heads, queries, turned, generator=g),
        torch.randn(1, sizes.tokens, rank, generator=g),
        torch.randn(1, sizes.tokens, turned, generator=g),
        torch.randn(heads * 2 * width, rank, generator=g) / rank**0.5,
    ]


def prolog(sizes: Sizes, g: torch.Generator) -> list[Tensor]:
    """The sizes of DeepSeek-V3 where ``hidden`` is 2048: He 7168, Hcq 1536, N 128, D 128, Dr 64, Hckv 512."""
    unit = sizes.hidden // 32
    tokens, hidden, rank = max(2, sizes.tokens // 8), 112 * unit, 24 * unit
    heads, plain, turned, latent = 2 * unit, 2 * unit, unit, 8 * unit

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

    def gamma(size: int) -> Tensor:
        return 1 + 0.2 * torch.randn(size, generator=g)

    angles = torch.arange(tokens)[:, None] * 10_000.0 ** (-torch.arange(0, turned, 2) / turned)
    rows = 16 * tokens
    return [
        torch.randn(tokens, hidden, generator=g),
        matrix(rank, hidden),
        matrix(heads * (plain + turned), rank),
        matrix(heads, plain, latent),
        matrix(latent + turned, hidden),
        gamma(rank),
        gamma(latent),
        angles.cos()[:, None],
        angles.sin()[:, None],
        torch.randperm(rows, generator=g)[:tokens],
        torch.randn(rows, latent, generator=g),
        torch.randn(rows, turned, generator=g),
    ]


def keys(sizes: Sizes, g: torch.Generator) -> list[Tensor]:
    """The sizes of DeepSeek-V3 where ``hidden`` is 2048: latents of 512, keys of 64."""
    rank, turned, rows = sizes.hidden // 4, sizes.hidden // 32, 2 * sizes.tokens
    _, cos, sin = heads(sizes, g, turned)
    return [
        torch.randn(1, sizes.tokens, sizes.hidden, generator=g),
        torch.eye(rank + turned, sizes.hidden),  # rounds nothing: what is measured comes after it
        1 + 0.2 * torch.randn(rank, generator=g),
        cos,
        sin,
        torch.randperm(rows, generator=g)[: sizes.tokens],
        torch.zeros(rows, rank),
        torch.zeros(rows, turned),
    ]


CASES: dict[str, Case] = {
    "rms_norm": Case(rms_norm, lambda s, g: [*activations(1, s, g), weight(s, g)]),
    "add_rms_norm": Case(add_rms_norm, lambda s, g: [*activations(2, s, g), weight(s, g)]),
    "add_rms_norm_quant": Case(
        add_rms_norm_quant, lambda s, g: [*activations(2, s, g), weight(s, g), steps(s, g)]
    ),
    "add_rms_norm_dynamic_quant": Case(
        add_rms_norm_dynamic_quant, lambda s, g: [*activations(2, s, g), weight(s, g)], NARROW
    ),
    "swiglu": Case(swiglu, lambda s, g: [2 * torch.randn(s.tokens, 2 * s.hidden, generator=g)]),
    "swiglu_quant": Case(swiglu_quant, lambda s, g: [2 * torch.randn(s.tokens, 2 * s.hidden, generator=g)]),
    "dynamic_quant": Case(dynamic_quant, lambda s, g: activations(1, s, g)),
    "quantize": Case(quantize, lambda s, g: [torch.randn(s.tokens, s.hidden, generator=g), steps(s, g)]),
    "quant_matmul": Case(quant_matmul, lambda s, g: matmul(s, g, s.hidden), NARROW),
    "rotary_mul": Case(rotary_mul, lambda s, g: heads(s, g, 128)),
    "interleave_rope": Case(interleave_rope, lambda s, g: heads(s, g, 64)),
    "dequant_swiglu_quant": Case(dequant_swiglu_quant, lambda s, g: matmul(s, g, 2 * s.hidden)),
    "mla_absorb": Case(mla_absorb, latents),
    "mla_prolog": Case(mla_prolog, prolog),
    "kv_rmsnorm_rope_cache": Case(kv_rmsnorm_rope_cache, keys),
}


# -- measuring ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One output of one fusion in one dtype."""

    fusion: str
    source: str
    """dtype of the model."""
    level: str
    """Numerics level that the report states."""
    output: str
    eager: str
    """Distance from the exact value."""
    fused: str
    same: float
    """Part of the elements in which the fused result is eager's, bit by bit."""


def measure(fusion: str, dtype: torch.dtype, sizes: Sizes) -> Iterator[Row]:
    """Rows for every output of ``fusion`` on a source in ``dtype``."""
    case = CASES[fusion]
    given = case.inputs(sizes, torch.Generator().manual_seed(0))
    inputs = [_rounded(t, dtype) for t in given]

    def source(*args: Tensor) -> Outputs:
        return case.formula(*args, narrow=dtype, wide=torch.float32)

    config = {"strict": True, "numerics": "relaxed"}
    backend = npu_fusion.get_npu_backend(fusion_config=config, host="eager")
    torch._dynamo.reset()
    with torch.no_grad():
        eager = source(*inputs)
        fused = torch.compile(source, backend=backend, fullgraph=True, dynamic=False)(*inputs)
        doubles = [t.double() if t.is_floating_point() else t for t in inputs]
        exact = case.formula(*doubles, narrow=torch.float64, wide=torch.float64)
    (report,) = backend.reports
    operator = FUSIONS[fusion].operator or fusion
    if report.fused != {operator: 1}:
        raise RuntimeError(f"{fusion} ({SHORT[dtype]}): expected {operator}\n{report.text()}")
    for name in exact:
        if name != "step":
            same = float((eager[name] == fused[name]).double().mean())
            errors = [_error(name, result, exact) for result in (eager, fused)]
            yield Row(fusion, SHORT[dtype], report.fusions[0].level, name, *errors, same)


def _rounded(given: Tensor, dtype: torch.dtype) -> Tensor:
    if not given.is_floating_point():
        return given
    return given.float() if given.dtype == torch.float64 else given.to(dtype)


def _error(name: str, result: Outputs, exact: Outputs) -> str:
    """What an output is off by, in words that fit what it is."""
    value, true = result[name].double(), exact[name].double()
    if name == "scale":
        return f"max {_short(float(((value - true) / true).abs().max()))}"
    distance = (value - true).abs()
    if exact[name].dtype != torch.int8:
        largest = float(true.abs().max())
        return f"max {_short(float(distance.max()) / largest)}, rms {_short(_rms(distance) / largest)}"
    equal = f"{percent(float((distance == 0).double().mean()))} equal, max {int(distance.max())}"
    meant, truly = _dequantized(result), _dequantized(exact)
    return f"{equal}, rms {_short(_rms(meant - truly) / float(truly.abs().max()))}"


def _short(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def percent(part: float) -> str:
    """Two digits, but never 100 % where an element differs."""
    return "all" if part == 1 else f"{min(part, 0.9999):.2%}"


def _dequantized(outputs: Outputs) -> Tensor:
    """What quantized outputs stand for."""
    scale = outputs["scale"] if "scale" in outputs else outputs["step"]
    return outputs["y"].double() * scale.double()


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def measure_all(fusions: Sequence[str], sizes: Sizes) -> list[Row]:
    with npu_fusion.kernels.use("reference"):
        return [
            row for name in fusions for dtype in CASES[name].dtypes for row in measure(name, dtype, sizes)
        ]


# -- showing ------------------------------------------------------------------------------------------------

EXPLANATION = """\
Distance from the formula in float64. Floats: largest and rms error over the largest value. int8: elements
equal to the exact ones, largest difference, and rms error of value times scale over the largest. Scales:
largest relative error."""


def table(rows: Sequence[Row], sizes: Sizes) -> Table:
    shown = Table(title=f"{sizes.tokens} tokens, hidden size {sizes.hidden}", caption=EXPLANATION)
    for heading in ("fusion", "source", "level", "output", "eager", "fused", "fused = eager"):
        shown.add_column(heading, no_wrap=heading != "fusion", overflow="fold")
    previous = None
    for row in rows:
        if previous is not None and row.fusion != previous:
            shown.add_section()
        first = "" if row.fusion == previous else row.fusion
        previous = row.fusion
        shown.add_row(first, row.source, row.level, row.output, row.eager, row.fused, percent(row.same))
    return shown


def markdown(rows: Sequence[Row]) -> str:
    """The table of one fusion."""
    lines = ["| source | level | output | eager | fused | fused = eager |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (row.source, row.level, row.output, row.eager, row.fused, percent(row.same))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def update(document: str, rows: Sequence[Row]) -> str:
    """``document`` with the table of each fusion in ``rows`` between its markers.

    ::

        <!-- numerics: swiglu -->
        <!-- end -->
    """
    for fusion in dict.fromkeys(row.fusion for row in rows):
        begin, end = f"<!-- numerics: {fusion} -->", "<!-- end -->"
        content = markdown([row for row in rows if row.fusion == fusion])
        marked = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if marked.search(document) is None:
            raise ValueError(f"the document has no {begin!r} ... {end!r}")
        document = marked.sub(f"{begin}\n{content}\n{end}", document)
    return document


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics", description=EXPLANATION)
    parser.add_argument(
        "fusions", nargs="*", metavar="FUSION", help=f"one of {', '.join(CASES)}; default: all"
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"default: {TOKENS}")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help=f"default: {HIDDEN}")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--markdown", action="store_true", help="print Markdown, one table per fusion")
    how.add_argument("--update", type=Path, metavar="FILE", help="replace the marked tables of this document")
    arguments = parser.parse_args(argv)
    for name in arguments.fusions:
        if name not in CASES:
            parser.error(f"FUSION is {name!r}; accepted: {', '.join(CASES)}")
    torch.set_num_threads(1)  # the same sums on every machine
    sizes = Sizes(arguments.tokens, arguments.hidden)
    rows = measure_all(arguments.fusions or list(CASES), sizes)
    if arguments.update is not None:
        arguments.update.write_text(update(arguments.update.read_text(), rows))
    elif arguments.markdown:
        for fusion in dict.fromkeys(row.fusion for row in rows):
            print(f"{fusion}:\n\n{markdown([row for row in rows if row.fusion == fusion])}\n")
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(table(rows, sizes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
