"""Graphs that once fused wrongly, or made a pass fail. Each must give what eager gives, fused or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from tests.passes._harness import DIALECTS, fuse

Tensors = Sequence[torch.Tensor]


def rms(x: torch.Tensor, gamma: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gamma


def root(x: torch.Tensor, eps: object = 1e-6) -> torch.Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def quantize(y: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    return torch.clamp(torch.round(y / scale), -128, 127).to(torch.int8)


def per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale).clamp(-128, 127).to(torch.int8), scale


def cycle(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, ...]:
    first = a + b
    from_first = first.sum(0)
    second = c + d
    return first, second, rms(first, second.sum(0)), rms(second, from_first)


def outer(y: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    evens, also_evens = y[..., ::2], y.view(3, 1, 4, 2)[..., 0]
    return also_evens * root(evens) * gamma


def two_roots(x: torch.Tensor, gamma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rms(x, gamma), x * root(x, torch.full((4, 1, 1), 1e-6)) * gamma


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


CASES: dict[str, tuple[Callable[..., object], Tensors]] = {
    "layout read behind a view": (lambda x, g: rms(x, g).t().as_strided((32,), (1,)), [r(8, 4).t(), r(8)]),
    "layout read as complex": (
        lambda x, g: torch.view_as_complex(rms(x, g).transpose(-1, -2)),
        [r(3, 8, 2).transpose(-1, -2), r(8)],
    ),
    "constant rounded by its integer dtype": (
        lambda x, g: x * root(x, torch.full((1,), 1.7).to(torch.int32)) * g,
        [r(4, 8), r(8)],
    ),
    "constant rounded to bf16": (
        lambda x, g: x * root(x, torch.full((), 0.1, dtype=torch.bfloat16)) * g,
        [r(4, 8), r(8)],
    ),
    "rows copied transposed": (
        lambda x, g: (x, rms(x.t().clone(memory_format=torch.contiguous_format).t(), g)),
        [r(37, 301), r(301)],
    ),
    "fusions that need each other's order": (cycle, [r(4, 8), r(4, 8) + 1, r(4, 8) - 1, r(4, 8) * 2]),
    "weight expanded over more rows": (lambda x, g: x * root(x) * g.expand(4, 3, 8), [r(1, 3, 8), r(8)]),
    "root expanded over more rows": (lambda x, g: (x * root(x).expand(4, 3, 1)) * g, [r(1, 3, 8), r(8)]),
    "weight of a sum expanded": (lambda a, b, g: rms(a + b, g.expand(3, 4, 8)), [r(4, 8), r(4, 8), r(8)]),
    "scale expanded over more rows": (
        lambda a, b, g, s: quantize(rms(a + b, g), s.expand(3, 4, 8)),
        [r(4, 8), r(4, 8), r(8), r(8).abs() + 0.1],
    ),
    "ones that broadcast": (lambda x, g: rms(x, g) * torch.ones(4, 1, 1), [r(1, 3, 8), r(8)]),
    "epsilon that broadcasts": (two_roots, [r(1, 3, 8), r(8)]),
    "strided parts of other shapes": (outer, [r(1, 3, 8), r(4)]),
    "scale stored as a column": (
        lambda a, b, g, s: quantize(rms(a + b, g), s.view(-1)),
        [r(4, 8), r(4, 8), r(8), r(8, 1).abs() + 0.1],
    ),
    "empty last dimension": (rms, [r(4, 0), r(0)]),
    "sum of two numbers": (lambda a, b: a.sum() + b.sum(), [r(3, 4), r(3, 4)]),
    "product of two numbers in bf16": (
        lambda a, b: (a.mean() * b.mean()).bfloat16(),
        [r(3, 4), r(3, 4)],
    ),
    "product plus a number": (
        lambda q, s: ((torch._int_mm(q, q) + 5).float() * s).bfloat16(),
        [torch.arange(-512, 512).view(32, 32).remainder(128).to(torch.int8), r(32).abs()],
    ),
    "one-dimensional rows": (per_token, [r(8)]),
    "a number quantized": (quantize, [r(4).sum(), r(3).sum().abs()]),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", CASES)
def test_the_result_is_that_of_eager(name: str, dialect: str) -> None:
    fn, args = CASES[name]
    outcome = fuse(fn, args, dialect=dialect)
    torch.testing.assert_close(outcome.result, outcome.expected, rtol=1e-5, atol=1e-6)


def test_sizes_that_no_node_holds_do_not_break_a_constant() -> None:
    def fn(
        a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, g: torch.Tensor
    ) -> torch.Tensor:
        return quantize(rms(torch.cat((a, b), -1) + torch.cat((c, d), -1), torch.cat((g, g))), 0.05)

    args = [r(4, 8), r(4, 8) + 1, r(4, 8) - 1, r(4, 8) * 2, r(8)]
    outcome = fuse(fn, args, dynamic=True)
    assert torch.equal(outcome.result, outcome.expected)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("factor", [2.0, 0.375])
def test_a_norm_whose_only_reader_does_more_than_round(factor: float, dialect: str) -> None:
    """The reader was taken for the rounding of the norm, and its division was lost."""

    def norm_over_number(x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        wide = (x + residual).float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return gamma * normed.to(x.dtype) / factor

    given = [torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1)]
    outcome = fuse(norm_over_number, [*given, torch.ones(96).bfloat16()], dialect=dialect)
    torch.testing.assert_close(outcome.result, outcome.expected, rtol=2e-2, atol=2e-2)
