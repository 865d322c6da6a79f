from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npu_fusion.quantization.smoothing import Producer, find_groups, power_of_two, trace
from tests.quantization.smoothing._fold import linears

K = 16
LOW = [torch.float16, torch.bfloat16]


class OnePlus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(K))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (K,)) * (1 + self.weight)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(K, 8)
        for parameter in norm.parameters():
            nn.init.normal_(parameter, 0.5, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class Heads(nn.Module):
    """Channel c of the producer is read as c and c + 8."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.Linear(4, 8), nn.Linear(K, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x[..., :4]).repeat(1, 2))


def producer(model: nn.Module, dtype: torch.dtype = torch.float32) -> Producer:
    model.to(dtype)
    flow = trace(model, (torch.randn(3, K, dtype=dtype),))
    found = next(g.producer for g in find_groups(model, flow, linears(model)) if "linear" in g.consumers)
    assert found is not None
    return found


def scales(low: float = -3, high: float = 3) -> Tensor:
    return 2 ** (torch.rand(K, generator=torch.Generator().manual_seed(0)) * (high - low) + low)


def test_what_it_is() -> None:
    model = Normed(nn.LayerNorm(K))
    found = producer(model)
    assert (found.name, found.module, found.plus_one) == ("norm", model.norm, (False, False))
    assert found.describe() == "norm"
    assert found.channel.tolist() == list(range(K))


def test_the_largest_of_channels_that_share_one() -> None:
    x = torch.arange(K).float().roll(3)
    assert producer(Heads()).reduce(x).tolist() == x.view(2, 8).amax(0).repeat(2).tolist()
    assert torch.equal(producer(Normed(nn.RMSNorm(K))).reduce(x), x)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
def test_fold_rounds_once(norm: type[nn.Module], dtype: torch.dtype) -> None:
    model = Normed(norm(K))
    found = producer(model, dtype)
    m = scales()
    expected = {name: (p.double() * m.double()).to(dtype) for name, p in model.norm.named_parameters()}
    found.fold(m)
    for name, parameter in model.norm.named_parameters():
        assert torch.equal(parameter, expected[name])
        assert parameter.requires_grad and parameter.is_leaf


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("norm", [nn.RMSNorm(K), OnePlus()], ids=["scale", "plus one"])
def test_attainable_is_what_fold_does(norm: nn.Module, dtype: torch.dtype) -> None:
    model = Normed(norm)
    found = producer(model, dtype)
    plus = float(found.plus_one[0])
    m = scales()
    real = found.attainable(m)
    before = plus + model.norm.weight.detach().double()
    found.fold(m)
    assert torch.equal(real, ((plus + model.norm.weight.double()) / before).float())
    assert not torch.equal(real, m)
    steps = torch.finfo(dtype).eps * (1 if plus else 0.5) * (1 + plus / (before * m).abs())
    assert ((real / m - 1).abs() <= steps).all()
    # What is attainable is attained.
    weight = model.norm.weight.detach().clone()
    model.norm.weight.data = (before - plus).to(dtype)
    found.fold(real)
    assert torch.equal(model.norm.weight, weight)


def test_plus_one_in_float32() -> None:
    model = Normed(OnePlus())
    found = producer(model)
    m, before = scales(), model.norm.weight.detach().clone()
    found.fold(m)
    assert torch.equal(model.norm.weight, ((1 + before.double()) * m - 1).float())


@pytest.mark.parametrize("dtype", LOW)
def test_a_channel_is_never_switched_off(dtype: torch.dtype) -> None:
    for norm in (OnePlus(), nn.RMSNorm(K)):
        model = Normed(norm)
        found = producer(model, dtype)
        with torch.no_grad():
            model.norm.weight[0], model.norm.weight[1] = (-1.5, -1.0) if found.plus_one[0] else (-0.5, 0.0)
        plus = float(found.plus_one[0])
        before = plus + model.norm.weight.detach().double()
        tiny = torch.full((K,), 1e-37)
        real = found.attainable(tiny)
        found.fold(tiny)
        after = plus + model.norm.weight.detach().double()
        assert torch.equal(after.sign(), before.sign())
        assert after[1] == 0 and real[1] == tiny[1]
        assert (real > 0).all()
        alive = before != 0
        assert torch.equal(real[alive], (after / before)[alive].float())


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_powers_of_two_change_no_bit(dtype: torch.dtype) -> None:
    for model in (Normed(nn.LayerNorm(K)), Heads()):
        found = producer(model, dtype)
        m = 1 / power_of_two(found.reduce(scales(-2, 2)))
        x = torch.randn(5, K).to(dtype)
        assert torch.equal(found.attainable(m), m)
        with torch.no_grad():
            before = model(x)
            found.fold(m)
            model.linear.weight /= m.to(dtype)
            assert torch.equal(model(x), before)


def test_power_of_two_is_the_nearest() -> None:
    x = torch.tensor([1.0, 1.4, 1.42, 3.0, 0.3, 2.0**-120])
    assert power_of_two(x).tolist() == [1.0, 1.0, 2.0, 4.0, 0.25, 2.0**-120]
    assert power_of_two(x.half()).dtype == torch.float16


@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
def test_rows_of_a_linear_layer(dtype: torch.dtype) -> None:
    model = Heads()
    found = producer(model, dtype)
    m = found.reduce(scales())
    weight, bias = (p.detach().clone() for p in (model.norm.weight, model.norm.bias))
    assert torch.equal(found.attainable(m), m)
    found.fold(m.to(dtype))
    wide = m.to(dtype)[:8].double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        model.norm.weight.double(), weight.double() * wide[:, None], rtol=eps / 2, atol=1e-7
    )
    torch.testing.assert_close(model.norm.bias.double(), bias.double() * wide, rtol=eps / 2, atol=1e-7)


NOT_POSITIVE = "smooth_scales has values that are not positive and finite"
BAD = {
    "shape": (torch.ones(K + 1), r"scales have shape \[17\]; accepted: \[16\]"),
    "zero": (torch.ones(K).index_fill(0, torch.tensor([3]), 0.0), NOT_POSITIVE),
    "negative": (-torch.ones(K), NOT_POSITIVE),
    "nan": (torch.ones(K) * torch.nan, NOT_POSITIVE),
    "infinite": (torch.ones(K) / 0, NOT_POSITIVE),
    "not shared": (torch.arange(1.0, K + 1), "smooth_scales differs over channels that share one of norm"),
    "overflow": (torch.full((K,), 1e6), "smooth_scales makes a parameter of norm overflow torch.float16"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("method", ["fold", "attainable"])
def test_bad_scales_change_nothing(method: str, name: str) -> None:
    values, message = BAD[name]
    model = Heads()
    found = producer(model, torch.float16)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"{method}: {message}"):
        getattr(found, method)(values)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_reduce_refuses_another_size() -> None:
    with pytest.raises(ValueError, match=r"reduce: scales have shape \[3\]; accepted: \[16\]"):
        producer(Heads()).reduce(torch.ones(3))
