"""A W8A8 MLP's middle (int32 product to int8) in every way that a model spells it, one choice at a time.

:class:`Spelling` names a choice for every step; :meth:`Spelling.function` is the PyTorch code with these
choices, :meth:`Spelling.inputs` what it is called with, :meth:`Spelling.oracle` the exact result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.out_dtype import out_dtype
from torch.nn import functional as F

npu = torch.ops.npu

TOKENS, DEPTH, WIDTH = 32, 48, 64
"""Rows, inner size and 2H of the product. ``_int_mm`` wants more than 16 rows and multiples of 8."""


def _int_mm(q: Tensor, w: Tensor) -> Tensor:
    return torch._int_mm(q, w)


def _mm_of_int32(q: Tensor, w: Tensor) -> Tensor:
    return q.int() @ w.int()


def _out_dtype(q: Tensor, w: Tensor) -> Tensor:
    return out_dtype(torch.ops.aten.mm.default, torch.int32, q, w)


def _quant_matmul(q: Tensor, w: Tensor) -> Tensor:
    return npu.npu_quant_matmul(q, w, torch.ones(w.shape[1]), output_dtype=torch.int32)


PRODUCTS = {"int_mm": _int_mm, "mm": _mm_of_int32, "out_dtype": _out_dtype, "quant_matmul": _quant_matmul}


DEQUANTIZED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "channel then token": lambda p, ws, ts: p.float() * ws * ts,
    "token then channel": lambda p, ws, ts: p.float() * ts * ws,
    "premultiplied": lambda p, ws, ts: p.float() * (ws * ts),
    "premultiplied first": lambda p, ws, ts: (ts * ws) * p.float(),
    "no cast node": lambda p, ws, ts: ts * (ws * p),
    "channel viewed": lambda p, ws, ts: p.to(torch.float32) * ws.view(1, -1) * ts,
    "channel expanded": lambda p, ws, ts: p.float() * ws.expand_as(p) * ts,
    "token expanded": lambda p, ws, ts: p.float() * ws * ts.expand_as(p),
    "times one": lambda p, ws, ts: (p.float() + 0.0) * ws * 1.0 * ts / 1.0,
}

HALVES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "chunk": lambda d: d.chunk(2, -1),
    "split": lambda d: d.split(d.shape[-1] // 2, -1),
    "split_with_sizes": lambda d: torch.split(d, [d.shape[-1] // 2, d.shape[-1] // 2], dim=-1),
    "slices": lambda d: (d[..., : d.shape[-1] // 2], d[..., d.shape[-1] // 2 :]),
    "narrow": lambda d: (
        d.narrow(-1, 0, d.shape[-1] // 2),
        d.narrow(-1, d.shape[-1] // 2, d.shape[-1] // 2),
    ),
    "unflatten and unbind": lambda d: d.unflatten(-1, (2, -1)).unbind(-2),
    "unflatten and select": lambda d: (
        d.unflatten(-1, (2, -1))[..., 0, :],
        d.unflatten(-1, (2, -1))[..., 1, :],
    ),
    "tensor_split": lambda d: d.tensor_split(2, -1),
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "x * sigmoid(x)": lambda x: x * torch.sigmoid(x),
    "sigmoid(x) * x": lambda x: torch.sigmoid(x) * x,
    "x / (1 + exp(-x))": lambda x: x / (1 + torch.exp(-x)),
    "x * (1 / (1 + exp(-x)))": lambda x: x * (1 / (torch.exp(-x) + 1)),
}

MAXIMA: dict[str, Callable[[Tensor], Tensor]] = {
    "amax of abs": lambda h: h.abs().amax(-1, keepdim=True),
    "amax of abs, unsqueezed": lambda h: h.abs().amax(dim=-1).unsqueeze(-1),
    "max of abs": lambda h: h.abs().max(dim=-1, keepdim=True).values,
    "max of abs, unsqueezed": lambda h: torch.max(torch.abs(h), -1)[0][..., None],
    "amin and amax": lambda h: torch.maximum(-h.amin(-1, keepdim=True), h.amax(-1, keepdim=True)),
    "amax and amin": lambda h: torch.maximum(h.amax(-1, keepdim=True), h.amin(-1, keepdim=True).neg()),
    "amin and amax of zero too": lambda h: torch.maximum(
        -torch.minimum(h.amin(-1), torch.zeros_like(h[..., 0])),
        torch.maximum(h.amax(-1), torch.zeros_like(h[..., 0])),
    ).unsqueeze(-1),
    "aminmax": lambda h: torch.maximum(*_negated_first(*torch.aminmax(h, dim=-1, keepdim=True))),
    "aminmax, unsqueezed": lambda h: torch.maximum(*_negated_first(*torch.aminmax(h, dim=-1))).unsqueeze(-1),
    "norm": lambda h: torch.linalg.vector_norm(h, math.inf, dim=-1, keepdim=True),
}


def _negated_first(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return -low, high


GUARDS_OF_MAXIMUM: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda m: m,
    "clamp_min": lambda m: m.clamp(min=1e-5),
    "maximum": lambda m: torch.maximum(m, torch.full_like(m, 1e-6)),
    "where": lambda m: torch.where(m == 0, 1.0, m),
}

SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "m / 127": lambda m: m / 127,
    "m / 127.0": lambda m: m / 127.0,
    "m * (1 / 127)": lambda m: m * (1 / 127),
    "m / tensor": lambda m: m / torch.tensor(127.0),
}

GUARDS_OF_SCALE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda s: s,
    "clamp_min": lambda s: torch.clamp_min(s, 1e-7),
    "where": lambda s: torch.where(s == 0, torch.ones_like(s), s),
    "where not": lambda s: torch.where(s != 0, s, 1.0),
}

QUOTIENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "x / s": lambda h, s, m: h / s,
    "x * (1 / s)": lambda h, s, m: h * (1.0 / s),
    "x * reciprocal(s)": lambda h, s, m: s.reciprocal() * h,
    "x * 127 / m": lambda h, s, m: h * 127.0 / m,
    "x / m * 127": lambda h, s, m: h / m * 127.0,
    "x * (127 / m)": lambda h, s, m: h * (127.0 / m),
    "x * (127 * (1 / m))": lambda h, s, m: h * (m.reciprocal() * 127),
}

ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "round, clamp": lambda v: v.round().clamp(-128, 127),
    "clamp, round": lambda v: v.clamp(-128, 127).round(),
    "round, symmetric clamp": lambda v: torch.clamp(torch.round(v), -127, 127),
    "minimum and maximum": lambda v: torch.maximum(
        torch.minimum(v.round(), torch.tensor(127.0)), torch.tensor(-128.0)
    ),
    "clamp_min and clamp_max": lambda v: v.round().clamp_min(-128).clamp_max(127),
    "clamp_max and clamp_min": lambda v: v.clamp_max(127.0).clamp_min(-128.0).round(),
    "clamp by tensors": lambda v: v.round().clamp(torch.tensor(-128.0), torch.tensor(127.0)),
    "clamp twice": lambda v: v.clamp(-128, 127).round().clamp(-128, 127),
    "no clamp": lambda v: v.round(),
}

STATIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x / scalar tensor": lambda h, s: h / s[0],
    "x / literal": lambda h, s: h / 0.03125,
    "x * literal": lambda h, s: h * 32.0,
    "x / vector": lambda h, s: h / s,
    "x * vector": lambda h, s: h * s.reciprocal(),
    "x / one-element vector": lambda h, s: h / s[:1],
    "x / scalar + literal": lambda h, s: h / s[0] + 3.0,
    "x / vector + vector": lambda h, s: h / s + torch.round(s * 64),
    "x / vector + scalar tensor": lambda h, s: h / s + torch.round(s[0] * 64),
    "x / scalar + vector": lambda h, s: torch.round(s * 64) + h / s[0],
    "x * literal + literal": lambda h, s: h * 32.0 - 5,
}

ROUNDINGS = ("dequantized", "activated", "gated", "smoothed", "maximum", "scale", "quotient")
"""Steps after which a 16-bit model rounds."""


@dataclasses.dataclass(frozen=True)
class Spelling:
    product: str = "int_mm"
    dequantized: str = "channel then token"
    halves: str = "chunk"
    activation: str = "silu"
    left: bool = True
    gate_first: bool = True
    maximum: str = "amax of abs"
    maximum_guard: str = "none"
    scale: str = "m / 127"
    scale_guard: str = "none"
    quotient: str = "x / s"
    rounded: str = "round, clamp"
    bias: str = "none"
    """none, int32, float32 or bfloat16."""
    smooth: bool = False
    static: str | None = None
    """A key of STATIC, or None for a scale per token."""
    rank: int = 2
    roundings: frozenset[str] = frozenset()
    """After which of ROUNDINGS the value is rounded to bfloat16."""
    bfloat16_tail: bool = False
    """Stay in bfloat16 from the first rounding on, instead of widening again."""
    channel_dtype: torch.dtype = torch.float32

    @property
    def exact(self) -> bool:
        """Whether this is the operator's own arithmetic in its own order (and Inductor leaves silu alone)."""
        exact = {
            "dequantized": (
                "channel then token",
                "no cast node",
                "channel viewed",
                "channel expanded",
                "token expanded",
                "times one",
            ),
            "activation": ("silu",),
            "maximum_guard": ("none",),
            "scale_guard": ("none",),
            "scale": ("m / 127", "m / 127.0", "m / tensor"),
            "quotient": ("x / s",),
            "static": (None, *(s for s in STATIC if s.startswith("x /"))),
        }
        return not self.roundings and all(getattr(self, name) in values for name, values in exact.items())

    def function(self) -> Callable[..., Any]:
        """``(q, w, channel scale, token scale, bias, smooth, static scale) -> (y, scale)`` or ``(y,)``."""

        def rounded(step: str, value: Tensor) -> Tensor:
            if step not in self.roundings:
                return value
            value = value.to(torch.bfloat16)
            return value if self.bfloat16_tail else value.float()

        def middle(
            q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, bias: Tensor, smooth: Tensor, static: Tensor
        ) -> tuple[Tensor, ...]:
            lead = q.shape[:-1]
            product = PRODUCTS[self.product](q.reshape(-1, q.shape[-1]), w)
            if self.rank == 3:
                product = product.view(*lead, product.shape[-1])
            if self.bias == "int32":
                product = product + bias
            d = DEQUANTIZED[self.dequantized](product, ws, ts)
            if self.bias in ("float32", "bfloat16"):
                d = d + bias
            d = rounded("dequantized", d)
            first, second = HALVES[self.halves](d)
            act, up = (first, second) if self.left else (second, first)
            act = rounded("activated", ACTIVATIONS[self.activation](act))
            h = rounded("gated", act * up if self.gate_first else up * act)
            if self.smooth:
                h = rounded("smoothed", h * smooth)
            if self.static is not None:
                return (ROUNDED[self.rounded](STATIC[self.static](h, static)).to(torch.int8),)
            m = GUARDS_OF_MAXIMUM[self.maximum_guard](rounded("maximum", MAXIMA[self.maximum](h)))
            scale = GUARDS_OF_SCALE[self.scale_guard](rounded("scale", SCALES[self.scale](m)))
            quotient = rounded("quotient", QUOTIENTS[self.quotient](h, scale, m))
            return ROUNDED[self.rounded](quotient).to(torch.int8), scale.float()

        return middle

    def inputs(self, seed: int = 0, tokens: int = TOKENS) -> list[Tensor]:
        """Values whose products stay where SwiGLU is neither linear nor zero."""
        g = torch.Generator().manual_seed(seed)
        lead = (tokens,) if self.rank == 2 else (2, tokens // 2)
        q = torch.randint(-127, 128, (*lead, DEPTH), generator=g, dtype=torch.int8)
        w = torch.randint(-127, 128, (DEPTH, WIDTH), generator=g, dtype=torch.int8)
        ws = (torch.rand(WIDTH, generator=g) + 0.5) * 1e-3
        ts = (torch.rand(*lead, 1, generator=g) + 0.5) * 0.05
        bias = torch.randn(WIDTH, generator=g)
        if self.bias == "int32":
            bias = (bias * 3e4).int()
        elif self.bias == "bfloat16":
            bias = bias.bfloat16()
        smooth = torch.rand(WIDTH // 2, generator=g) + 0.5
        static = (torch.rand(WIDTH // 2, generator=g) + 0.5) / 16
        return [q, w, ws.to(self.channel_dtype), ts, bias, smooth, static]

    def oracle(self, args: list[Tensor]) -> Tensor:
        """What is quantized, in float64."""
        q, w, ws, ts, bias, smooth, _ = args
        p = q.double() @ w.double()
        if self.bias == "int32":
            p = p + bias
        d = p * ws.double() * ts.double()
        if self.bias in ("float32", "bfloat16"):
            d = d + bias.double()
        first, second = d.chunk(2, -1)
        act, up = (first, second) if self.left else (second, first)
        h = F.silu(act) * up
        return h * smooth.double() if self.smooth else h


def error(result: tuple[Tensor, ...], spelling: Spelling, args: list[Tensor]) -> float:
    """Mean distance of what the int8 values stand for from the exact value, in steps of the quantization."""
    exact = spelling.oracle(args)
    if spelling.static is not None:
        steps = STATIC[spelling.static](exact, args[-1].double()).clamp(-128, 127)
        return float((result[0].double() - steps).abs().mean())
    y, scale = result
    step = exact.abs().amax(-1, keepdim=True) / 127
    return float(((y.double() * scale.double().reshape(step.shape) - exact) / step).abs().mean())


def one_by_one() -> list[Spelling]:
    """Every choice once, everything else plain."""
    tables: dict[str, Any] = {
        "product": PRODUCTS,
        "dequantized": DEQUANTIZED,
        "halves": HALVES,
        "activation": ACTIVATIONS,
        "left": (False,),
        "gate_first": (False,),
        "maximum": MAXIMA,
        "maximum_guard": GUARDS_OF_MAXIMUM,
        "scale": SCALES,
        "scale_guard": GUARDS_OF_SCALE,
        "quotient": QUOTIENTS,
        "rounded": ROUNDED,
        "bias": ("int32", "float32", "bfloat16"),
        "smooth": (True,),
        "rank": (3,),
        "channel_dtype": (torch.bfloat16,),
        "static": STATIC,
    }
    plain = Spelling()
    found = [
        dataclasses.replace(plain, **{name: value}) for name, values in tables.items() for value in values
    ]
    for static in STATIC:
        found.append(dataclasses.replace(plain, static=static, rank=3, left=False))
    for step in ROUNDINGS:
        for tail in (False, True):
            found.append(
                dataclasses.replace(plain, roundings=frozenset({step}), smooth=True, bfloat16_tail=tail)
            )
    found.append(
        dataclasses.replace(plain, roundings=frozenset(ROUNDINGS), smooth=True, bfloat16_tail=True, rank=3)
    )
    return list(dict.fromkeys(found))


def described(spelling: Spelling) -> str:
    """What differs from the plain spelling, for a test's name."""
    plain = Spelling()
    parts = []
    for f in dataclasses.fields(spelling):
        value = getattr(spelling, f.name)
        if value != getattr(plain, f.name):
            shown = "+".join(sorted(value)) if isinstance(value, frozenset) else value
            parts.append(f"{f.name}={shown}")
    return ", ".join(parts) or "plain"
