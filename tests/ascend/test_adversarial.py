"""Whole layers, int8 products at odd sizes, scopes and options through the real torchair: eager's results,
and no fusion over the borders of a scope."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchair
from torch import Tensor, nn

import npu_fusion
from npu_fusion.report import FusionReport
from tests.ascend._lowering import assert_near, lower

HEADS, WIDTH = 4, 16
HIDDEN = HEADS * WIDTH


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    """One decoder layer in spellings that ``seed`` chooses."""

    int8: Tensor
    scale: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        choose = random.Random(seed)
        self.how = {
            "norm": choose.choice(("operator", "cast, then weight", "all in float32")),
            "rope": choose.choice(("halves", "pairs", "none")),
            "swapped": choose.choice((False, True)),
            "int8": choose.choice((False, True)),
            "cache": choose.choice((False, True)),
        }
        self.epsilon = choose.choice((1e-6, 1e-5))
        self.dtype = choose.choice((torch.float32, torch.bfloat16, torch.float16))
        torch.manual_seed(seed)
        self.norms = nn.ParameterList((1 + 0.1 * torch.randn(HIDDEN)).to(self.dtype) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=self.dtype) for _ in range(4))
        self.gate_up = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False, dtype=self.dtype)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False, dtype=self.dtype)
        self.register_buffer("int8", torch.randint(-127, 128, (HIDDEN, 4 * HIDDEN)).to(torch.int8))
        self.register_buffer("scale", torch.rand(4 * HIDDEN) * 2e-3)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.how["norm"] == "operator":
            return F.rms_norm(x, (HIDDEN,), weight, self.epsilon)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        if self.how["norm"] == "cast, then weight":
            return weight * wide.to(x.dtype)
        return (wide * weight.float()).to(x.dtype)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.how["rope"] == "none":
            return x
        if self.how["rope"] == "halves":
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin
        even, odd = x[..., 0::2], x[..., 1::2]
        cos, sin = cos[..., : WIDTH // 2], sin[..., : WIDTH // 2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)

    def gated(self, x: Tensor) -> Tensor:
        if self.how["int8"]:
            rows = x.reshape(-1, HIDDEN).float()
            scale = rows.abs().max(dim=-1, keepdim=True)[0] / 127
            product = torch._int_mm(torch.round(rows / scale).clamp(-128, 127).to(torch.int8), self.int8)
            both = (product.float() * self.scale * scale).to(x.dtype).view(*x.shape[:-1], -1)
        else:
            both = self.gate_up(x)
        gate, up = both.chunk(2, -1)
        return up * F.silu(gate) if self.how["swapped"] else F.silu(gate) * up

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        normed = self.norm(x, self.norms[0])
        q, k, v = (f(normed).view(batch, length, HEADS, WIDTH).transpose(1, 2) for f in self.qkv[:3])
        q, k = self.rotated(q, cos, sin), self.rotated(k, cos, sin)
        if self.how["cache"]:
            cache.copy_(k)
        scores = (q @ k.transpose(-1, -2)).float() * WIDTH**-0.5
        attended = torch.softmax(scores, -1).to(x.dtype) @ v
        x = x + self.qkv[3](attended.transpose(1, 2).reshape(batch, length, HIDDEN))
        normed = self.norm(x, self.norms[1])
        return x + self.down(self.gated(normed)), normed


@pytest.mark.parametrize("seed", range(6))
def test_layers_in_random_spellings(seed: int) -> None:
    layer = Layer(seed)
    dtype, generator = layer.dtype, torch.Generator().manual_seed(seed)
    angles = torch.randn(1, 1, 3, WIDTH, generator=generator)
    x = torch.randn(2, 3, HIDDEN, generator=generator).to(dtype)
    cache = torch.zeros(2, HEADS, 3, WIDTH, dtype=dtype)
    args = [x, angles.cos().to(dtype), angles.sin().to(dtype), cache]
    eager = [a.clone() for a in args]
    with torch.no_grad():
        layer(*eager)
    got = lower(layer, args, dynamic=seed % 2 == 1)
    assert got.fused
    assert_near(got, tolerance=0.1)
    torch.testing.assert_close(cache, eager[3], rtol=2e-2, atol=2e-2)


def _plain(q: Tensor, w: Tensor) -> Tensor:
    return torch._int_mm(q, w)


def _widened(q: Tensor, w: Tensor) -> Tensor:
    return q.int() @ w.int()


def _twice(q: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return torch._int_mm(q, w) + 1, torch._int_mm(q, w).float() * 0.5


def _written(q: Tensor, w: Tensor) -> Tensor:
    product = torch._int_mm(q, w)
    product.add_(1)
    return product


@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
@pytest.mark.parametrize("product", [_plain, _widened, _twice, _written])
def test_int8_products_at_odd_sizes(product: Callable[..., Any], mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for k, n in ((32, 16), (7, 6)):
        torch._dynamo.reset()
        w = torch.randint(-128, 128, (k, n), generator=generator).to(torch.int8)
        torch._dynamo.mark_static(w)
        reports, run = _compiled(product, mode, dynamic=True)
        for rows in (5, 17, 1, 0):
            q = torch.randint(-128, 128, (rows, k), generator=generator).to(torch.int8)
            torch._dynamo.mark_static(q, 1)
            torch.testing.assert_close(run(q, w), product(q, w), rtol=0, atol=0)
        assert {str(r.fused) for r in reports} == {"{'npu_quant_matmul': 1}"}


def _compiled(
    fn: Callable[..., Any], mode: str, dynamic: bool | None = None
) -> tuple[list[FusionReport], Callable[..., Any]]:
    config = torchair.CompilerConfig()
    config.mode = mode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the mode's name
        backend = npu_fusion.get_npu_backend(config, {"strict": True})
        compiled = torch.compile(fn, backend=backend, dynamic=dynamic)

    def run(*args: Tensor) -> Any:
        with torch.no_grad():
            return compiled(*args)

    return backend.reports, run


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _two_super_kernels(x: Tensor) -> Tensor:
    with torchair.scope.super_kernel("mlp", ""):
        y = _swiglu(x)
    with torchair.scope.super_kernel("mlp", ""):
        z = _swiglu(x + 1)
    return y + z


def _one_value_in_two_super_kernels(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    with torchair.scope.super_kernel("mlp", ""):
        gate = F.silu(gate)
    with torchair.scope.super_kernel("mlp", ""):
        return gate * up


def _nested(x: Tensor) -> Tensor:
    with torchair.scope.npu_stream_switch("1"):
        with torchair.scope.limit_core_num(4, 4):
            gate, up = x.chunk(2, -1)
            gate = F.silu(gate)
        return gate * up


def _two_streams(x: Tensor) -> Tensor:
    with torchair.scope.npu_stream_switch("1"):
        y = _swiglu(x)
    with torchair.scope.npu_stream_switch("2"):
        z = _swiglu(x + 1)
    return y + z


@pytest.mark.parametrize(
    ("fn", "count"),
    [(_two_super_kernels, 2), (_one_value_in_two_super_kernels, 0), (_nested, 0), (_two_streams, 2)],
)
def test_scopes_of_torchair(fn: Callable[..., Any], count: int) -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    reports, run = _compiled(fn, "max-autotune")
    torch.testing.assert_close(run(x), fn(x))
    assert [r.fused.get("npu_swiglu", 0) for r in reports] == [count]


@pytest.mark.parametrize(
    "option", ["keep_inference_input_mutations", "remove_noop_ops", "pattern_fusion_pass"]
)
@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
def test_options_of_torchair_switched_off(mode: str, option: str) -> None:
    """What is written to inputs and buffers is written whatever torchair's own passes do."""

    class Writes(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16))
            self.register_buffer("seen", torch.zeros(4, 16))

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            normed = F.rms_norm(x + residual, (16,), self.weight, 1e-6)
            self.seen.copy_(normed)
            residual.add_(x)
            return _swiglu(normed)

    config = torchair.CompilerConfig()
    config.mode = mode
    setattr(config.experimental_config, option, False)
    backend = npu_fusion.get_npu_backend(config, {"strict": True})
    compiled, eager = Writes(), Writes()
    x, residual = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    written = residual.clone()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(compiled, backend=backend)(x, residual), eager(x, written))
    torch.testing.assert_close((residual, compiled.seen), (written, eager.seen))
    assert [r.fused for r in backend.reports] == [{"npu_swiglu": 1, "npu_add_rms_norm": 1}]
