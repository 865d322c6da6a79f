from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils import parametrize

from npu_fusion.quantization.smoothing import find_groups, trace
from tests.quantization.smoothing._fold import assert_exact, groups_of, linears, producers, randomize

WIDTH, INNER, HEADS, HEAD = 8, 12, 4, 4


class Norm(nn.Module):
    """Llama's, or with ``plus`` Gemma's."""

    def __init__(self, size: int, plus: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size) - plus)
        self.plus = plus

    def forward(self, x: Tensor) -> Tensor:
        weight = self.plus + self.weight.to(x.dtype) if self.plus else self.weight
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH, inner: int = INNER) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Grouped-query attention with two heads of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * HEAD)
        self.k = nn.Linear(WIDTH, 2 * HEAD)
        self.v = nn.Linear(WIDTH, 2 * HEAD)
        self.o = nn.Linear(HEADS * HEAD, WIDTH)

    def values(self, v: Tensor) -> Tensor:
        return v

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            t.unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for t in (self.q(x), self.k(x), self.values(self.v(x)))
        )
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = (t.repeat_interleave(HEADS // 2, 1) for t in (k, v))
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(
        self, norm: Callable[[int], nn.Module] = Norm, attention: type[nn.Module] = Attention
    ) -> None:
        super().__init__()
        self.first, self.second = norm(WIDTH), norm(WIDTH)
        self.attention, self.mlp = attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)).double()


def made(module: nn.Module) -> nn.Module:
    return randomize(module.double()).eval()


ALL = {
    "attention.q": "first",
    "attention.k": "first",
    "attention.v": "first",
    "attention.o": "attention.v",
    "mlp.gate": "second",
    "mlp.up": "second",
    "mlp.down": "mlp.up",
}


class WithBias(nn.Module):
    """A layer norm in plain operators."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / x.std(-1, keepdim=True) * self.scale + self.shift


class OnePlus(nn.LayerNorm):
    """Nemotron's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "llama": Norm,
    "gemma": lambda size: Norm(size, 1.0),
    "rms_norm": nn.RMSNorm,
    "layer_norm": nn.LayerNorm,
    "layer_norm without bias": lambda size: nn.LayerNorm(size, bias=False),
    "with bias": WithBias,
    "one plus": OnePlus,
}


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm(norm: str) -> None:
    model = made(Block(NORMS[norm]))
    assert assert_exact(model, X) == ALL
    (group, *_) = groups_of(model, X)
    assert group.producer is not None
    assert group.producer.plus_one[0] == (norm in ("gemma", "one plus"))


class Fused(nn.Module):
    """One projection for queries, keys and values, interleaved as GPT-NeoX has it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * HEAD)
        self.o = nn.Linear(HEADS * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:-1], HEADS, 3 * HEAD).transpose(1, 2).chunk(3, -1)
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Gated(Attention):
    """Qwen3-Next: the output of the heads is multiplied by a gate, which does not depend on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HEADS * HEAD)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
        return self.o(y * torch.sigmoid(self.gate(x)))


class FusedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(WIDTH, 2 * INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(up * F.gelu(gate))


class Relu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class Chunked(Mlp):
    """Half of the tokens at a time, the second half first; one layer gets its input by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.down(input=F.silu(self.gate(part)) * self.up(part)) for part in reversed(x.chunk(2, 0))]
        return torch.cat(parts[::-1])


class Parallel(nn.Module):
    """One norm for attention and MLP (GPT-J)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention, self.mlp = Norm(WIDTH), Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return x + self.attention(y) + self.mlp(y.to(torch.float64).reshape(-1, WIDTH)).view(x.shape)


class SubNorm(nn.Module):
    """A norm of each head before the output projection: its weights are shared by all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.norm, self.o = nn.Linear(WIDTH, HEADS * HEAD), Norm(HEAD), nn.Linear(HEADS * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.norm(self.v(x).unflatten(-1, (HEADS, HEAD))).flatten(2))


class Scaled(nn.Module):
    """A scale for each channel of a head, which has fewer channels to choose factors for than the values."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.o = nn.Linear(WIDTH, HEADS * HEAD), nn.Linear(HEADS * HEAD, WIDTH)
        self.scale = nn.Parameter(torch.ones(HEAD))

    def forward(self, x: Tensor) -> Tensor:
        return self.o((self.v(x).unflatten(-1, (HEADS, HEAD)) * self.scale).flatten(2))


class After(nn.Module):
    def __init__(self, body: nn.Module, norm: Callable[[int], nn.Module] = Norm) -> None:
        super().__init__()
        self.norm, self.body = norm(WIDTH), body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(self.norm(x))


FOLDED: dict[str, tuple[Callable[[], nn.Module], dict[str, str | None]]] = {
    "fused": (lambda: After(Fused()), {"body.qkv": "norm", "body.o": "body.qkv"}),
    "fused mlp": (lambda: After(FusedMlp()), {"body.gate_up": "norm", "body.down": "body.gate_up"}),
    "relu": (lambda: After(Relu()), {"body.fc1": "norm", "body.fc2": "body.fc1"}),
    "chunked": (lambda: After(Chunked()), {"body.gate": "norm", "body.up": "norm", "body.down": "body.up"}),
    "gated": (
        lambda: After(Gated()),
        {**{f"body.{name}": "norm" for name in ("q", "k", "v", "gate")}, "body.o": "body.v"},
    ),
    "parallel": (
        Parallel,
        {**ALL, "mlp.gate": "first", "mlp.up": "first"},
    ),
    "scaled": (lambda: After(Scaled()), {"body.v": "norm", "body.o": "body.v"}),
    "sub norm": (lambda: After(SubNorm()), {"body.v": "norm", "body.o": "body.norm"}),
}


@pytest.mark.parametrize("name", FOLDED)
def test_it_folds_and_is_exact(name: str) -> None:
    make, expected = FOLDED[name]
    assert assert_exact(made(make()), X) == expected


def test_siblings_are_one_group_in_the_order_of_their_calls() -> None:
    groups = groups_of(made(Block()), X)
    assert [group.consumers for group in groups] == [
        ("attention.q", "attention.k", "attention.v"),
        ("attention.o",),
        ("mlp.gate", "mlp.up"),
        ("mlp.down",),
    ]
    assert [group.reason for group in groups] == [""] * 4


def test_heads_of_a_group_share_channels() -> None:
    group = groups_of(made(Block()), X)[1]
    assert group.producer is not None
    expected = torch.arange(2 * HEAD).view(2, HEAD).repeat_interleave(HEADS // 2, 0).flatten()
    assert torch.equal(group.producer.channel, expected)


def test_only_the_rows_of_the_values_are_scaled() -> None:
    model = made(After(Fused()))
    producer = groups_of(model, X)[1].producer
    assert producer is not None
    before = producer.module.weight.detach().clone()
    producer.fold(torch.full((HEADS * HEAD,), 2.0))
    factors = (producer.module.weight / before)[:, 0].view(HEADS, 3, HEAD)
    assert (factors[:, :2] == 1).all() and (factors[:, 2] == 2).all()


# ---- near misses: what is left alone, and why

NOTHING = "nothing multiplies its input by a parameter for each channel; it comes from"


class Custom(nn.Module):
    """A norm, an MLP, and whatever ``run`` does with them."""

    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.other, self.mlp = Norm(WIDTH), Norm(WIDTH), Mlp()
        self.router, self.factor = nn.Parameter(torch.randn(3, WIDTH)), nn.Parameter(torch.ones(1))
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def tapped(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return y + m.mlp(y)


def routed(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.mlp(y) * F.linear(y, m.router).softmax(-1)[..., :1]


def returned(m: Any, x: Tensor) -> Any:
    y = m.norm(x)
    return {"out": (m.mlp(y), [y])}


def twice(m: Any, x: Tensor) -> Tensor:
    return m.mlp(m.norm(x)) + m.norm(-x)


def biased(m: Any, x: Tensor) -> Tensor:
    return m.mlp(m.norm(x) + 1)


def inspected(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.mlp(y) if bool((y > 0).any()) else y


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    out = m.mlp(y)
    return out + y.clamp_(-1, 1)


def functional(m: Any, x: Tensor) -> Tensor:
    return m.mlp(m.norm(x)) + m.other(x) @ m.mlp.up.weight.t() @ m.mlp.down.weight.t()


def with_another_bias(m: Any, x: Tensor) -> Tensor:
    return m.mlp(F.layer_norm(x, (WIDTH,), m.norm.weight, torch.ones(WIDTH, dtype=x.dtype)))


def plus_one_and_not(m: Any, x: Tensor) -> Tensor:
    weight = m.norm.weight
    return m.mlp(torch.cat([F.rms_norm(x, (WIDTH,)) * (1 + weight), F.rms_norm(x, (WIDTH,)) * weight], 1))


def scaled(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return y + m.mlp(y * m.factor) + m.router.sum()  # an unused router would be a reason, too


def sparse(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.mlp(y) + (y[0, 0].to_sparse() * 2).to_dense()


def last_tokens(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.mlp.gate(y).sum() + m.mlp.up(y[:, -1]).sum() + m.mlp.down(x.repeat(1, 1, 2)[..., :INNER])


NORM_KEPT: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "residual": (tapped, "the output of norm also goes into aten.add"),
    "router": (routed, "the output of norm also goes into aten.mm"),
    "returned": (returned, "the output of norm is a result of the traced module"),
    "twice": (twice, "the output of norm also goes into aten.add"),
    "bias": (biased, f"{NOTHING} aten.add"),
    "inspected": (inspected, "the output of norm also goes into aten.gt"),
    "in place": (in_place, "the output of norm also goes into aten.clamp_"),
    "functional": (functional, "a parameter of mlp.up is read by aten.t"),
    "1 + w and w": (plus_one_and_not, f"{NOTHING} aten.cat"),
    "another bias": (with_another_bias, f"{NOTHING} aten.native_layer_norm"),
    "one factor": (scaled, "the output of norm also goes into aten.add"),
    "sparse": (sparse, "the output of norm also goes into aten._to_sparse"),
    "other rows": (last_tokens, "the output of norm also goes into mlp.up"),
    "no norm": (lambda m, x: m.mlp(x), f"{NOTHING} an input or a parameter of the traced module"),
}


@pytest.mark.parametrize("name", NORM_KEPT)
def test_a_norm_that_is_not_folded(name: str) -> None:
    run, reason = NORM_KEPT[name]
    model = made(Custom(run))
    group = groups_of(model, X)[0]
    assert "mlp.gate" in group.consumers
    assert group.producer is None
    assert group.reason == reason


def test_a_layer_outside_of_the_group() -> None:
    model = made(Block())
    some = {name: layer for name, layer in linears(model).items() if name != "mlp.up"}
    groups = find_groups(model, trace(model, (X,)), some)
    assert [group.reason for group in groups if "mlp.gate" in group.consumers] == [
        "the output of second also goes into mlp.up"
    ]
    assert [group.producer.describe() for group in groups if group.consumers == ("mlp.down",)] == ["mlp.up"]


class Down(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(WIDTH, INNER),
            nn.Linear(WIDTH, INNER),
            nn.Linear(INNER, WIDTH),
        )
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def up_also_in_the_sum(m: Any, x: Tensor) -> Tensor:
    up = m.up(x)
    return m.down(F.silu(m.gate(x)) * up) + up[..., :WIDTH]


def gate_of_up(m: Any, x: Tensor) -> Tensor:
    up = m.up(x)
    return m.down(up * torch.sigmoid(m.gate(x) + up))


DOWN_KEPT: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "gelu": (lambda m, x: m.down(F.gelu(m.up(x))), "it comes from aten.gelu"),
    "square": (lambda m, x: m.down(F.relu(m.up(x)).square()), "it comes from aten.pow"),
    "product": (lambda m, x: m.down(F.silu(m.up(x)) * m.gate(x).tanh()), "it comes from aten.mul"),
    "twice": (lambda m, x: m.down(m.up(x) * m.up(-x)), "it comes from aten.mul"),
    "sum": (up_also_in_the_sum, "the output of up also goes into aten.add"),
    "own gate": (gate_of_up, "the output of up also goes into aten.add"),
    "half": (lambda m, x: m.down(torch.cat([m.up(x)[..., :6], m.gate(x)[..., 6:].sin()], -1)), "aten.cat"),
}


@pytest.mark.parametrize("name", DOWN_KEPT)
def test_an_up_projection_that_is_not_folded(name: str) -> None:
    run, reason = DOWN_KEPT[name]
    (group,) = (group for group in groups_of(made(Down(run)), X) if group.consumers == ("down",))
    assert group.producer is None
    assert group.reason.endswith(reason)


class ValueTapped(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return (
            self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))
            + v.sum()
        )


class ValueGated(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o((y * torch.sigmoid(v.repeat_interleave(2, 1))).transpose(1, 2).flatten(2))


class Clipped(Attention):
    def values(self, v: Tensor) -> Tensor:
        return v.clamp(-1, 1)


class ValueNormed(Attention):
    def values(self, v: Tensor) -> Tensor:
        return v * v.square().mean(-1, keepdim=True).rsqrt()


class ValueResidual(Attention):
    def values(self, v: Tensor) -> Tensor:
        return 0.5 * v + 0.5 * torch.ones_like(v)


class Past(Attention):
    """A cache that has values already."""

    def __init__(self) -> None:
        super().__init__()
        self.past = torch.randn(2, 3, 2 * HEAD).double()

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), torch.cat([self.past, self.k(x)], 1)
        k, v = (t.repeat(1, 1, 2) for t in (k, torch.cat([self.past, self.v(x)], 1)))
        return self.o((q @ k.transpose(1, 2)).softmax(-1) @ v)


class Memory(Attention):
    """A learned token beside the values."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 2 * HEAD))

    def values(self, v: Tensor) -> Tensor:
        return torch.cat([v[:, :-1], self.token.expand(v.size(0), -1, -1)], 1)


@pytest.mark.parametrize(
    "attention", [ValueTapped, ValueGated, Clipped, ValueNormed, ValueResidual, Past, Memory]
)
def test_a_value_projection_that_is_not_folded(attention: type[nn.Module]) -> None:
    groups = groups_of(made(Block(attention=attention)), X)
    (group,) = (group for group in groups if group.consumers == ("attention.o",))
    assert group.producer is None and group.reason
    # The rest is as it was.
    assert producers(groups)["attention.v"] == "first"


class StaticCache(Attention):
    """Values and keys are written into buffers of zeros, and attention looks at the whole of them."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.before = before
        self.buffer = torch.zeros(2, 2, 9, HEAD).double()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if not self.before:
            self.buffer = torch.zeros(2, 2, 9, HEAD).double()
        where = torch.arange(x.size(1))
        values = self.buffer.index_copy_(2, where, v)
        keys = torch.zeros_like(values)
        keys[:, :, : x.size(1)] = k
        mask = torch.arange(9) < x.size(1)
        y = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask.expand(2, 1, x.size(1), 9), enable_gqa=True
        )
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("before", [False, True])
def test_through_a_static_cache(before: bool) -> None:
    model = made(After(StaticCache(before)))
    groups = groups_of(model, X)
    assert producers(groups)["body.o"] == "body.v"
    # Now the buffer of before has something in it, which no factor would reach.
    model.body.buffer[:, :, 6] = 1
    assert producers(groups_of(model, X))["body.o"] == (None if before else "body.v")


class Flex(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.o(flex_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_an_operator_that_nothing_is_known_of() -> None:
    groups = groups_of(made(Block(attention=Flex)), X)
    assert groups[0].producer is not None
    assert groups[1].reason == f"{NOTHING} flex_attention in attention"


# ---- parameters that are not the module's alone


def reasons(model: nn.Module, **options: Any) -> dict[str, str]:
    groups = find_groups(model, trace(model, (X,)), linears(model), **options)
    return {name: group.reason for group in groups for name in group.consumers}


def test_a_tied_producer() -> None:
    model = made(Block())
    model.second.weight = model.first.weight
    why = reasons(model)
    both = {"second shares a parameter with first.weight", "first shares a parameter with second.weight"}
    assert {why["mlp.gate"], why["attention.q"]} <= both
    assert why["mlp.down"] == ""


def test_a_tied_consumer() -> None:
    model = made(Block())
    model.embedding = nn.Embedding(INNER, WIDTH).double()
    model.mlp.up.weight = model.embedding.weight
    assert reasons(model)["mlp.gate"] == "mlp.up shares a parameter with embedding.weight"
    assert reasons(model)["mlp.down"] == "mlp.up shares a parameter with embedding.weight"


def test_parameters_that_overlap_in_memory() -> None:
    model = made(Block())
    for norm, row in ((model.first, 1), (model.second, 3)):
        norm.weight = nn.Parameter(model.mlp.gate.weight.detach()[row])
    why = reasons(model)
    assert why["attention.q"] == "first shares a parameter with mlp.gate.weight"
    assert why["mlp.gate"].startswith("mlp.gate shares a parameter with ")
    model.mlp.gate = nn.Linear(WIDTH, INNER).double()
    model.mlp.register_buffer("whole", model.first.weight.data.as_strided((INNER, WIDTH), (WIDTH, 1), 0))
    assert reasons(model)["mlp.gate"] == "second shares a parameter with mlp.whole"


def test_parameters_that_are_parts_of_one_storage() -> None:
    model = made(Block())
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    at = 0
    for parameter in model.parameters():
        parameter.data = flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    assert assert_exact(model, X) == ALL


def test_a_norm_in_two_places() -> None:
    model = made(Block())
    model.second = model.first
    assert reasons(model)["mlp.gate"] == "first is also second"


def test_a_norm_that_another_part_of_the_model_has() -> None:
    block = made(Block())
    whole = nn.Sequential(block, nn.Sequential(block.second))
    groups = find_groups(block, trace(block, (X,)), linears(block), model=whole)
    why = {group.consumers[0]: group.reason for group in groups}
    assert why["mlp.gate"] == "0.second is also 1.0"
    assert why["attention.q"] == ""
    assert groups[0].producer is not None
    assert groups[0].producer.describe() == "0.first"


@pytest.mark.parametrize("name", ["second", "mlp.up"])
def test_hooks(name: str) -> None:
    model = made(Block())
    handle = model.get_submodule(name).register_forward_hook(lambda *_: None)
    assert reasons(model)["mlp.gate"] == f"{name} has hooks"
    handle.remove()
    assert reasons(model)["mlp.gate"] == ""


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("name", ["second", "mlp.up"])
def test_parametrizations(name: str) -> None:
    model = made(Block())
    parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())
    assert reasons(model)["mlp.gate"].endswith("is parametrized")


def test_a_hook_that_changes_what_is_read() -> None:
    model = made(Block())
    model.mlp.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    assert reasons(model)["mlp.gate"].startswith("nothing multiplies its input")


def test_a_forward_of_its_own() -> None:
    model = made(Block())
    layer = model.mlp.up
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias)
    why = reasons(model)
    assert why["mlp.up"] == "its forward is not that of nn.Linear"
    assert why["mlp.gate"] == "the output of second also goes into aten.addmm in mlp.up"


def test_multihead_attention_reads_weights_past_their_layers() -> None:
    model = made(After(nn.MultiheadAttention(WIDTH, 2, batch_first=True)))
    model.forward = lambda x: model.body(model.norm(x), model.norm(x), x)[0]
    assert reasons(model) == {"body.out_proj": "it was not called"}


# ---- layers that were not called


class Moe(nn.Module):
    """Experts of linear layers; ``chosen`` get all tokens (``few``: the first token alone)."""

    def __init__(self, chosen: tuple[int, ...], router: bool = False, few: bool = False) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Mlp() for _ in range(3))
        self.router = nn.Linear(WIDTH, 3)
        self.chosen, self.routed, self.few = chosen, router, few

    def forward(self, x: Tensor) -> Tensor:
        y = sum(self.experts[i](x[:, :1] if self.few else x) for i in self.chosen)
        return y * self.router(x).softmax(-1)[..., :1] if self.routed else y


class MoeBlock(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.second, self.attention, self.moe = (
            Norm(WIDTH),
            Norm(WIDTH),
            Attention(),
            Moe(**options),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.moe(self.second(x))


def test_an_expert_that_was_not_called_could_read_the_norm() -> None:
    why = reasons(made(MoeBlock(chosen=(0, 2))))
    assert (
        why["moe.experts.0.gate"]
        == "moe.experts.1.gate.weight was not used, and could read the output of second"
    )
    assert why["moe.experts.1.gate"] == "it was not called"
    # It cannot have seen what is inside of the attention, or of another expert.
    assert why["attention.q"] == why["attention.o"] == why["moe.experts.0.down"] == ""


def test_an_unused_layer_beside_the_norm() -> None:
    model = made(Block())
    model.extra = nn.Linear(WIDTH, 2).double()
    why = reasons(model)
    assert why["attention.q"] == "extra.weight was not used, and could read the output of first"
    assert why["mlp.gate"] == "extra.weight was not used, and could read the output of second"
    assert why["attention.o"] == why["mlp.down"] == ""


def test_all_experts_and_the_router_in_one_group() -> None:
    produced = assert_exact(made(MoeBlock(chosen=(0, 1, 2), router=True)), X)
    assert produced["moe.router"] == produced["moe.experts.1.up"] == "second"


def test_a_router_that_is_not_smoothed() -> None:
    model = made(MoeBlock(chosen=(0, 1, 2), router=True))
    some = {name: layer for name, layer in linears(model).items() if name != "moe.router"}
    groups = find_groups(model, trace(model, (X,)), some)
    why = {name: group.reason for group in groups for name in group.consumers}
    assert why["moe.experts.0.gate"] == "the output of second also goes into moe.router"


def test_experts_that_read_some_tokens() -> None:
    why = reasons(made(MoeBlock(chosen=(0, 1, 2), router=True, few=True)))
    assert why["moe.router"] == "the output of second also goes into moe.experts.0.gate"
    assert why["moe.experts.0.gate"] == "the output of second also goes into moe.router"


def test_an_expert_without_tokens_was_not_called() -> None:
    model = made(MoeBlock(chosen=(0, 1, 2)))
    model.moe.forward = lambda x: (
        model.moe.experts[0](x) + sum(model.moe.experts[i](x[:, :0]).sum() for i in (1, 2))
    )
    why = reasons(model)
    assert why["moe.experts.1.up"] == "it was not called"
    assert why["moe.experts.0.up"].startswith("moe.experts.1.gate.weight was not used")


def test_bad_arguments() -> None:
    model = made(Block())
    flow = trace(model, (X,))
    with pytest.raises(TypeError, match=r"find_groups: linears\['first'\] is a Norm; accepted: nn.Linear"):
        find_groups(model, flow, {"first": model.first})
    with pytest.raises(ValueError, match="find_groups: dataflow is of another module"):
        find_groups(copy.deepcopy(model), flow, {})
