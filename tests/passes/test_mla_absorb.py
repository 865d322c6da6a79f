"""Multi-head latent attention as transformers writes it, absorbed: near misses are in the second half."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from npu_fusion.config import FusionConfig
from npu_fusion.passes import pipeline
from npu_fusion.passes.pattern import FUSIONS, Context, Match
from npu_fusion.passes.rewrite import Emitter, Rewriter
from npu_fusion.passes.terms import Term
from tests.passes._harness import DIALECTS, Outcome, fuse

B, N, S, L, C, D, DR = 2, 4, 3, 40, 32, 16, 8
MOST = 31
"""Queries with which absorbing still pays where values have a size of 16: less than 32 * 32 / (64 - 32)."""


@dataclass(frozen=True)
class Form:
    attention: str = "flash"
    """``flash`` and ``math``: the operator, which on a CPU is kept or written out; ``eager``: model code."""
    key: str = "filled"
    cache: str = "none"
    causal: bool = False
    mask: bool = True

    @property
    def value(self) -> int:
        return D + DR if self.attention == "flash" else 24 - DR

    def __str__(self) -> str:
        return "-".join(f"{v}" for v in vars(self).values())


FLASH, MATH, EAGER = Form("flash"), Form("math"), Form("eager")


class Latent(nn.Module):
    """Keys and values expanded from a latent and attended to, as transformers' ``expand_kv`` and after it."""

    def __init__(self, form: Form, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.kv_b_proj = nn.Linear(C, N * (D + form.value), bias=bias)
        nn.init.normal_(self.kv_b_proj.weight, std=C**-0.5)

    def expanded(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        b, _, length, _ = latent.shape
        both = self.kv_b_proj(latent).view(b, length, -1, D + self.form.value).transpose(1, 2)
        nope, value = both.split([D, self.form.value], -1)
        rotary = rotary.expand(-1, nope.shape[1], -1, -1)
        if self.form.key == "cat":
            return torch.cat((nope, rotary), -1), value
        key = both.new_empty(*both.shape[:-1], D + rotary.shape[-1])
        key[..., :D].copy_(nope)
        key[..., D:].copy_(rotary)
        return key, value

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scale = 0.3
        if self.form.attention != "eager":
            return F.scaled_dot_product_attention(
                query, key, value, mask, scale=scale, is_causal=self.form.causal
            )
        scores = query @ key.transpose(2, 3) * scale
        if mask is not None:
            scores = scores + mask
        return F.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value

    def cached(self, rows: Tensor, past: Tensor) -> Tensor:
        if self.form.cache == "none":
            return past
        if self.form.cache == "grown":
            return torch.cat((past, rows), -2)
        return past.index_copy(2, torch.arange(rows.shape[2]) + 5, rows)

    def forward(
        self, query: Tensor, turned: Tensor, past: list[Tensor], new: list[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        b, _, s, _ = turned.shape
        plain = query.view(b, s, N, D).transpose(1, 2)
        latent, rotary = (self.cached(rows, held) for rows, held in zip(new, past, strict=True))
        key, value = self.expanded(latent, rotary)
        result = self.attended(torch.cat((plain, turned), -1), key, value, mask)
        return result.transpose(1, 2).reshape(b, s, -1)


def data(form: Form, dtype: torch.dtype = torch.float32, s: int = S) -> list[Any]:
    g = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=g).to(dtype)
        torch._dynamo.mark_static(tensor, len(shape) - 1)
        return tensor

    keys = L + s if form.cache == "grown" else L
    past, new = [random(B, 1, L, C), random(B, 1, L, DR)], [random(B, 1, s, C), random(B, 1, s, DR)]
    mask = None
    if form.mask:
        seen = torch.arange(keys)[None] <= torch.arange(s)[:, None] + keys - s
        mask = torch.zeros(1, 1, s, keys).masked_fill(~seen, -torch.inf).to(dtype)
    return [random(B, s, N * D), random(B, N, s, DR), past, new, mask]


def symbolic(form: Form) -> list[Any]:
    """The batch and the length of the cache may be symbolic, the number of queries not."""
    args = data(form)
    for tensor in (args[0], args[1], *args[3]):
        torch._dynamo.mark_static(tensor, 1)
        torch._dynamo.mark_static(tensor, tensor.dim() - 2)
    if form.mask:
        torch._dynamo.mark_static(args[4], 2)
    return args


def run(form: Form, model: nn.Module | None = None, args: list[Any] | None = None, **options: Any) -> Outcome:
    options = {"numerics": "relaxed", **options}
    args = data(form) if args is None else args
    return fuse(model or Latent(form), args, **options)


def traced(model: nn.Module, *args: Any) -> fx.Graph:
    """The graph of a model that does not have to run."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def call(weights: dict[str, Tensor], *args: Any) -> Any:
        return torch.func.functional_call(model, weights, args)

    graph = make_fx(call, tracing_mode="fake")(weights, *args).graph
    graph.eliminate_dead_code()
    return graph


def near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def is_absorbed(got: Outcome, form: Form, dialect: str = "aot") -> None:
    assert got.fused == {"mla_absorb": 1}
    assert got.report.fusions[0].level == "relaxed"
    before, after = got.report.operators_before, got.report.operators_after
    written_out = form.attention != "flash"
    # to the latent and from it for each head, and the two products of attention if those were there
    assert after["aten.bmm"] == 2 + 2 * written_out == before.get("aten.bmm", 0) + 2
    assert "aten.mm" in before and "aten.mm" not in after
    assert "aten.new_empty" not in after and "aten.slice_scatter" not in after
    operator = "aten._scaled_dot_product_flash_attention_for_cpu"
    assert after.get(operator, 0) == before.get(operator, 0) == int(not written_out)


FORMS = [
    FLASH,
    MATH,
    EAGER,
    *(Form(a, "cat") for a in ("flash", "math", "eager")),
    *(Form(a, cache=c) for a in ("flash", "math", "eager") for c in ("static", "grown")),
    Form("flash", mask=False),
    Form("eager", mask=False),
    Form("flash", causal=True, mask=False),
    Form("math", causal=True, mask=False),
]


@pytest.mark.by_turns("dialect")
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_absorbs(form: Form, dialect: str) -> None:
    got = run(form, dialect=dialect, verify=True)
    is_absorbed(got, form)
    near(got.result, got.expected)


@pytest.mark.by_turns("dialect")
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("form", [f for f in FORMS if not f.causal], ids=str)
def test_with_symbolic_sizes(form: Form, dialect: str) -> None:
    got = run(form, args=symbolic(form), dialect=dialect, dynamic=True)
    is_absorbed(got, form)
    assert "Sym" in got.before
    near(got.result, got.expected)


@pytest.mark.parametrize("form", [FLASH, MATH, EAGER], ids=str)
def test_one_query_of_one_sequence(form: Form) -> None:
    args = data(form, s=1)
    args = [a if a is None else [t[:1] for t in a] if isinstance(a, list) else a[:1] for a in args]
    got = run(form, args=args)
    is_absorbed(got, form)
    near(got.result, got.expected)


def in_float64(model: nn.Module, args: list[Any]) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double()(
            *(
                a if a is None else [t.double() for t in a] if isinstance(a, list) else a.double()
                for a in args
            )
        )


@pytest.mark.parametrize(
    ("dtype", "dialect"),
    [(torch.float32, "aot"), (torch.bfloat16, "aot"), (torch.bfloat16, "inductor"), (torch.float16, "aot")],
)
@pytest.mark.parametrize("form", [FLASH, MATH, EAGER], ids=str)
def test_against_float64(form: Form, dtype: torch.dtype, dialect: str) -> None:
    """``relaxed`` is what it says: in 16 bits the result may be further off; here not three times."""
    model, args = Latent(form).to(dtype), data(form, dtype)
    got = run(form, model, args, dialect=dialect)
    is_absorbed(got, form)
    exact = in_float64(model, args)
    eager, absorbed = (torch.linalg.vector_norm(t.double() - exact) for t in (got.expected, got.result))
    assert absorbed <= 3 * eager


class Widened(Latent):
    """Attention is in float32, the rest of the model in 16 bits."""

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else wide(mask)
        return super().attended(wide(query), wide(key), wide(value), mask)


class WidenedScores(Latent):
    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        weights = F.softmax(wide(query) @ wide(key).transpose(2, 3) * 0.3 + mask, -1)
        return weights.to(value.dtype) @ value


class WidenedValues(Latent):
    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.softmax(wide(query @ key.transpose(2, 3) * 0.3 + mask), -1) @ wide(value)


class WidenedPieces(Widened):
    """Each part of query and key is widened, then put together."""

    def expanded(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        b, _, length, _ = latent.shape
        both = self.kv_b_proj(latent).view(b, length, N, -1).transpose(1, 2)
        return torch.cat((wide(both[..., :D]), wide(rotary.expand(-1, N, -1, -1))), -1), both[..., D:]

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        both = torch.cat((wide(query[..., :D]), wide(query[..., D:])), -1)
        return super().attended(both, key, value, mask)


class WidenedWhole(Widened):
    """The query is not seen in parts."""

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        factor = 1 + 0.1 * torch.arange(query.shape[2], dtype=query.dtype)[:, None]
        return super().attended(query * factor, key, value, mask)


class FloatQuery(Widened):
    """The query is no widened one."""

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return super().attended(torch.sin(wide(query)), key, value, mask)


def wide(x: Tensor) -> Tensor:
    """float32 of 16 bits; in float64, exact, as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("model", "form", "products"),
    [
        # by W_UK, the scores, the sums, by W_UV; where an operator attends, the first and the last
        *((m, FLASH, "ll") for m in (Widened, WidenedPieces, WidenedWhole)),
        (FloatQuery, FLASH, "fl"),
        (Widened, MATH, "lffl"),
        *((m, EAGER, "lffl") for m in (Widened, WidenedPieces, WidenedWhole)),
        (FloatQuery, EAGER, "fffl"),
        (WidenedScores, EAGER, "lfll"),
        (WidenedValues, EAGER, "llfl"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_float32(
    model: type[Latent], form: Form, products: str, dtype: torch.dtype, dialect: str
) -> None:
    """The products with the weight are in 16 bits, ``l``, those of attention in what the source has."""
    low = model(form).to(dtype)
    args = data(form, dtype)
    got = run(form, low, args, dialect=dialect)
    is_absorbed(got, form)
    shown = {"l": {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype], "f": "f32"}
    made = re.findall(r'"(\w+)\[[^"]*" = torch.ops.aten.bmm.default', got.code)
    assert made == [shown[p] for p in products]
    rounded = f"the attended latent is rounded to {str(dtype)[6:]}, the dtype of W_UV"
    assert (rounded in got.report.fusions[0].notes) == (model is not WidenedScores)
    assert got.result.dtype == got.expected.dtype
    exact = in_float64(low, args)
    error = torch.linalg.vector_norm(got.result.double() - exact)
    assert error <= torch.finfo(dtype).eps * torch.linalg.vector_norm(exact)


class InTwo(Latent):
    """The weight is put together in the graph from what it is taken apart into."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        whole = self.kv_b_proj.weight.detach().view(N, D + form.value, C)
        self.w_uk = nn.Parameter(whole[:, :D].clone())
        self.w_uv = nn.Parameter(whole[:, D:].clone())
        self.kv_b_proj = lambda x: F.linear(x, torch.cat((self.w_uk, self.w_uv), 1).view(-1, C))  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "kv_b_proj" and not isinstance(value, nn.Module):
            del self._modules[name]
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("form", [FLASH, MATH, EAGER], ids=str)
def test_a_weight_in_two_parts_is_not_put_together(form: Form, dialect: str) -> None:
    got = run(form, InTwo(form), dialect=dialect)
    is_absorbed(got, form)
    near(got.result, got.expected)
    query_and_key_only = 2
    assert got.report.operators_after["aten.cat"] == query_and_key_only


class Turned(Latent):
    """A weight of [C, N*(D+Dv)], as a Conv1D has it."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.weight = nn.Parameter(self.kv_b_proj.weight.detach().T.contiguous())

    def expanded(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        b, _, length, _ = latent.shape
        both = (latent.reshape(-1, C) @ self.weight).view(b, length, N, -1).transpose(1, 2)
        return torch.cat((both[..., :D], rotary.expand(-1, N, -1, -1)), -1), both[..., D:]


class ValueFirst(Latent):
    """Values stand before the keys in each head."""

    def expanded(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        b, _, length, _ = latent.shape
        both = self.kv_b_proj(latent).view(b, length, N, -1).transpose(1, 2)
        value, nope = both.split([self.form.value, D], -1)
        return torch.cat((nope, rotary.expand(-1, N, -1, -1)), -1), value


class FirstRows(Latent):
    """A cache with more rows than are attended to, as a fresh StaticCache."""

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rows = query.shape[2]
        return super().attended(query, key[:, :, :rows], value[:, :, :rows], mask[..., :rows])


class WithoutRotary(Latent):
    """All of the key is expanded."""

    def expanded(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        return super().expanded(latent, rotary[..., :0])

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return super().attended(query[..., :D], key, value, mask)


class ScaledQuery(Latent):
    """The whole query is multiplied by a factor of its position, as in Mistral 4."""

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        factor = 1 + 0.1 * torch.arange(query.shape[2], dtype=query.dtype)[:, None]
        return super().attended(query * factor, key, value, mask)


class ScaledBefore(Latent):
    """Numbers stand on query and key instead of the scores."""

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = (query * 0.5) @ (key / 2).transpose(2, 3)
        return F.softmax(scores + mask, -1) @ value


class ScaledBySize(Latent):
    """A number that is a size, and in dynamic graphs a symbol."""

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = (query * key.shape[2] * 0.02) @ (key / 2).transpose(2, 3)
        return F.softmax(scores + mask, -1) @ value


class ScaledKey(Latent):
    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = query @ (key / key.shape[2]).transpose(2, 3)
        return F.softmax(scores + mask, -1) @ value


class DividedByZero(Latent):
    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = torch.clamp((query / 0) @ key.transpose(2, 3), -10, 10).nan_to_num(1)
        return F.softmax(scores + mask, -1) @ value


class Capped(Latent):
    """What is between the two products is kept, whatever it is."""

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = 5 * torch.tanh(query @ key.transpose(2, 3) / 5)
        return F.softmax(torch.where(mask < 0, mask, scores), -1) @ value


class DefaultScale(Latent):
    """The operator takes its scale from the size of the head, which changes."""

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("model", "form"),
    [
        *((m, f) for m in (Turned, ValueFirst, FirstRows, ScaledQuery) for f in (FLASH, MATH, EAGER)),
        *((m, f) for m in (DefaultScale,) for f in (FLASH, MATH)),
        (ScaledBefore, EAGER),
        (ScaledBySize, EAGER),
        (ScaledKey, EAGER),
        (Capped, EAGER),
    ],
)
def test_other_spellings(model: type[Latent], form: Form, dialect: str) -> None:
    got = run(form, model(form), dialect=dialect)
    is_absorbed(got, form)
    near(got.result, got.expected)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_symbolic_size_as_a_factor(dialect: str) -> None:
    got = run(EAGER, ScaledBySize(EAGER), symbolic(EAGER), dialect=dialect, dynamic=True)
    is_absorbed(got, EAGER)
    assert "Sym" in got.before
    near(got.result, got.expected)
    refused(run(EAGER, ScaledKey(EAGER), symbolic(EAGER), dialect=dialect, dynamic=True))


def test_a_division_by_zero_is_no_factor() -> None:
    got = run(EAGER, DividedByZero(EAGER))
    is_absorbed(got, EAGER)
    assert got.result.isfinite().all()  # that the signs of infinities are those of the source is not asked


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("form", [MATH, EAGER], ids=str)
def test_without_a_rotary_key(form: Form, dialect: str) -> None:
    """Here keys and values have one size, so that ``MATH`` is kept as an operator."""
    got = run(form, WithoutRotary(form), dialect=dialect)
    is_absorbed(got, FLASH if form == MATH else EAGER)
    near(got.result, got.expected)


def test_the_query_is_projected_by_one_product_for_each_head() -> None:
    """What mla_prolog looks for: bmm of [N, B*S, D] and a view of the weight."""
    got = run(FLASH)
    lines = [line for line in got.code.splitlines() if "aten.bmm.default" in line]
    widths = C, FLASH.value
    assert [f'"f32[{N}, {B * S}, {w}]"' in line for w, line in zip(widths, lines, strict=True)] == [True] * 2


# -- how much it pays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "absorbed"), [(1, True), (MOST, True), (MOST + 1, False)])
@pytest.mark.parametrize("form", [MATH, EAGER], ids=str)
def test_only_while_it_pays(form: Form, queries: int, absorbed: bool) -> None:
    got = run(form, args=data(form, s=queries))
    if absorbed:
        is_absorbed(got, form)
    else:
        refused(got, f"the query is too long for absorbing to pay: {queries} queries, at most {MOST}")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("queries", "guarded"), [(S, True), (MOST + 1, False)])
def test_a_symbolic_number_of_queries(queries: int, guarded: bool, dialect: str) -> None:
    args = data(EAGER, s=queries)
    got = run(EAGER, args=args, dialect=dialect, dynamic=True)
    refused(got, "the query is too long for absorbing to pay: s")
    assert got.reasons("mla_absorb")[0].endswith(
        f" queries, at most {MOST}; symbolic sizes leave it open (symbolic='guard' would decide)"
    )
    got = run(EAGER, args=args, dialect=dialect, dynamic=True, symbolic="guard")
    assert got.fused == ({"mla_absorb": 1} if guarded else {})
    near(got.result, got.expected)


# -- near misses ---------------------------------------------------------------------------------------------


def refused(got: Outcome, *reasons: str) -> None:
    """Refused with reasons that begin so, and the graph left as it was."""
    assert got.fused == {}
    given = got.reasons("mla_absorb")
    assert [g[: len(r)] for g, r in zip(given, reasons, strict=True)] == list(reasons)
    assert got.report.operators_after == got.report.operators_before
    results, expected = (r if isinstance(r, tuple) else (r,) for r in (got.result, got.expected))
    for a, b in zip(results, expected, strict=True):
        if "prims." in got.before or "aten.reshape" in got.before:  # Inductor writes softmax out
            near(a, b)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("numerics", ["strict", "accurate"])
def test_it_needs_relaxed_numerics(numerics: str, dialect: str) -> None:
    got = run(FLASH, dialect=dialect, numerics=numerics)
    refused(
        got,
        f"numerics='{numerics}' does not allow the difference: attention to the latent: W_UK and W_UV are "
        "multiplied to query and result, not to keys and values (needs 'relaxed')",
    )


def test_switched_off() -> None:
    refused(run(FLASH, mla_absorb=False))


class Biased(Latent):
    def __init__(self, form: Form) -> None:
        super().__init__(form, bias=True)


class WithValues(Latent):
    """The expanded values are a result, too."""

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
        self.values = value
        return super().attended(query, key, value, mask)

    def forward(self, *args: Any) -> Any:
        return super().forward(*args), self.values * 2


class WithWeights(Latent):
    """What softmax gives is a result, too, as with ``output_attentions``."""

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
        self.weights = F.softmax(query @ key.transpose(2, 3) + mask, -1)
        return self.weights @ value

    def forward(self, *args: Any) -> Any:
        return super().forward(*args), self.weights * 2


class WithLogSumExp(Latent):
    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        result, self.sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask
        )
        return result

    def forward(self, *args: Any) -> Any:
        return super().forward(*args), self.sums * 2


class WeightDropout(Latent):
    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        weights = F.softmax(query @ key.transpose(2, 3) + mask, -1)
        return torch.ops.aten.native_dropout(weights, 0.0, True)[0] @ value


class ComputedWeight(Latent):
    def expanded(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        b, _, length, _ = latent.shape
        weight = self.kv_b_proj.weight * 2
        both = F.linear(latent, weight).view(b, length, N, -1).transpose(1, 2)
        return torch.cat((both[..., :D], rotary.expand(-1, N, -1, -1)), -1), both[..., D:]


class LastRow(Latent):
    """Only the weights of the last query are multiplied by the values."""

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        weights = F.softmax(query @ key.transpose(2, 3) + mask, -1)
        return (weights[:, :, -1:] @ value).expand(-1, -1, query.shape[2], -1)


class RotaryOfEachHead(Latent):
    def expanded(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        many = rotary * torch.arange(1, N + 1)[:, None, None]
        return super().expanded(latent, many)


class TwoLatents(Latent):
    """A latent for each half of the heads."""

    def expanded(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        b, _, length, _ = latent.shape
        half = torch.cat((latent, latent.flip(-1)), 1)
        both = F.linear(half, self.kv_b_proj.weight[: N // 2 * (D + self.form.value)])
        both = both.view(b, 2, length, N // 2, -1).transpose(2, 3).reshape(b, N, length, -1)
        return torch.cat((both[..., :D], rotary.expand(-1, N, -1, -1)), -1), both[..., D:]


class MixedHeads(Latent):
    """The values of a head are those of its neighbour's keys."""

    def expanded(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        b, _, length, _ = latent.shape
        both = self.kv_b_proj(latent).view(b, length, -1, N).permute(0, 3, 1, 2)
        return torch.cat((both[..., :D], rotary.expand(-1, N, -1, -1)), -1), both[..., D:]


SECOND_USER = "an intermediate value that the fused operator does not return has a second user: "


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("model", "form", "reason"),
    [
        *((Biased, f, "the expansion of the latent has a bias: ") for f in (FLASH, MATH, EAGER)),
        *((WithValues, f, SECOND_USER) for f in (FLASH, MATH, EAGER)),
        (WithWeights, EAGER, SECOND_USER),
        (
            LastRow,
            EAGER,
            "the attention weights have another shape than the scores: [8, 1, 40] and [8, 3, 40]",
        ),
        (WithLogSumExp, FLASH, "another result of the attention operator is used: "),
        *(
            (ComputedWeight, f, "the weight of the expansion is computed in the graph: by ")
            for f in (FLASH, MATH, EAGER)
        ),
        *(
            (RotaryOfEachHead, f, "the rotary key is not one for all heads: it is [2, 4, 40, 8]")
            for f in (FLASH, EAGER)
        ),
        *(
            (m, f, "keys and values are not the heads of one latent: ")
            for m in (TwoLatents, MixedHeads)
            for f in (FLASH, EAGER)
        ),
    ],
)
def test_near_misses(model: type[Latent], form: Form, reason: str, dialect: str) -> None:
    refused(run(form, model(form), dialect=dialect), reason)


class ExpandedCaches(Latent):
    """Keys and values are cached, as up to transformers 4.57."""

    def forward(
        self, query: Tensor, turned: Tensor, past: list[Tensor], new: list[Tensor], mask: Any
    ) -> Tensor:
        b, _, s, _ = turned.shape
        fresh = Latent.expanded(self, *new)
        key, value = (self.cached(rows, held) for rows, held in zip(fresh, past, strict=True))
        plain = query.view(b, s, N, D).transpose(1, 2)
        result = self.attended(torch.cat((plain, turned), -1), key, value, mask)
        return result.transpose(1, 2).reshape(b, s, -1)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("cache", ["static", "grown"])
@pytest.mark.parametrize("attention", ["flash", "math", "eager"])
def test_expanded_caches_are_refused(attention: str, cache: str, dialect: str) -> None:
    form = Form(attention, cache=cache)
    args = data(form)
    args[2] = [torch.randn(B, N, L, D + DR), torch.randn(B, N, L, form.value)]
    got = run(form, ExpandedCaches(form), args, dialect=dialect)
    refused(
        got,
        "keys and values are cached after they were expanded: the cache would have to hold the latent",
    )


class Called(Latent):
    """The operator that a GPU has; its fake implementation runs anywhere."""

    dropout = 0.0

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        operator = torch.ops.aten._scaled_dot_product_flash_attention
        return operator(query, key, value, dropout_p=self.dropout, is_causal=True, scale=0.3)[0]


def explained(model: nn.Module, rank: int = C) -> list[str]:
    """Reasons for not absorbing in a graph that is traced only."""
    sizes = (B, S, N * D), (B, N, S, DR), (B, 1, L, rank), (B, 1, L, DR)
    query, turned, latent, rotary = (torch.empty(size) for size in sizes)
    graph = traced(model, query, turned, [latent, rotary], [latent, rotary])
    report = pipeline.run(graph, FusionConfig(numerics="relaxed", strict=True))
    return [f"{r.reason}: {r.detail}" for r in report.refused] + list(report.fused)


def test_kernels_for_small_heads_only() -> None:
    """CUDA's flash attention ends at 256, where the latent of DeepSeek is 512."""
    assert explained(Called(Form(key="cat"))) == ["mla_absorb"]
    wide = Called(Form(key="cat"))
    wide.kv_b_proj = nn.Linear(256, wide.kv_b_proj.out_features, bias=False)
    assert explained(wide, rank=256) == [
        "the attention operator takes no heads of the size of the latent: 264, at most 256"
    ]


@pytest.mark.parametrize("form", [FLASH, Form(causal=True, mask=False)], ids=str)
def test_the_operator_that_returns_one_tensor(form: Form) -> None:
    def undecomposed(graph: fx.Graph) -> None:
        (call,) = (n for n in graph.nodes if "scaled_dot" in str(n.target))
        (result,) = call.users
        with graph.inserting_after(call):
            whole = graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, *_one(call))
        whole.meta.update(result.meta)
        result.replace_all_uses_with(whole)
        graph.erase_node(result)
        graph.erase_node(call)

    got = run(form, prepare_graph=undecomposed)
    assert got.fused == {"mla_absorb": 1}
    assert got.report.operators_after["aten.scaled_dot_product_attention"] == 1
    near(got.result, got.expected)


def _one(call: fx.Node) -> tuple[Any, Any]:
    """Its arguments, by the names that all of these operators share."""
    names = [argument.name for argument in call.target._schema.arguments]
    return (), dict(zip(names, call.args, strict=False)) | dict(call.kwargs)


def test_dropout_between_the_products() -> None:
    reason = "attention with dropout: aten.native_dropout.default"
    refused(run(EAGER, WeightDropout(EAGER)), reason)


class Grouped(Called):
    """Two heads of the query for each of the keys."""

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return super().attended(torch.cat((query, query), 1), key, value, mask)


def test_grouped_queries() -> None:
    assert explained(Grouped(Form(key="cat"))) == [
        "the query has other heads than the keys: [2, 8, 3, 24] and 4 heads of keys"
    ]


def test_dropout_in_the_operator() -> None:
    model = Called(Form(key="cat"))
    model.dropout = 0.5
    assert explained(model) == ["attention with dropout: dropout_p=0.5"]


class Plain(nn.Module):
    """Attention with keys and values that are columns of one product, but no latent: nothing is near."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * N * D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, N, 3 * D).transpose(1, 2).chunk(3, -1)
        k = torch.cat((-k[..., : D // 2], k[..., D // 2 :]), -1)  # partly rotated
        return F.softmax(q @ k.transpose(2, 3), -1) @ v


@pytest.mark.parametrize("dialect", DIALECTS)
def test_other_attention_is_not_near(dialect: str) -> None:
    refused(fuse(Plain(), [torch.randn(B, S, C)], dialect=dialect, numerics="relaxed"))


# -- the stage of its own ------------------------------------------------------------------------------------


class Gated(Latent):
    """Something for the stages after it."""

    def forward(self, *args: Any) -> Tensor:
        gate, up = super().forward(*args).chunk(2, -1)
        return F.silu(gate) * up


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_comes_after_still_fuses(dialect: str) -> None:
    got = run(FLASH, Gated(FLASH), dialect=dialect)
    assert got.fused == {"mla_absorb": 1, "npu_swiglu": 1}
    assert "absorb" in got.report.timing
    near(got.result, got.expected)


@pytest.fixture
def after_absorbing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of ``swiglu`` a fusion that reads what absorbing emits: the product with W_UK."""

    def match(term: Term, context: Context) -> Match | None:
        if term.shape != (N, B * S, C):
            return None
        query, weight = term.args

        def build(e: Emitter) -> list[fx.Node]:
            return [e.call(torch.ops.aten.matmul.default, e.term(query), e.term(weight))]

        return Match([query, weight], [[term]], build)

    monkeypatch.setattr(FUSIONS["swiglu"], "anchors", ("bmm",))
    monkeypatch.setattr(FUSIONS["swiglu"], "match", match)


@pytest.mark.usefixtures("after_absorbing")
@pytest.mark.parametrize("dialect", DIALECTS)
def test_later_stages_see_what_was_absorbed(dialect: str) -> None:
    got = run(FLASH, dialect=dialect)
    assert got.fused == {"mla_absorb": 1, "npu_swiglu": 1}
    assert got.report.operators_after["aten.matmul"] == 1
    near(got.result, got.expected)
    assert run(FLASH, dialect=dialect, numerics="accurate").fused == {}


@pytest.mark.usefixtures("after_absorbing")
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dry_run_counts_what_the_real_run_makes(dialect: str) -> None:
    got = run(FLASH, dialect=dialect, dry_run=True)
    assert got.fused == {"mla_absorb": 1, "npu_swiglu": 1}
    assert got.report.operators_after == got.report.operators_before
    assert got.code == got.before
    assert all(fused.emitted == () for fused in got.report.fusions)
    assert all(
        f" {name}:" in got.before or f" {name} =" in got.before for name in got.report.fusions[0].nodes
    )
    assert got.report.fusions[1].nodes == ()  # they were never in this graph


@pytest.mark.usefixtures("after_absorbing")
def test_a_failing_clean_up_undoes_everything() -> None:
    def broken(graph: fx.Graph) -> None:
        def lint() -> None:
            raise RuntimeError("broken on purpose")

        graph.lint = lint  # type: ignore[method-assign]

    with pytest.warns(RuntimeWarning, match="clean up: RuntimeError: broken on purpose"):
        got = run(FLASH, strict=False, prepare_graph=broken)
    assert got.fused == {}
    assert got.code == got.before
    assert torch.equal(got.result, got.expected)


def test_a_failing_second_look_undoes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Rewriter) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(Rewriter, "look_again", broken)
    with pytest.warns(RuntimeWarning, match="canonicalize: RuntimeError: broken on purpose"):
        got = run(FLASH, strict=False)
    assert got.fused == {}
    assert got.code == got.before
    with pytest.raises(Exception, match="npu_fusion pass failed: canonicalize"):
        run(FLASH)


def test_the_code_of_the_stage_is_kept() -> None:
    form = Form("eager", "cat")
    graph = traced(Latent(form), *data(form))
    report = pipeline.run(graph, FusionConfig(numerics="relaxed", strict=True), keep_stages=True)
    stages = dict(report.stages)
    assert list(stages) == ["before", "absorb", "compose", "lift", "after"]
    assert stages["absorb"].count("aten.bmm") == 4 + 2  # the replaced ones go at the end
    assert stages["after"].count("aten.bmm") == 4
