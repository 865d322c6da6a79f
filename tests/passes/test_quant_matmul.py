"""An int8 product, dequantized and rounded to 16 bits, becomes one npu_quant_matmul; near misses stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.meta_impls._dtypes import enum_value
from tests.kernels._numerics import ulps
from tests.models.w8a8 import merged
from tests.passes import _w8a8
from tests.passes._harness import DIALECTS, Outcome, fuse

OPERATOR = "npu_quant_matmul"
ROWS, DEPTH, COLUMNS = 32, 48, 24
BF16, FP16 = torch.bfloat16, torch.float16
IN_FLOAT32 = "npu_quant_matmul returns 16-bit floats: the product is used in float32"
GONE = {"aten._int_mm", "aten.mm", "aten.mul", "aten.add", "higher_order.out_dtype"}


@dataclasses.dataclass(frozen=True)
class Chain:
    """One way to write a dequantized linear layer."""

    scaled: str = "channel then token"
    product: str = "int_mm"
    output: torch.dtype = BF16
    bias: str = "none"
    """none; before (int32, added to the product); after (float32 values); late (16-bit, after rounding)."""
    bias_dtype: torch.dtype = torch.float32
    channel_dtype: torch.dtype = torch.float32
    rank: int = 2
    strict: bool = True
    """Whether the source is the operator's own arithmetic."""

    def __call__(self, q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, bias: Tensor) -> Tensor:
        p = _w8a8.PRODUCTS[self.product](q.reshape(-1, q.shape[-1]), w.t())
        if self.rank == 3:
            p = p.view(*q.shape[:-1], p.shape[-1])
        if self.bias == "before":
            p = p + bias
        d = SCALED[self.scaled](p, ws, ts)
        if self.bias == "after":
            d = d + bias
        d = d.to(self.output)
        return d + bias if self.bias == "late" else d

    def inputs(self) -> list[Tensor]:
        g = torch.Generator().manual_seed(0)
        lead = (ROWS,) if self.rank == 2 else (2, ROWS // 2)
        q = torch.randint(-127, 128, (*lead, DEPTH), generator=g, dtype=torch.int8)
        w = torch.randint(-127, 128, (COLUMNS, DEPTH), generator=g, dtype=torch.int8)
        ws = (torch.rand(COLUMNS, generator=g) + 0.5) * 1e-3
        ts = (torch.rand(*lead, 1, generator=g) + 0.5) * 0.05
        bias = torch.randn(COLUMNS, generator=g)
        bias = (bias * 3e4).int() if self.bias == "before" else bias.to(self.bias_dtype)
        return [q, w, ws.to(self.channel_dtype), ts, bias]

    def oracle(self, args: list[Tensor]) -> Tensor:
        q, w, ws, ts, bias = args
        p = q.double() @ w.double().t()
        if self.bias == "before":
            p = p + bias
        d = SMALL[self.scaled](p, ws, ts) if self.scaled in SMALL else p * ws.double() * ts.double()
        return d + bias.double() if self.bias in ("after", "late") else d


Scaled = Callable[[Tensor, Tensor, Tensor], Tensor]

SMALL: dict[str, Scaled] = {
    "channel": lambda p, ws, ts: p * ws.to(p.dtype),
    "literal": lambda p, ws, ts: p * 0.015625,
    "literal and token": lambda p, ws, ts: p * 0.015625 * ts.to(p.dtype),
    "scalar tensor": lambda p, ws, ts: p * ws[0].to(p.dtype),
    "one-element tensor": lambda p, ws, ts: p * ws[:1].to(p.dtype),
    "scalar tensor and token": lambda p, ws, ts: p * ws[0].to(p.dtype) * ts.to(p.dtype),
    "literal and channel": lambda p, ws, ts: p * 0.015625 * ws.to(p.dtype),
}
SCALED: dict[str, Scaled] = {
    **_w8a8.DEQUANTIZED,
    **{name: lambda p, ws, ts, f=f: f(p.float(), ws, ts) for name, f in SMALL.items()},
    "rounded in between": lambda p, ws, ts: (p.float() * ts).to(BF16) * ws,
    "rounded first": lambda p, ws, ts: p.to(BF16) * ws * ts,
}
INEXACT = (
    "token then channel",
    "premultiplied",
    "premultiplied first",
    "rounded in between",
    "rounded first",
)


def check(chain: Chain, outcome: Outcome, args: list[Tensor]) -> None:
    """One operator, nothing of the chain left, and as good as the level promises."""
    assert outcome.fused == {OPERATOR: 1}, outcome.report.refused
    assert not outcome.report.refused
    before, after = outcome.report.operators_before, outcome.report.operators_after
    calls = int(chain.product == "quant_matmul")  # asked for its int32 accumulator
    assert (before.get(f"npu.{OPERATOR}", 0), after[f"npu.{OPERATOR}"]) == (calls, 1)
    several_scales = chain.scaled in ("literal and channel", "premultiplied", "premultiplied first")
    assert not GONE - ({"aten.mul"} if several_scales else set()) & set(after)
    (record,) = outcome.report.fusions
    have, want = outcome.result, outcome.expected
    assert (have.shape, have.dtype, have.is_contiguous()) == (want.shape, want.dtype, True)
    if chain.strict:
        assert (record.level, record.notes) == ("strict", ())
        assert torch.equal(have, want)
        return
    assert record.level == "accurate"
    assert record.notes
    exact = chain.oracle(args)
    fused, eager = ((v.double() - exact).abs() for v in (have, want))
    assert fused.mean() <= eager.mean() * 1.001
    assert ulps(have, exact.to(have.dtype)).max() <= 1


def run(chain: Chain, **options: Any) -> tuple[Outcome, list[Tensor]]:
    args = chain.inputs()
    return fuse(chain, args, **options), args


PLAIN = Chain()
CHAINS = {
    **{f"scales {name}": Chain(scaled=name, strict=name not in INEXACT) for name in SCALED},
    "scales literal and channel": Chain(scaled="literal and channel", strict=False),
    **{f"product {name}": Chain(product=name) for name in _w8a8.PRODUCTS},
    **{
        f"{'fp16' if output is FP16 else 'bf16'}, bias {where} {str(dtype).removeprefix('torch.')}": Chain(
            output=output,
            bias=where,
            bias_dtype=dtype,
            strict=where != "late",
            scaled=scaled,
            rank=3 if output is FP16 else 2,
        )
        for output in (BF16, FP16)
        for where, dtype, scaled in (
            ("before", torch.int32, "channel then token"),
            ("before", torch.int32, "channel"),
            ("after", torch.float32, "channel then token"),
            ("after", output, "channel then token"),
            ("after", output, "channel"),
            ("after", FP16 if output is BF16 else BF16, "channel then token"),
            ("late", output, "channel then token"),
        )
    },
    "bf16 scales": Chain(channel_dtype=BF16),
    "bf16 scales only": Chain(channel_dtype=BF16, scaled="channel"),
    "bf16 scales, fp16 result": Chain(channel_dtype=BF16, output=FP16),
    "fp16 scales": Chain(channel_dtype=FP16),
    "fp16 without token scales": Chain(output=FP16, scaled="channel"),
    "fp16 by one number": Chain(output=FP16, scaled="literal"),
    "rank 3": Chain(rank=3),
    "rank 3, bias late": Chain(rank=3, bias="late", bias_dtype=BF16, strict=False),
}


@pytest.mark.by_turns("dialect", "dynamic")
@pytest.mark.parametrize(("dialect", "dynamic"), [("aot", False), ("inductor", True)])
@pytest.mark.parametrize("name", CHAINS)
def test_each_spelling(name: str, dialect: str, dynamic: bool) -> None:
    chain = CHAINS[name]
    numerics = "strict" if chain.strict else "accurate"
    outcome, args = run(chain, dialect=dialect, dynamic=dynamic, numerics=numerics)
    check(chain, outcome, args)


@pytest.mark.parametrize(("dialect", "dynamic"), [("aot", True), ("inductor", False)])
@pytest.mark.parametrize("chain", [PLAIN, Chain(rank=3, output=FP16, scaled="channel")], ids=["2-D", "3-D"])
def test_the_other_combinations(chain: Chain, dialect: str, dynamic: bool) -> None:
    outcome, args = run(chain, dialect=dialect, dynamic=dynamic, verify=True)
    check(chain, outcome, args)


def test_the_arguments() -> None:
    """bf16 scales as they are stored; the transposed weight as it is; every dtype one that hardware takes."""
    outcome, _ = run(Chain(channel_dtype=BF16, bias="after", bias_dtype=BF16))
    assert outcome.report.operators_after == {"aten.t": 1, "aten.reshape": 1, f"npu.{OPERATOR}": 1}
    assert "output_dtype = 15" in outcome.code
    outcome, _ = run(Chain(output=FP16, scaled="channel"))
    # in graph mode a float32 scale is taken for float16 results only beside a scale per token
    assert outcome.report.operators_after == {"aten.t": 1, "aten.full": 1, f"npu.{OPERATOR}": 1}
    assert "pertoken_scale = full" in outcome.code
    assert "output_dtype = 5" in outcome.code


def test_a_w8a8_model_has_no_matmul_of_its_own_left() -> None:
    x = torch.randn(2, 20, 64, dtype=BF16)
    outcome = fuse(merged(), [x])
    assert outcome.fused == {"npu_dynamic_quant": 1, "npu_dequant_swiglu_quant": 1, OPERATOR: 1}
    assert (
        outcome.report.operators_after["aten._int_mm"] == 1
    )  # its int32 result is what the fused operator reads
    assert [f.level for f in outcome.report.fusions if f.operator == OPERATOR] == ["strict"]
    off = fuse(merged(), [x], dequant_swiglu_quant=False)
    assert off.fused == {"npu_dynamic_quant": 1, "npu_swiglu_quant": 1, OPERATOR: 2}
    assert "aten._int_mm" not in off.report.operators_after
    for have in (outcome, off):
        torch.testing.assert_close(
            have.result, have.expected, rtol=0, atol=2e-2 * float(have.expected.abs().max())
        )


def test_an_integer_bias_after_the_scales_is_not_added_before_them() -> None:
    def layer(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, bias: Tensor) -> Tensor:
        return (torch._int_mm(q, w.t()).float() * ws * ts + bias).to(BF16)

    args = PLAIN.inputs()
    args[-1] = torch.arange(COLUMNS, dtype=torch.int32)
    outcome = fuse(layer, args, numerics="strict")
    assert outcome.fused == {OPERATOR: 1}
    assert torch.equal(outcome.result, outcome.expected)


def test_the_longest_chain_is_taken() -> None:
    """A layer scale and a weight per row of the result are scales too."""

    def layer(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, gamma: Tensor) -> Tensor:
        y = (torch._int_mm(q, w.t()).float() * ws * ts).to(BF16)
        return y * gamma * ts.to(BF16)

    args = PLAIN.inputs()
    args[-1] = args[-1].to(BF16)
    outcome = fuse(layer, args)
    assert outcome.fused == {OPERATOR: 1}
    q, w, ws, ts, gamma = (a.double() for a in args)
    exact = q @ w.t() * ws * ts * gamma * ts.to(BF16)
    fused, eager = ((v.double() - exact).abs().mean() for v in (outcome.result, outcome.expected))
    assert fused <= eager
    strict = fuse(layer, args, numerics="strict")
    assert strict.fused == {OPERATOR: 1}
    assert strict.report.operators_after["aten.mul"] == 2
    assert torch.equal(strict.result, strict.expected)


# Near misses: nothing fused, the result is eager's.


def unfused(fn: Callable[..., Any], args: list[Tensor], **options: Any) -> Outcome:
    outcome = fuse(fn, args, **options)
    assert OPERATOR not in outcome.fused
    have, want = outcome.result, outcome.expected
    for h, w in zip(have, want, strict=True) if isinstance(have, tuple) else [(have, want)]:
        assert torch.equal(h, w)
    return outcome


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("rank", [2, 3])
def test_a_float32_result(dialect: str, rank: int) -> None:
    chain = Chain(output=torch.float32, bias="after", rank=rank)
    outcome = unfused(chain, chain.inputs(), dialect=dialect)
    assert outcome.reasons("quant_matmul") == [IN_FLOAT32]


def test_a_float32_result_with_a_weight_that_is_no_scale() -> None:
    def layer(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, bias: Tensor) -> Tensor:
        return torch._int_mm(q, w.t()).float() * ts

    assert unfused(layer, PLAIN.inputs()).reasons("quant_matmul") == []


@pytest.mark.parametrize("scaled", INEXACT)
def test_strict_refuses_what_is_not_bit_equal(scaled: str) -> None:
    chain = Chain(scaled=scaled)
    outcome = unfused(chain, chain.inputs(), numerics="strict")
    (reason,) = outcome.reasons("quant_matmul")
    assert reason.startswith("numerics='strict' does not allow the difference: ")


def test_a_second_reader_of_the_product() -> None:
    def layer(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        p = torch._int_mm(q, w.t())
        return (p.float() * ws * ts).to(BF16), p.sum()

    (reason,) = unfused(layer, PLAIN.inputs()).reasons("quant_matmul")
    assert reason == (
        "an intermediate value that the fused operator does not return has a second user: "
        "_int_mm (_int_mm.default) is also used by sum_1"
    )


def test_a_second_reader_of_the_result_before_its_bias() -> None:
    def layer(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        y = (torch._int_mm(q, w.t()).float() * ws * ts).to(BF16)
        return y + bias, torch.relu(y)

    args = Chain(bias_dtype=BF16, bias="late").inputs()
    outcome = fuse(layer, args)
    assert outcome.fused == {OPERATOR: 1}
    assert outcome.report.operators_after["aten.add"] == 1
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        assert torch.equal(have, want)


def _residual(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, full: Tensor) -> Tensor:
    return (torch._int_mm(q, w.t()).float() * ws * ts + full).to(BF16)


def _full_scale(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, full: Tensor) -> Tensor:
    return (torch._int_mm(q, w.t()).float() * full).to(BF16)


def _shifted_before_the_token_scale(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, full: Tensor) -> Tensor:
    return ((torch._int_mm(q, w.t()).float() * ws + full[0]) * ts).to(BF16)


def _bias_per_token(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, full: Tensor) -> Tensor:
    return (torch._int_mm(q, w.t()).float() * ws * ts + full[:, :1]).to(BF16)


def _squared(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, full: Tensor) -> Tensor:
    p = torch._int_mm(q, w.t()).float()
    return (p * p * ws).to(BF16)


def _no_scale(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, full: Tensor) -> Tensor:
    return torch._int_mm(q, w.t()).to(BF16)


def _only_token_scales(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, full: Tensor) -> Tensor:
    return (torch._int_mm(q, w.t()).float() * ts).to(BF16)


def _float_product(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, full: Tensor) -> Tensor:
    return (q.float() @ w.t().float() * ws * ts).to(BF16)


def _int16_operands(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, full: Tensor) -> Tensor:
    return ((q.short() * 3).int() @ w.t().int() * ws * ts).to(BF16)


def _int32_result(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, full: Tensor) -> Tensor:
    return torch._int_mm(q, w.t())


@pytest.mark.parametrize(
    ("layer", "reasons"),
    [
        (_residual, [IN_FLOAT32]),
        (_shifted_before_the_token_scale, [IN_FLOAT32]),
        (_bias_per_token, [IN_FLOAT32]),
        (_full_scale, []),
        (_squared, []),
        (_no_scale, []),
        (_only_token_scales, []),
        (_float_product, []),
        (_int16_operands, []),
        (_int32_result, []),
    ],
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_the_operator_cannot_say(layer: Callable[..., Tensor], reasons: list[str], dialect: str) -> None:
    args = PLAIN.inputs()
    args[-1] = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    outcome = unfused(layer, args, dialect=dialect, target="ascend910b")
    assert outcome.reasons("quant_matmul") == reasons


def test_a_call_of_the_operator_stays_as_the_model_wrote_it() -> None:
    def layer(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, bias: Tensor) -> Tensor:
        y = torch.ops.npu.npu_quant_matmul(q, w.t(), ws, pertoken_scale=ts.view(-1), output_dtype=BF16)
        return y + bias

    args = Chain(bias="late", bias_dtype=BF16).inputs()
    outcome = unfused(layer, args)
    assert outcome.report.operators_after == outcome.report.operators_before
    assert outcome.reasons("quant_matmul") == []


def test_a_width_that_the_hardware_does_not_take() -> None:
    args = PLAIN.inputs()
    args[1] = torch.ones(65544, 16, dtype=torch.int8)
    args[0] = args[0][:, :16].contiguous()
    args[2] = torch.rand(65544)
    (reason,) = unfused(PLAIN, args, target="ascend910b").reasons("quant_matmul")
    assert reason == "the last dimension of an operand is larger than 65535: it is 65544"
    assert fuse(PLAIN, args).fused == {OPERATOR: 1}


def test_the_flag() -> None:
    outcome = unfused(PLAIN, PLAIN.inputs(), quant_matmul=False)
    assert outcome.fused == {}


def test_an_expectation_counts_it() -> None:
    outcome, _ = run(PLAIN, dry_run=True)
    assert outcome.fused == {OPERATOR: 1}
    assert f"npu.{OPERATOR}" not in outcome.report.operators_after


def _no_int_mm(operator: Any, args: Any, kwargs: Any) -> str | None:
    return "no kernel" if operator is torch.ops.aten._int_mm.default else None


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_product_used_as_int32_goes_to_the_operator_where_the_host_has_no_int_mm(dynamic: bool) -> None:
    def products(q: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        p = torch._int_mm(q, w.t())
        return p, torch._int_mm(q, (w + 1).t()) * 3

    q, w, *_ = PLAIN.inputs()
    assert fuse(products, [q, w], dynamic=dynamic).fused == {}
    got = fuse(products, [q, w], dynamic=dynamic, admission=_no_int_mm)
    assert got.fused == {OPERATOR: 2}
    assert "aten._int_mm" not in got.code
    assert got.code.count("aten.full") == 1  # one scale for both
    for result, expected in zip(got.result, got.expected, strict=True):
        assert result.dtype == torch.int32
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_a_dequantized_product_is_taken_first_where_the_host_has_no_int_mm() -> None:
    def both(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return PLAIN(q, w, ws, ts, bias), torch._int_mm(q, (w + 1).t())

    got = fuse(both, PLAIN.inputs(), admission=_no_int_mm)
    assert got.fused == {OPERATOR: 2}
    assert "aten._int_mm" not in got.code


@pytest.mark.parametrize(("dialect", "dynamic"), [("aot", False), ("inductor", True)])
def test_a_scale_that_is_made_in_the_graph(dialect: str, dynamic: bool) -> None:
    def layer(q: Tensor, w: Tensor) -> Tensor:
        scale = torch.full((COLUMNS,), 0.01, dtype=BF16)  # widened in the operator
        return torch.ops.npu.npu_dequant_bias(
            torch._int_mm(q, w.t()), scale, None, None, output_dtype=enum_value(BF16)
        )

    q, w, *_ = PLAIN.inputs()
    got = fuse(layer, [q, w], dialect=dialect, dynamic=dynamic)
    assert got.fused == {OPERATOR: 1}
    assert torch.equal(got.result, got.expected)
