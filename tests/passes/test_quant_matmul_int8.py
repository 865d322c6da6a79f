"""An int8 product rounded to int8 by one scale becomes one npu_quant_matmul with an int8 result."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes import _w8a8
from tests.passes._harness import DIALECTS, Outcome, fuse, fuse_only

NAME, OPERATOR = "quant_matmul", "npu_quant_matmul"
ROWS, DEPTH, COLUMNS = 32, 48, 24
BF16, FP16 = torch.bfloat16, torch.float16
GONE = {"aten._int_mm", "aten.mm", "aten.add", "aten.round", "aten.clamp", "aten.div", "npu.npu_quantize"}

Scaled = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# product (float32 or float64), a scale per channel, the scale of the input, that of the result
STRICT: dict[str, Scaled] = {
    "one scale per channel": lambda p, ws, xs, ys: p * ws,
    "viewed": lambda p, ws, xs, ys: p * ws.view(1, -1),
    "scalar tensor": lambda p, ws, xs, ys: p * ws[0],
    "one-element tensor": lambda p, ws, xs, ys: p * ws[:1],
    "literal": lambda p, ws, xs, ys: p * 2.0**-12,
    "premultiplied": lambda p, ws, xs, ys: p * (ws * xs / ys),
}
ACCURATE: dict[str, Scaled] = {
    "then divided": lambda p, ws, xs, ys: p * (ws * xs) / ys,
    "three steps": lambda p, ws, xs, ys: p * ws * xs / ys,
    "divided by one per channel": lambda p, ws, xs, ys: p * xs / (ys / ws),
    "only divided": lambda p, ws, xs, ys: p / (ys / ws),
    "only divided by a number": lambda p, ws, xs, ys: p / 3000.0,
    "divided by a number": lambda p, ws, xs, ys: p * ws / 0.7,
    "times an inverse": lambda p, ws, xs, ys: p * ws * (1 / ys),
}
SCALED = STRICT | ACCURATE

OFFSETS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "none": lambda z, zs: 0,
    "number": lambda z, zs: 5,
    "int32": lambda z, zs: z,
    "int32 per channel": lambda z, zs: zs,
    "float32 row": lambda z, zs: zs.to(torch.float32).view(1, -1),
}

Inputs = list[Tensor]


@dataclasses.dataclass(frozen=True)
class Chain:
    """One way to write a requantized linear layer."""

    scaled: str = "one scale per channel"
    product: str = "int_mm"
    bias: bool = False
    """int32, added to the product."""
    offset: str = "none"
    rounded: str = "round, clamp"
    between: torch.dtype | None = None
    """The dtype that the dequantized values are rounded to before they are quantized."""
    operator: bool = False
    """The quantization at the end is a call of npu_quantize."""
    rank: int = 2
    extreme: bool = False
    """A bias so large that sums do not fit float32, beside a scale that makes up for it."""

    @property
    def strict(self) -> bool:
        return self.scaled in STRICT and self.between is None and not self.operator

    def __call__(
        self, q: Tensor, w: Tensor, ws: Tensor, xs: Tensor, ys: Tensor, b: Tensor, z: Tensor, zs: Tensor
    ) -> Tensor:
        p = _w8a8.PRODUCTS[self.product](q.reshape(-1, q.shape[-1]), w.t())
        if self.rank == 3:
            p = p.view(*q.shape[:-1], p.shape[-1])
        if self.bias:
            p = p + b
        offset = OFFSETS[self.offset](z, zs)
        if self.operator:
            y = (p.float() * ws).to(self.between)
            given = None if self.offset == "none" else offset
            return torch.ops.npu.npu_quantize(y, ys, given, 1, -1, True)
        if self.between is not None:
            y = (p.float() * ws).to(self.between)
            value = y.float() / ys
        else:
            value = SCALED[self.scaled](p.float(), ws, xs, ys)
        return _w8a8.ROUNDED[self.rounded](value + offset).to(torch.int8)

    def inputs(self, rows: int = ROWS) -> Inputs:
        g = torch.Generator().manual_seed(0)
        lead = (rows,) if self.rank == 2 else (2, rows // 2)
        q = torch.randint(-128, 128, (*lead, DEPTH), generator=g, dtype=torch.int8)
        w = torch.randint(-127, 128, (COLUMNS, DEPTH), generator=g, dtype=torch.int8)
        ws = (torch.rand(COLUMNS, generator=g) + 0.5) * 1e-3
        b = torch.randint(-(2**16), 2**16, (COLUMNS,), generator=g, dtype=torch.int32)
        if self.extreme:
            b, ws = b * 2**13, ws * 2e-4
        z = torch.tensor([-3], dtype=torch.int32)
        zs = torch.randint(-100, 100, (COLUMNS,), generator=g, dtype=torch.int32)
        return [q, w, ws, torch.tensor([1.3]), torch.tensor([0.7]), b, z, zs]

    def oracle(self, args: Inputs) -> Tensor:
        """What is rounded and clamped, in float64."""
        q, w, ws, xs, ys, b, z, zs = (a.double() for a in args)
        p = q @ w.t() + (b if self.bias else 0)
        value = SCALED[self.scaled](p, ws, xs, ys) if self.between is None else p * ws / ys
        return (value + OFFSETS[self.offset](z, zs)).clamp(-128, 127)


def check(chain: Chain, outcome: Outcome, args: Inputs) -> None:
    """One operator, nothing of the chain left, and as good as the level promises."""
    assert outcome.fused == {OPERATOR: 1}, outcome.report.refused
    assert not outcome.report.refused
    before, after = outcome.report.operators_before, outcome.report.operators_after
    calls = int(chain.product == "quant_matmul")  # asked for its int32 accumulator
    assert (before.get(f"npu.{OPERATOR}", 0), after[f"npu.{OPERATOR}"]) == (calls, 1)
    on_vectors = {"aten.div"} if "divi" in chain.scaled or "ultiplied" in chain.scaled else set()
    on_vectors |= {"aten.div"} if chain.scaled == "three steps" or chain.between else set()
    assert not (GONE - on_vectors) & set(after)
    (record,) = outcome.report.fusions
    have, want = outcome.result, outcome.expected
    assert (have.shape, have.dtype, have.is_contiguous()) == (want.shape, torch.int8, True)
    if chain.strict:
        assert (record.level, record.notes) == ("strict", ())
        assert torch.equal(have, want)
    else:
        assert record.level == "accurate"
        assert record.notes
    exact = chain.oracle(args)
    fused, eager = ((v.double() - exact).abs() for v in (have, want))
    assert fused.mean() <= eager.mean() * 1.001
    assert fused.max() <= 0.5001
    assert have.unique().numel() > 20


CHAINS = {
    **{f"scale {name}": Chain(name) for name in SCALED},
    **{
        f"scale {name}, bias, zero point": Chain(name, bias=True, offset="int32")
        for name in ("one scale per channel", "literal", "three steps", "only divided")
    },
    **{f"product {name}": Chain(product=name) for name in _w8a8.PRODUCTS if name != "int_mm"},
    **{f"zero point {name}": Chain(offset=name) for name in OFFSETS if name != "none"},
    "one scale, zero point per channel": Chain("one-element tensor", offset="int32 per channel"),
    "number, zero point per channel": Chain("literal", offset="int32 per channel"),
    **{
        f"rounded by {name}": Chain(rounded=name, offset="number")
        for name in ("clamp, round", "minimum and maximum", "clamp_max and clamp_min", "clamp twice")
    },
    **{f"{d} in between": Chain(between=d, bias=True, offset="int32") for d in (BF16, FP16)},
    "npu_quantize": Chain(operator=True, between=BF16, offset="int32"),
    "npu_quantize, no zero point": Chain(operator=True, between=FP16, bias=True),
    "rank 3": Chain(rank=3, bias=True),
    "rank 3, bf16 in between": Chain(rank=3, between=BF16),
    "sums beyond float32": Chain(bias=True, extreme=True),
}


def run(chain: Chain, **options: Any) -> tuple[Outcome, Inputs]:
    args = chain.inputs()
    return fuse(chain, args, **options), args


COMBINATIONS = list(itertools.product(DIALECTS, (False, True)))


@pytest.mark.parametrize(
    ("name", "combination"), list(zip(CHAINS, itertools.cycle(COMBINATIONS), strict=False))
)
def test_each_spelling(name: str, combination: tuple[str, bool]) -> None:
    chain = CHAINS[name]
    dialect, dynamic = combination
    numerics = "strict" if chain.strict else "accurate"
    outcome, args = run(chain, dialect=dialect, dynamic=dynamic, numerics=numerics)
    check(chain, outcome, args)


@pytest.mark.parametrize(("dialect", "dynamic"), COMBINATIONS)
@pytest.mark.parametrize(
    "chain",
    [Chain(bias=True, offset="int32"), Chain("three steps", rank=3), Chain(operator=True, between=BF16)],
    ids=["strict", "accurate, 3-D", "npu_quantize"],
)
def test_every_combination(chain: Chain, dialect: str, dynamic: bool) -> None:
    outcome, args = run(chain, dialect=dialect, dynamic=dynamic, verify=True)
    check(chain, outcome, args)


@pytest.mark.parametrize("scaled", ["one scale per channel", "scalar tensor", "literal", "three steps"])
def test_a_single_row(scaled: str) -> None:
    """Where one entry could be a scale per token, too."""
    chain = Chain(scaled, bias=True, offset="int32")
    args = chain.inputs(rows=1)
    outcome = fuse(chain, args)
    assert outcome.fused == {OPERATOR: 1}, outcome.report.refused
    exact = chain.oracle(args)
    assert (outcome.result.double() - exact).abs().max() <= 0.5001
    assert (outcome.result.int() - outcome.expected.int()).abs().max() <= 1


def test_the_arguments() -> None:
    outcome, _ = run(Chain(bias=True, offset="int32"))
    assert outcome.report.operators_after == {"aten.t": 1, "aten._to_copy": 1, f"npu.{OPERATOR}": 1}
    call = next(line for line in outcome.code.splitlines() if OPERATOR in line)
    assert "output_dtype = 1" in call and "bias = " in call and "offset = _to_copy" in call
    assert "pertoken_scale" not in call


def test_ties_go_to_even_and_both_ends_saturate() -> None:
    def layer(q: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return (torch._int_mm(q, w.t()).float() * scale).round().clamp(-128, 127).to(torch.int8)

    w = torch.eye(8, dtype=torch.int8)
    q = torch.tensor([[1, 3, 5, -1, -3, -5, 127, -128]] * 8, dtype=torch.int8)
    for factor, expected in (
        (0.5, [0, 2, 2, 0, -2, -2, 64, -64]),
        (8.0, [8, 24, 40, -8, -24, -40, 127, -128]),
    ):
        outcome = fuse(layer, [q, w, torch.tensor([factor])], numerics="strict")
        assert outcome.fused == {OPERATOR: 1}
        assert outcome.result.tolist() == [expected] * 8 == outcome.expected.tolist()


def test_it_is_taken_before_the_16_bit_value_in_front_of_it() -> None:
    """Which is earlier in the graph, and by itself a result that the operator can give."""
    outcome, _ = run(Chain(between=BF16))
    assert outcome.fused == {OPERATOR: 1}
    assert "output_dtype = 15" not in outcome.code
    strict, _ = run(Chain(between=BF16), numerics="strict")
    assert strict.fused == {OPERATOR: 1, "npu_quantize": 1}
    assert torch.equal(strict.result, strict.expected)


# Near misses: no int8 result is made, the rest fuses as it does without this, and the result is eager's.


def missed(fn: Callable[..., Any], args: Inputs, **options: Any) -> Outcome:
    """With everything else switched off, to the bit."""
    outcome = fuse_only(NAME, fn, args, **options)
    assert outcome.fused == {}
    have, want = outcome.result, outcome.expected
    for h, w in zip(have, want, strict=True) if isinstance(have, tuple) else [(have, want)]:
        assert torch.equal(h, w)
    return outcome


def product(q: Tensor, w: Tensor) -> Tensor:
    return torch._int_mm(q, w.t()).float()


def int8(value: Tensor) -> Tensor:
    return value.round().clamp(-128, 127).to(torch.int8)


_IN_FLOAT32 = "npu_quant_matmul returns 16-bit floats: the product is used in float32"
_TOKEN = f"npu_quant_matmul takes no scale per token with an int8 result: [{ROWS}, 1]"
_BIAS = "the bias of an int8 result is int32, added before the scales: float32"

NEAR: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "a scale per token": (lambda q, w, s, t, b: int8(product(q, w) * s * t), [_TOKEN, _IN_FLOAT32]),
    "divided by one per token": (lambda q, w, s, t, b: int8(product(q, w) * s / t), [_IN_FLOAT32]),
    "a float bias": (lambda q, w, s, t, b: int8((product(q, w) * s + b) / 0.5), [_BIAS, _IN_FLOAT32]),
    "a float bias and a zero point": (
        lambda q, w, s, t, b: int8(product(q, w) * s + b + 3),
        [_BIAS, _IN_FLOAT32],
    ),
    "a symmetric range": (
        lambda q, w, s, t, b: (product(q, w) * s).round().clamp(-127, 127).to(torch.int8),
        [_IN_FLOAT32],
    ),
    "not the whole range": (
        lambda q, w, s, t, b: (product(q, w) * s).round().clamp(0, 127).to(torch.int8),
        [_IN_FLOAT32],
    ),
    "rounded down": (
        lambda q, w, s, t, b: (product(q, w) * s).floor().clamp(-128, 127).to(torch.int8),
        [_IN_FLOAT32],
    ),
    "truncated": (
        lambda q, w, s, t, b: (product(q, w) * s).clamp(-128, 127).to(torch.int8),
        [_IN_FLOAT32],
    ),
    "a zero point after rounding": (
        lambda q, w, s, t, b: ((product(q, w) * s).round() + 3).clamp(-128, 127).to(torch.int8),
        [_IN_FLOAT32],
    ),
    "unsigned": (
        lambda q, w, s, t, b: (product(q, w) * s).round().clamp(0, 255).to(torch.uint8),
        [_IN_FLOAT32],
    ),
    "a zero point per token": (lambda q, w, s, t, b: int8(product(q, w) * s + t.round()), [_IN_FLOAT32]),
    "no scale": (lambda q, w, s, t, b: int8(product(q, w)), []),
    "a scale for each value": (lambda q, w, s, t, b: int8(product(q, w) * (s * t)), [_TOKEN, _IN_FLOAT32]),
    "a floating product": (lambda q, w, s, t, b: int8(q.float() @ w.t().float() * s), []),
    "int16 operands": (lambda q, w, s, t, b: int8(((q.short() * 3).int() @ w.t().int()).float() * s), []),
    "an activation in between": (
        lambda q, w, s, t, b: int8(torch.relu(product(q, w) * s) / 0.5),
        [_IN_FLOAT32],
    ),
}


def near_inputs() -> Inputs:
    q, w, s, *_ = Chain().inputs()
    g = torch.Generator().manual_seed(1)
    return [q, w, s, torch.rand(ROWS, 1, generator=g) + 0.5, torch.randn(COLUMNS, generator=g)]


@pytest.mark.parametrize(("case", "dialect"), list(zip(NEAR, itertools.cycle(DIALECTS), strict=False)))
def test_what_the_operator_cannot_say(case: str, dialect: str) -> None:
    layer, reasons = NEAR[case]
    outcome = missed(layer, near_inputs(), dialect=dialect)
    assert outcome.reasons(NAME) == reasons


def test_a_scale_per_token_leaves_two_operators() -> None:
    def layer(q: Tensor, w: Tensor, s: Tensor, t: Tensor, b: Tensor) -> Tensor:
        y = (product(q, w) * s * t + b).to(BF16)
        return int8(y.float() / 0.5)

    outcome = fuse(layer, near_inputs(), numerics="strict")
    assert outcome.fused == {OPERATOR: 1, "npu_quantize": 1}
    assert outcome.reasons(NAME) == [_TOKEN]
    assert torch.equal(outcome.result, outcome.expected)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_second_reader_of_the_16_bit_value(dialect: str) -> None:
    def layer(q: Tensor, w: Tensor, s: Tensor, t: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        y = (product(q, w) * s).to(BF16)
        return int8(y.float() / 0.5), y

    outcome = fuse(layer, near_inputs(), dialect=dialect)
    assert outcome.fused == {OPERATOR: 1, "npu_quantize": 1}
    (reason,) = outcome.reasons(NAME)
    assert reason.startswith(
        "an intermediate value that the fused operator does not return has a second user"
    )
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        assert torch.equal(have, want)


def test_a_second_reader_of_the_product() -> None:
    def layer(q: Tensor, w: Tensor, s: Tensor, t: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        p = torch._int_mm(q, w.t())
        return int8(p.float() * s), p.sum()

    first, *_ = missed(layer, near_inputs()).reasons(NAME)
    assert first.endswith("_int_mm (_int_mm.default) is also used by sum_1")


def test_the_models_own_call_stays_as_it_is() -> None:
    def layer(q: Tensor, w: Tensor, s: Tensor, t: Tensor, b: Tensor) -> Tensor:
        y = torch.ops.npu.npu_quant_matmul(q, w.t(), s, output_dtype=BF16)
        return int8(y.float() / 0.5)

    outcome = missed(layer, near_inputs())
    assert outcome.report.operators_after == outcome.report.operators_before
    assert outcome.reasons(NAME) == []


# Hosts and targets.


def _no_int8_result(operator: Any, args: Any, kwargs: Any) -> str | None:
    named = operator is torch.ops.npu.npu_quant_matmul.default
    return "no int8 result" if named and kwargs.get("output_dtype") == 1 else None


def test_where_the_host_does_not_take_it_the_rest_fuses() -> None:
    args = Chain().inputs()
    outcome = fuse(Chain(), args, admission=_no_int8_result)
    assert outcome.fused == {"npu_quantize": 1}
    first, *_ = outcome.reasons(NAME)
    assert first == "the host or the target does not take the replacement: no int8 result"
    assert torch.equal(outcome.result, outcome.expected)
    outcome = fuse(Chain(between=BF16), args, admission=_no_int8_result, numerics="accurate")
    assert outcome.fused == {OPERATOR: 1, "npu_quantize": 1}
    assert torch.equal(outcome.result, outcome.expected)


def test_a_target_takes_zero_points_that_are_integers() -> None:
    for offset in ("number", "int32"):
        chain = Chain(offset=offset)
        outcome = fuse(chain, chain.inputs(), target="ascend910b")
        assert outcome.fused == {OPERATOR: 1}, offset
        assert torch.equal(outcome.result, outcome.expected)

    def shifted(q: Tensor, w: Tensor, s: Tensor, t: Tensor, b: Tensor) -> Tensor:
        return int8(product(q, w) * s + b)  # a bias in the steps of the result

    def halfway(q: Tensor, w: Tensor, s: Tensor, t: Tensor, b: Tensor) -> Tensor:
        return int8(product(q, w) * s + 0.5)

    for layer in (shifted, halfway):
        refused = missed(layer, near_inputs(), target="ascend910b")
        assert refused.reasons(NAME)[0] == "the zero point is not known to be an integer: "
        free = fuse(layer, near_inputs(), numerics="strict")
        assert free.fused == {OPERATOR: 1}
        assert torch.equal(free.result, free.expected)


def test_a_width_that_the_hardware_does_not_take() -> None:
    args = near_inputs()
    args[0] = args[0][:, :16].contiguous()
    args[1], args[2] = torch.ones(65544, 16, dtype=torch.int8), torch.rand(65544) * 1e-2

    def layer(q: Tensor, w: Tensor, s: Tensor, t: Tensor, b: Tensor) -> Tensor:
        return int8(product(q, w) * s)

    first, *_ = missed(layer, args, target="ascend910b").reasons(NAME)
    assert first == "the last dimension of an operand is larger than 65535: it is 65544"


def test_older_releases_take_a_dtype() -> None:
    outcome = fuse(Chain(), Chain().inputs(), target="ascend910b-7.3")
    assert outcome.fused == {OPERATOR: 1}
    assert "output_dtype = torch.int8" in outcome.code


def test_the_flag_and_a_dry_run() -> None:
    args = Chain().inputs()
    assert fuse(Chain(), args, quant_matmul=False).fused == {"npu_quantize": 1}
    outcome = fuse(Chain(), args, dry_run=True)
    assert outcome.fused == {OPERATOR: 1}
    assert f"npu.{OPERATOR}" not in outcome.report.operators_after
