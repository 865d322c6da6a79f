"""What taking a dequantized product apart must not get wrong, through the fusions that use it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes import _w8a8
from tests.passes._harness import fuse

BF16 = torch.bfloat16


def _swiglu_quantized(d: Tensor) -> tuple[Tensor, Tensor]:
    first, second = d.chunk(2, -1)
    h = F.silu(first) * second
    scale = h.abs().amax(-1, keepdim=True) / 127
    return (h / scale).round().clamp(-128, 127).to(torch.int8), scale


def _rounded(d: Tensor) -> tuple[Tensor]:
    return (d.to(BF16),)


@pytest.mark.parametrize(
    ("end", "operator"), [(_swiglu_quantized, "npu_dequant_swiglu_quant"), (_rounded, "npu_quant_matmul")]
)
@pytest.mark.parametrize(
    "kind", ["int32 bias last", "bias first", "float64 number", "int64 number", "1-D token"]
)
def test_bit_equal(kind: str, end: Callable[[Tensor], tuple[Tensor, ...]], operator: str) -> None:
    """An integer added after the scales is no int32 bias; numbers of other dtypes are scales as well."""

    def layer(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        p = torch._int_mm(q, w)
        if kind == "int32 bias last":
            d = p.float() * ws * ts + bias
        elif kind == "bias first":
            d = bias.float() + p.float() * ws * ts
        elif kind == "1-D token":
            d = p.float() * ws * ts.view(-1)[:, None]
        else:
            d = p.float() * bias.sum().to(getattr(torch, kind.split()[0])) * ts
        return end(d)

    q, w, ws, ts, *_ = _w8a8.Spelling().inputs()
    bias = (torch.arange(w.shape[1]) % 5).int()
    outcome = fuse(layer, [q, w, ws, ts * 1e-3 if "number" in kind else ts, bias], numerics="strict")
    assert outcome.fused == {operator: 1}, outcome.report.refused
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("shape", [(-1,), (1, -1)])
@pytest.mark.parametrize("integer", [False, True])
def test_one_row(integer: bool, shape: tuple[int, ...]) -> None:
    """With one token everything broadcasts like a bias or a scale; the product is still the product."""

    def layer(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        p = q.int() @ w.int()
        d = (bias + p).float() * ws * ts if integer else bias + p.float() * ws * ts
        return _swiglu_quantized(d)

    q, w, ws, ts, bias, *_ = _w8a8.Spelling().inputs()
    bias = (bias * 3e4).int() if integer else bias
    outcome = fuse(layer, [q[:1], w, ws, ts[:1], bias.view(shape)], numerics="strict")
    assert outcome.fused == {"npu_dequant_swiglu_quant": 1}, outcome.report.refused
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        assert torch.equal(have, want)

    def linear(*args: Tensor) -> Tensor:
        q, w, ws, ts, bias = args
        p = q.int() @ w.int()
        return ((bias + p).float() * ws * ts if integer else bias + p.float() * ws * ts).to(BF16)

    outcome = fuse(linear, [q[:1], w, ws, ts[:1], bias.view(shape)], numerics="strict")
    assert outcome.fused == {"npu_quant_matmul": 1}, outcome.report.refused
    assert torch.equal(outcome.result, outcome.expected)
