"""Tags against the definition: scale the channels, run again, and see what each element did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from npu_fusion.quantization.smoothing import trace
from npu_fusion.quantization.smoothing.factors import MIXED, ONE, ZERO
from npu_fusion.quantization.smoothing.propagate import Propagation, Source

CHANNELS = 6


class Computed(nn.Module):
    """``function(linear(x), y)`` with linear(x) [2, 4, 6], all channels of it different, and y like it."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, CHANNELS).double()
        self.function = function
        self.x = torch.randn(2, 4, 5).double()
        self.y = torch.rand(2, 4, CHANNELS).double() + 0.5

    def forward(self) -> Any:
        return self.function(self.linear(self.x), self.y.clone())


def tags_of(function: Callable[[Tensor, Tensor], Any], module: Computed | None = None) -> Tensor | None:
    """Tags of the result, checked against a run with other factors; None if no factors go through."""
    module = module or Computed(function)
    flow = trace(module)
    propagation = Propagation(flow, Source(CHANNELS, linear=module.linear), sinks=())
    if propagation.run().stopped is not None:
        return None
    tags = propagation.tags(flow.outputs[0])
    factors = torch.tensor([2.0, 0.5, 8.0, 0.125, 4.0, 0.25]).double()  # exact in every dtype
    with torch.no_grad():
        before = module()
        module.linear.weight *= factors[:, None]
        module.linear.bias *= factors
        after = module()
    assert (tags != MIXED).all()
    expected = torch.where(tags >= 0, before * factors[tags.clamp(min=0).long()], before)
    assert not before[tags == ZERO].any()
    torch.testing.assert_close(after, expected, rtol=1e-12, atol=1e-12)
    return tags


def into_buffer(v: Tensor, y: Tensor) -> Tensor:
    buffer = torch.zeros(2, 6, CHANNELS, dtype=v.dtype)
    buffer[:, 1:5] = v
    return buffer


def into_written_buffer(v: Tensor, y: Tensor) -> Tensor:
    buffer = torch.zeros(2, 6, CHANNELS, dtype=v.dtype)
    buffer[:, :2] = y[:, :2]
    buffer[:, 2:] = v
    return buffer


def attention(v: Tensor, y: Tensor, **options: Any) -> Tensor:
    value = v.unflatten(-1, (2, 3)).transpose(1, 2)
    query = y.repeat(1, 1, 2).unflatten(-1, (4, 3)).transpose(1, 2)
    key = y.unflatten(-1, (2, 3)).transpose(1, 2)
    if not options:
        value, key = value.repeat_interleave(2, 1), key.repeat_interleave(2, 1)
    return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2).flatten(2)


LAST = torch.arange(CHANNELS)
HEADS = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])
THROUGH: dict[str, tuple[Callable[[Tensor, Tensor], Any], Tensor]] = {
    "times": (lambda v, y: y * v * 2.0, LAST),
    "divided": (lambda v, y: -v / y / 3, LAST),
    "relu": (lambda v, y: F.leaky_relu(F.relu(v) + v.abs()), LAST),
    "views": (lambda v, y: v.view(8, 6)[:, None].expand(8, 2, 6).reshape(2, 8, 6), LAST),
    "casts": (lambda v, y: v.clone().to(torch.float16).to(torch.float32).double(), LAST),
    "transposed": (lambda v, y: v.transpose(1, 2).contiguous().transpose(1, 2), LAST),
    "own sum": (lambda v, y: v + 2 * v - 0.5 * v + 0, LAST),
    "matmul": (lambda v, y: y[:, :, :4].softmax(-1) @ v, LAST),
    "baddbmm": (lambda v, y: torch.baddbmm(v, y[:, :, :4], v), LAST),
    "mean": (lambda v, y: v.mean(1), LAST),
    "sum": (lambda v, y: (v[..., None, :] * y[..., None]).sum(2), LAST),
    "cat": (lambda v, y: torch.cat([v, 2 * v], 1), LAST),
    "stack": (lambda v, y: torch.stack([v, 2 * v]), LAST),
    "flip": (lambda v, y: v.flip(-1), LAST.flip(0)),
    "roll": (lambda v, y: v.roll(1, -1), LAST.roll(1)),
    "index": (lambda v, y: v[:, torch.tensor([2, 0]), :][..., [5, 1]], torch.tensor([5, 1])),
    "int32 index": (
        lambda v, y: v.index_select(2, torch.tensor([3, 2], dtype=torch.int32)),
        torch.tensor([3, 2]),
    ),
    "int32 operand": (lambda v, y: v * torch.ones(6, dtype=torch.int32), LAST),
    "bool index": (lambda v, y: v[y[..., 0] > 0.9], LAST),
    "gather": (lambda v, y: v.gather(1, torch.zeros(2, 1, 6, dtype=torch.int64)), LAST),
    "repeat": (lambda v, y: v.repeat(1, 1, 2), LAST.repeat(2)),
    "half": (lambda v, y: v.chunk(2, -1)[1] * y.chunk(2, -1)[0], LAST[3:]),
    "in place": (lambda v, y: v.mul_(y).neg_(), LAST),
    "addcmul": (lambda v, y: torch.addcmul(v, v, y), LAST),
    "where": (lambda v, y: torch.where(y > 1, v, v * y), LAST),
    "sdpa": (lambda v, y: attention(v, y, is_causal=True, enable_gqa=True), HEADS),
    "sdpa with mask": (
        lambda v, y: attention(v, y, attn_mask=torch.ones(4, 4).tril().bool(), enable_gqa=True),
        HEADS,
    ),
    "sdpa math": (lambda v, y: attention(v, y), HEADS),
}


@pytest.mark.parametrize("name", THROUGH)
def test_factors_go_through(name: str) -> None:
    function, channels = THROUGH[name]
    tags = tags_of(function)
    assert tags is not None
    assert torch.equal(tags, channels.int().expand_as(tags))


def zeros(v: Tensor) -> Tensor:
    return torch.zeros(2, 6, CHANNELS).to(v.dtype)


WITH_ZEROS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "buffer": into_buffer,
    "pad": lambda v, y: F.pad(v, (0, 0, 1, 1)),
    "masked_fill": lambda v, y: v.masked_fill(torch.tensor([True, False, True, False])[:, None], 0.0),
    "where": lambda v, y: torch.where(torch.tensor([True, False, True, False])[:, None], v, 0.0),
    "tril": lambda v, y: torch.cat([torch.zeros_like(v), v], 1),
    "scatter": lambda v, y: zeros(v).scatter(1, torch.arange(4)[:, None].expand(2, 4, 6), v),
    "index_put": lambda v, y: zeros(v).index_put((torch.tensor([1]),), v[:1, :1].expand(1, 6, 6)),
    "index_copy": lambda v, y: zeros(v).index_copy(1, torch.arange(4), v),
}


@pytest.mark.parametrize("name", WITH_ZEROS)
def test_zeros_take_any_factor(name: str) -> None:
    tags = tags_of(WITH_ZEROS[name])
    assert tags is not None
    assert ((tags == ZERO) | (tags == LAST)).all()
    assert (tags == ZERO).any() and (tags == LAST).any()


STOPPED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda v, y: v + y,
    "difference": lambda v, y: 1.0 - v,
    "other channel": lambda v, y: v + v.flip(-1),
    "square": lambda v, y: v * v,
    "power": lambda v, y: v**2,
    "quotient": lambda v, y: y / v,
    "floor": lambda v, y: torch.div(v, y, rounding_mode="floor"),
    "gelu": lambda v, y: F.gelu(v),
    "softmax": lambda v, y: v.softmax(-1),
    "clamp": lambda v, y: v.clamp(-1, 1),
    "channels": lambda v, y: v @ y.transpose(1, 2),
    "channel sum": lambda v, y: v.sum(-1),
    "both": lambda v, y: v.transpose(1, 2) @ v,
    "layer_norm": lambda v, y: F.layer_norm(v, (6,)),
    "number": lambda v, y: y * v[0, 0, 0].item(),
    "cat out": lambda v, y: torch.cat([v, v], 1, out=torch.empty(2, 8, 6).double()),
    "bias of a product": lambda v, y: torch.baddbmm(y, y[:, :, :4], v),
    "query": lambda v, y: F.scaled_dot_product_attention(v[None], y[None], y[None]),
    "token": lambda v, y: torch.cat([y, v], 1).mean(1),
    "saturating": lambda v, y: v.to(torch.float8_e4m3fn).to(v.dtype),
    "integer": lambda v, y: v.to(torch.int32),
    "mask": lambda v, y: torch.where(v > 0, y, 0.0),
    "bits": lambda v, y: v.view(torch.int64) + 1,
    "accumulated": lambda v, y: y.index_put((torch.tensor([0]),), v[:1], accumulate=True),
    "scatter_add": lambda v, y: y.scatter_add(1, torch.zeros(2, 4, 6, dtype=torch.int64), v),
    "out": lambda v, y: torch.mul(v, y, out=torch.empty_like(v)) * v.abs().max().item(),
    "stale index": lambda v, y: stale(v),
}


def stale(v: Tensor) -> Tensor:
    index = torch.tensor([0, 1])
    result = v[:, index]
    index += 1
    return result


@pytest.mark.parametrize("name", STOPPED)
def test_no_factor_goes_through(name: str) -> None:
    assert tags_of(STOPPED[name]) is None


def test_a_buffer_with_other_values_is_not_zero() -> None:
    tags = tags_of(into_written_buffer)
    assert tags is not None
    assert (tags[:, :2] == ONE).all() and (tags[:, 2:] == LAST).all()


def test_an_overwritten_tensor_has_no_factor() -> None:
    tags = tags_of(lambda v, y: v.copy_(y))
    assert tags is not None
    assert (tags == ONE).all()


def test_a_cache_from_before_is_zero_only_if_it_is() -> None:
    for fill, expected in ((0.0, ZERO), (1.0, ONE)):
        cache = torch.full((2, 6, CHANNELS), fill).double()

        def update(v: Tensor, y: Tensor, cache: Tensor = cache) -> Tensor:
            cache[:, :4] = v
            return cache[:, :5] * 1

        module = Computed(update)
        tags = tags_of(update, module)
        assert tags is not None
        assert (tags[:, :4] == LAST).all() and (tags[:, 4:] == expected).all()


UNARY: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "transpose": lambda t, y, n: t.transpose(n % t.dim(), -1),
    "contiguous": lambda t, y, n: t.contiguous().clone(),
    "flatten": lambda t, y, n: t.flatten(-2) if t.dim() > 1 else t,
    "unflatten": lambda t, y, n: t.unflatten(-1, (2, -1)) if t.size(-1) % 2 == 0 and t.dim() < 5 else t,
    "narrow": lambda t, y, n: t.narrow(n % t.dim(), 0, max(1, t.size(n % t.dim()) - 1)),
    "double": lambda t, y, n: torch.cat([t, t.flip(0)], n % t.dim()) if t.numel() < 2000 else t,
    "sum": lambda t, y, n: t.sum(n % t.dim(), keepdim=True),
    "scale": lambda t, y, n: t * y.flatten()[n],
    "scale each": lambda t, y, n: t * torch.arange(1.0, 1 + t.size(-1), dtype=t.dtype),
    "add own": lambda t, y, n: t + t.roll(n, n % t.dim()),
    "add other": lambda t, y, n: t + n,
    "relu": lambda t, y, n: F.relu(t),
    "silu": lambda t, y, n: F.silu(t),
    "gate": lambda t, y, n: F.silu(t) * t,
    "mix": lambda t, y, n: torch.ones(3, t.size(-2), dtype=t.dtype) @ t if t.dim() > 1 else t,
    "mix last": lambda t, y, n: t @ torch.ones(t.size(-1), 2, dtype=t.dtype),
    "in place": lambda t, y, n: t.contiguous().narrow(0, 0, 1).mul_(3),
    "pad": lambda t, y, n: F.pad(t, (0, n % 3)),
    "write": lambda t, y, n: written(t, n),
}


def written(t: Tensor, n: int) -> Tensor:
    buffer = torch.zeros(*t.shape[:-1], t.size(-1) + 2, dtype=t.dtype)
    buffer[..., n % 3 : n % 3 + t.size(-1)] = t
    return buffer


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(UNARY)), st.integers(0, 7)), max_size=7))
def test_whatever_goes_through_is_right(chain: list[tuple[str, int]]) -> None:
    def function(v: Tensor, y: Tensor) -> Tensor:
        for name, n in chain:
            v = UNARY[name](v, y, n)
        return v * 1

    tags_of(function)  # has the assertions
