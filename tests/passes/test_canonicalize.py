"""Equal computations are one term, different ones are not, whatever they are spelled with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from npu_fusion.passes import canonicalize
from npu_fusion.passes.terms import RULES, Term, TermGraph, representable, rule
from npu_fusion.passes.terms import _shape_of_synthetic as shape_of

aten = torch.ops.aten
BF16 = torch.bfloat16

assert canonicalize  # importing it is what registers the rules


def viewed(fn: Callable[..., Any], *args: Tensor) -> tuple[TermGraph, list[Any]]:
    """The terms of a traced function, and of its results."""
    graph = make_fx(fn, tracing_mode="fake")(*args).graph
    view = TermGraph(graph)
    (results,) = next(n for n in graph.nodes if n.op == "output").args
    return view, [view.of[r] for r in (results if isinstance(results, (list, tuple)) else [results])]


def terms(fn: Callable[..., Any], *args: Tensor) -> list[Any]:
    return viewed(fn, *args)[1]


def x32(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 6)))


Unary = Callable[[Tensor], Tensor]

SAME: dict[str, tuple[Unary, ...]] = {
    "negligible": (
        lambda x: x,
        lambda x: x * 1,
        lambda x: x + 0,
        lambda x: x / 1.0,
        lambda x: x - 0,
        lambda x: x.clone(),
        lambda x: x.view(6, 4).view(4, 6),
        lambda x: x.t().t(),
        lambda x: x.to(torch.float64).to(torch.float32),
        lambda x: x.detach(),
        lambda x: x.unsqueeze(1).squeeze(1),
        lambda x: x.expand(4, 6),
        lambda x: x[:],
        lambda x: x.contiguous(),
    ),
    "silu": (F.silu, lambda x: x / (1 + torch.exp(-x)), lambda x: x / (torch.exp(-x) + 1.0)),
    "sigmoid product": (
        lambda x: x * torch.sigmoid(x),
        lambda x: torch.sigmoid(x) * x,
        lambda x: x * (1 / (1 + torch.exp(-x))),
        lambda x: x * (1 + torch.exp(-x)).reciprocal(),
    ),
    "clamp": (
        lambda x: x.clamp(-1, 2),
        lambda x: x.clamp_min(-1).clamp_max(2),
        lambda x: x.clamp_max(2.0).clamp_min(-1.0),
        lambda x: torch.maximum(torch.minimum(x, torch.full_like(x, 2)), torch.full_like(x, -1)),
        lambda x: F.hardtanh(x, -1.0, 2.0),
    ),
    "square": (lambda x: x * x, lambda x: x.pow(2), lambda x: x.square()),
    "difference": (lambda x: x - 3, lambda x: x + (-3), lambda x: torch.add(x, -3.0)),
    "commutative": (lambda x: x * x.exp(), lambda x: x.exp() * x),
    "sum": (lambda x: x + x.exp(), lambda x: x.exp() + x),
    "constant": (
        lambda x: x * 2,
        lambda x: x * torch.full_like(x, 2.0),
        lambda x: 2.0 * x,
        lambda x: x * torch.full((1,), 2.0),
    ),
    "reciprocal": (lambda x: 1 / x, lambda x: x.reciprocal(), lambda x: torch.ones_like(x) / x),
    "from a number": (lambda x: 1 - x, lambda x: torch.rsub(x, 1), lambda x: torch.full_like(x, 1.0) - x),
    "roots": (lambda x: x.pow(-0.5), torch.rsqrt),
    "absolute maximum": (
        lambda x: x.abs().amax(-1, True),
        lambda x: x.abs().max(-1, True).values,
        lambda x: torch.maximum(-x.amin(-1, True), x.amax(-1, True)),
        lambda x: torch.maximum(x.amax(1, True), -x.amin(1, True)),
        lambda x: torch.linalg.vector_norm(x, math.inf, -1, True),
        lambda x: torch.maximum(x.amin(-1, True).abs(), x.amax(-1, True).abs()),
        lambda x: x.abs().amax(-1).unsqueeze(-1),
        lambda x: torch.maximum(-x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)).unsqueeze(-1),
    ),
    "maximum": (lambda x: x.amax(1), lambda x: x.max(-1).values, lambda x: torch.aminmax(x, dim=1).max),
    "first half": (
        lambda x: x.chunk(2, -1)[0],
        lambda x: x.split(3, 1)[0],
        lambda x: x[:, :3],
        lambda x: x.narrow(1, 0, 3),
        lambda x: x.unflatten(-1, (2, 3))[:, 0],
        lambda x: x.view(4, 2, 3).unbind(1)[0],
        lambda x: x[..., :-3],
        lambda x: torch.split(x, [3, 3], -1)[0],
    ),
    "second half": (
        lambda x: x.chunk(2, -1)[1],
        lambda x: x[:, 3:],
        lambda x: x[:, -3:],
        lambda x: x.narrow(1, 3, 3),
        lambda x: x.unflatten(-1, (2, 3)).select(1, 1),
        lambda x: x.unflatten(-1, (2, 3))[:, -1],
    ),
    "slice": (
        lambda x: x[:, 1:5],
        lambda x: x.narrow(1, 1, 4),
        lambda x: x[:, 1:-1],
        lambda x: x.split([1, 4, 1], 1)[1],
    ),
    "transposed": (
        lambda x: x.t(),
        lambda x: x.transpose(0, 1),
        lambda x: x.permute(1, 0),
        lambda x: x.permute(-1, -2),
    ),
    "reshaped": (
        lambda x: x.view(2, 12),
        lambda x: x.reshape(2, 12),
        lambda x: x.flatten().view(2, 12),
        lambda x: x.view(24).unflatten(0, (2, 12)),
    ),
    "selected where zero": (lambda x: torch.where(x == 0, 1.0, x), lambda x: torch.where(x != 0, x, 1.0)),
    "mean": (lambda x: x.mean(-1, keepdim=True), lambda x: x.mean(1).unsqueeze(1)),
}


@pytest.mark.parametrize("case", SAME)
@pytest.mark.parametrize("shape", [(4, 6)])
def test_same(case: str, shape: tuple[int, ...]) -> None:
    fns = SAME[case]
    x = x32(*shape).abs() + 0.1
    found = terms(lambda x: [fn(x) for fn in fns], x)
    values = [fn(x) for fn in fns]
    for fn, term, value in zip(fns, found, values, strict=True):
        torch.testing.assert_close(value, values[0], rtol=1e-6, atol=1e-6)
        same = (
            term is found[0]
            if not term.drift and not found[0].drift
            else (term.op, term.args) == (found[0].op, found[0].args)
        )
        assert same, f"{fn}: {term} is not {found[0]}"


DIFFERENT: dict[str, tuple[Unary, ...]] = {
    "numbers": (
        lambda x: x * 2,
        lambda x: x * 2.5,
        lambda x: x / 2,
        lambda x: x + 2,
        lambda x: x - 2,
        lambda x: 2 - x,
        lambda x: 2 / x,
    ),
    "alpha": (lambda x: torch.add(x, x.exp(), alpha=2), lambda x: x + x.exp()),
    "alpha of sub": (lambda x: torch.sub(x, x.exp(), alpha=2), lambda x: x - x.exp()),
    "alpha of rsub": (lambda x: torch.rsub(x, 3, alpha=2), lambda x: 3 - x),
    "order": (lambda x: x - x.exp(), lambda x: x.exp() - x, lambda x: x / x.exp(), lambda x: x.exp() / x),
    "rounding mode": (
        lambda x: x / 3,
        lambda x: torch.div(x, 3, rounding_mode="floor"),
        lambda x: torch.div(x, 3, rounding_mode="trunc"),
    ),
    "decimals": (torch.round, lambda x: torch.round(x, decimals=1), torch.floor, torch.ceil, torch.trunc),
    "bounds": (
        lambda x: x.clamp(-1, 2),
        lambda x: x.clamp(-1, 1),
        lambda x: x.clamp(min=-1),
        lambda x: x.clamp(max=2),
    ),
    "inverted bounds": (lambda x: x.clamp_min(2).clamp_max(-1), lambda x: x.clamp_max(-1).clamp_min(2)),
    "gelu": (lambda x: F.gelu(x), lambda x: F.gelu(x, approximate="tanh"), F.silu, F.relu, torch.sigmoid),
    "dims": (
        lambda x: x.abs().amax(-1, True),
        lambda x: x.abs().amax(0, True),
        lambda x: x.abs().amax(),
        lambda x: x.amax(-1, True),
    ),
    "norms": (
        lambda x: torch.linalg.vector_norm(x, math.inf, -1),
        lambda x: torch.linalg.vector_norm(x, 2, -1),
        lambda x: torch.linalg.vector_norm(x, 1, -1),
    ),
    "halves": (
        lambda x: x[:, :3],
        lambda x: x[:, 3:],
        lambda x: x[:, ::2],
        lambda x: x[:, 1::2],
        lambda x: x[:, :2],
        lambda x: x[:, 1:4],
    ),
    "views": (lambda x: x.t(), lambda x: x.reshape(6, 4)),
    "random": (torch.rand_like, torch.rand_like),
    "dropout": (lambda x: F.dropout(x, 0.5), lambda x: F.dropout(x, 0.5)),
    "dtypes": (lambda x: x.to(BF16).float(), lambda x: x.half().float(), lambda x: x),
    "sums": (lambda x: x.sum(-1), lambda x: x.mean(-1)),
    "not silu": (
        F.silu,
        lambda x: x / (2 + torch.exp(-x)),
        lambda x: x / (1 + torch.exp(x)),
        lambda x: x.exp() / (1 + torch.exp(-x)),
        lambda x: x / (1 - torch.exp(-x)),
    ),
    "not the largest magnitude": (
        lambda x: x.abs().amax(-1, True),
        lambda x: torch.maximum(x.amin(-1, True), x.amax(-1, True)),
        lambda x: torch.maximum(-x.amin(-1, True), (x + 1).amax(-1, True)),
        lambda x: torch.maximum(-x.amin(-1, True).clamp(max=1), x.amax(-1, True)),
        lambda x: torch.minimum(-x.amin(-1, True), x.amax(-1, True)),
    ),
    "where": (
        lambda x: torch.where(x == 0, 1.0, x),
        lambda x: torch.where(x == 0, x, 1.0),
        lambda x: torch.where(x == 1, 1.0, x),
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_different(case: str) -> None:
    found = terms(lambda x: [fn(x) for fn in DIFFERENT[case]], x32())
    assert len({(t.op, t.args, t.dtype) for t in found}) == len(found)


def test_sixteen_bits_are_float32_and_one_rounding() -> None:
    (product,) = terms(lambda a, b: a * b, x32().to(BF16), x32().to(BF16))
    assert (product.op, product.dtype) == ("cast", BF16)
    (inner,) = (product.args[0],)
    assert (inner.op, inner.dtype) == ("mul", torch.float32)
    assert all(a.op == "cast" and a.args[0].op == "input" for a in inner.args)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_decomposed_and_not_are_one_term(dtype: torch.dtype) -> None:
    """What Inductor writes out with casts is what the 16-bit operator means."""

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.float()
        return F.silu(x), (wide / (1 + torch.exp(-wide))).to(dtype)

    short, long = terms(both, x32().to(dtype))
    assert short.op == long.op == "cast"
    assert (short.args[0].op, short.args[0].args) == (long.args[0].op, long.args[0].args)


def test_exact_round_trips_disappear() -> None:
    x = x32().to(BF16)
    kept = terms(lambda x: [x.float().to(BF16), x, x.double().to(BF16)], x)
    assert kept[0] is kept[1] is kept[2]
    rounded = terms(lambda x: [x.to(BF16).float(), x], x32())
    assert rounded[0] is not rounded[1] and rounded[0].op == "cast"


@pytest.mark.parametrize(
    "keeps,exact",
    [
        (lambda x: x.abs(), True),
        (lambda x: -x, True),
        (lambda x: x.amax(-1), True),
        (lambda x: x.round(), True),
        (lambda x: x.clamp(-128, 127), True),
        (lambda x: x.clamp(min=0.1), False),
        (lambda x: x.clamp(min=-math.inf), False),
        (lambda x: x * 2, False),
        (lambda x: x.exp(), False),
    ],
)
def test_what_a_rounding_leaves_alone(keeps: Unary, exact: bool) -> None:
    wide, again = terms(lambda x: [keeps(x.float()), keeps(x.float()).to(BF16).float()], x32().to(BF16))
    assert representable(wide, BF16) is exact
    assert (wide is again) is exact


def test_integers_times_sixteen_bits_are_rounded_first() -> None:
    """PyTorch converts the int32 operand to bfloat16, not to float32."""
    p = torch.randint(-(2**20), 2**20, (4, 6), dtype=torch.int32)
    scale = x32(6).to(BF16)
    (product,) = terms(lambda p, s: p * s, p, scale)
    widened = next(a for a in product.args[0].args if a.args[0].op == "cast")
    assert widened.args[0].dtype == BF16 and widened.args[0].args[0].dtype == torch.int32
    assert torch.equal(p * scale, (p.to(BF16).float() * scale.float()).to(BF16))


def test_int32_products_are_one() -> None:
    q = torch.randint(-9, 9, (32, 16), dtype=torch.int8)
    w = torch.randint(-9, 9, (16, 8), dtype=torch.int8)
    ones = torch.ones(8)
    found = terms(
        lambda q, w, s: [
            torch._int_mm(q, w),
            q.int() @ w.int(),
            torch.ops.npu.npu_quant_matmul(q, w, s, output_dtype=torch.int32),
            torch.mm(q.to(torch.int32), w.to(torch.int32)),
        ],
        q,
        w,
        ones,
    )
    assert all(t is found[0] for t in found) and found[0].op == "int_mm"
    floats = terms(lambda q, w: [q.float() @ w.float(), q.to(BF16) @ w.to(BF16)], q, w)
    assert [t.op for t in floats] == ["mm", "mm"] and {t.dtype for t in floats} == {torch.float32, BF16}


def test_one_element_constants_are_numbers() -> None:
    def scaled(x: Tensor) -> list[Tensor]:
        return [
            x * torch.tensor(3.0),
            x * 3.0,
            x.clamp(torch.tensor(-1.0), torch.tensor(1.0)),
            x.clamp(-1, 1),
        ]

    a, b, c, d = terms(scaled, x32())
    assert a is b and c is d


def test_unknown_operators_are_not_looked_into() -> None:
    a, b = terms(lambda x: [torch.special.bessel_j0(x), torch.special.bessel_j0(x)], x32())
    assert a.op == b.op == "input" and a is not b


def test_reading_after_a_write_is_another_value() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    value = x32()
    first = graph.call_function(aten.exp.default, (x,))
    graph.call_function(aten.copy_.default, (x, y))
    second = graph.call_function(aten.exp.default, (x,))
    graph.output((first, second))
    for node in graph.nodes:
        node.meta["val"] = value
    view = TermGraph(graph)
    assert view.of[first].op == "exp" and view.of[first] is not view.of[second]


def test_users() -> None:
    view, (total,) = viewed(lambda x: x.exp() + x.exp().abs(), x32())
    (exponential,) = {a for a in total.args if a.op == "exp"}
    assert {u.op for u in view.users(exponential)} == {"add", "abs"}
    assert view.users(total) == []


def test_synthetic_shapes_are_the_real_ones() -> None:
    def many(x: Tensor) -> list[Tensor]:
        a, b = x.chunk(2, -1)
        m = x.abs().amax(-1, True)
        return [
            a * b,
            m,
            x / m,
            x.mean(0, True),
            x[:, 1:4],
            x.t(),
            x.sum(-1, True),
            x.amin(0, True),
            x.view(2, 12),
            x.exp(),
        ]

    view, _ = viewed(many, x32())
    checked = 0
    for term in view.terms:
        if term.op not in ("input", "const"):
            assert shape_of(term) == term.shape, term
            checked += 1
    assert checked > 10


def test_a_term_that_is_no_tensor_has_no_shape() -> None:
    view = TermGraph(fx.Graph())
    with pytest.raises(ValueError, match="the shape of mystery is not known"):
        assert view.make("mystery", (), torch.float32).shape


def test_one_rule_per_operator() -> None:
    known = next(iter(RULES))
    with pytest.raises(ValueError, match="has two canonicalization rules"):
        rule(known)(lambda view, node, args: Term("x", (), None, (), 0))


SPLITS: dict[str, Callable[[Tensor, int], tuple[Tensor, ...]]] = {
    "chunk": lambda x, n: x.chunk(2, -1),
    "split": lambda x, n: x.split(x.shape[-1] // 2, -1)[:2],
    "slices": lambda x, n: (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]),
}


@pytest.mark.parametrize("case", SPLITS)
def test_halves_of_symbolic_sizes(case: str) -> None:
    def halves(x: Tensor) -> tuple[Tensor, ...]:
        return SPLITS[case](x, 0)

    graph = make_fx(halves, tracing_mode="symbolic")(x32(5, 8)).graph
    view = TermGraph(graph)
    (results,) = next(n for n in graph.nodes if n.op == "output").args
    first, second = (view.of[r] for r in results)
    assert (first.op, first.args[1]) == ("half", 0)
    assert (second.op, second.args[1]) == ("half", 1)
    assert first.args[0] is second.args[0]
