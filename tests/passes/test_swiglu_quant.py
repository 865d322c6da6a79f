"""SwiGLU of a float tensor, quantized to int8, becomes one npu_swiglu_quant, where nothing larger fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes import _w8a8
from tests.passes._harness import DIALECTS, Outcome, fuse

OPERATOR = "npu_swiglu_quant"
LARGER = "npu_dequant_swiglu_quant"
TOKENS, HIDDEN = 16, 32
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
npu = torch.ops.npu


def exact(x: Tensor, smooth: Tensor | None = None, left: bool = True) -> Tensor:
    """What is quantized, in float64."""
    first, second = x.double().chunk(2, -1)
    act, up = (first, second) if left else (second, first)
    h = F.silu(act) * up
    return h if smooth is None else h * smooth.double()


def error(result: tuple[Tensor, ...], h: Tensor) -> float:
    """Mean distance of what (y, scale) stand for from ``h``, in steps of the exact quantization."""
    y, scale = result
    step = h.abs().amax(-1, keepdim=True) / 127
    return float(((y.double() * scale.double().reshape(step.shape) - h) / step).abs().mean())


@dataclasses.dataclass(frozen=True)
class Chain:
    """A way to write it, from a tensor [.., 2H] to int8, with a scale per token."""

    dtype: torch.dtype = BF16
    left: bool = True
    smooth: bool = False
    rank: int = 2
    maximum: str = "amax of abs"
    guard: str = "none"
    quotient: str = "x / s"
    tail: str = "widened"
    """widened: the product is float32 from the start; rounded: SwiGLU in ``dtype``, then float32; narrow: all
    in ``dtype``; operators: npu_swiglu and npu_dynamic_quant."""

    def __call__(self, x: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
        if self.tail == "operators":
            factor = {"smooth_scales": smooth.to(x.dtype)} if self.smooth else {}
            return npu.npu_dynamic_quant(npu.npu_swiglu(x), **factor)
        first, second = (x.float() if self.tail == "widened" else x).chunk(2, -1)
        act, up = (first, second) if self.left else (second, first)
        h = F.silu(act) * up
        h = h if self.tail == "narrow" else h.float()
        if self.smooth:
            h = h * smooth.to(h.dtype)
        m = _w8a8.MAXIMA[self.maximum](h).float()
        scale = _w8a8.GUARDS_OF_SCALE[self.guard](m / 127)
        q = _w8a8.QUOTIENTS[self.quotient](h, scale, m)
        return q.round().clamp(-128, 127).to(torch.int8), scale

    def inputs(self) -> list[Tensor]:
        g = torch.Generator().manual_seed(0)
        lead = (TOKENS,) if self.rank == 2 else (2, TOKENS // 2)
        x = torch.randn(*lead, 2 * HIDDEN, generator=g) * 2
        return [x.to(self.dtype), torch.rand(HIDDEN, generator=g) + 0.5]


def check(chain: Chain, outcome: Outcome, args: list[Tensor]) -> None:
    """One operator in place of all, and at least as close to the exact values as eager."""
    assert outcome.fused == {OPERATOR: 1}, outcome.report.refused
    after = outcome.report.operators_after
    assert f"npu.{OPERATOR}" not in outcome.report.operators_before
    assert after[f"npu.{OPERATOR}"] == 1
    # the operator gives 127 / amax
    viewed = {"aten.reshape"} if chain.tail != "operators" else set()
    prepared = (
        {"aten.view", "aten.reshape", "aten._to_copy", "prims.convert_element_type"}
        if chain.smooth
        else set()
    )
    assert set(after) - viewed - prepared == {f"npu.{OPERATOR}", "aten.reciprocal"}
    (record,) = outcome.report.fusions
    assert record.level == "accurate"
    assert any("127 / amax" in note for note in record.notes)
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        assert (have.shape, have.dtype) == (want.shape, want.dtype)
    x, smooth = args
    narrow = chain.tail in ("narrow", "operators")  # the factor is stored in 16 bits then
    h = exact(x, (smooth.to(x.dtype) if narrow else smooth) if chain.smooth else None, chain.left)
    assert error(outcome.result, h) <= error(outcome.expected, h) * 1.002 + 1e-5
    y, scale = outcome.result
    torch.testing.assert_close(
        scale.double().reshape(h.shape[:-1]), h.abs().amax(-1) / 127, rtol=1e-6, atol=0
    )
    assert (y.double() - h / (h.abs().amax(-1, keepdim=True) / 127)).abs().max() <= 0.5 + 1e-4


CHAINS = {
    **{
        f"{tail} {str(dtype).removeprefix('torch.')}, {'left' if left else 'right'}": Chain(
            dtype, left, tail=tail
        )
        for tail in ("widened", "rounded", "narrow")
        for dtype in (BF16, FP16, FP32)
        for left in (True, False)
    },
    **{f"quotient {q}": Chain(quotient=q) for q in _w8a8.QUOTIENTS},
    "maximum of both ends, guarded": Chain(maximum="aminmax", guard="where"),
    **{f"smooth, {tail}": Chain(smooth=True, tail=tail) for tail in ("widened", "rounded", "narrow")},
    **{f"rank 3, {tail}": Chain(rank=3, smooth=True, tail=tail) for tail in ("widened", "narrow")},
    "operators": Chain(tail="operators"),
    "operators, smooth": Chain(tail="operators", smooth=True),
    "operators, rank 3, float16": Chain(FP16, tail="operators", rank=3),
}


@pytest.mark.by_turns("dialect", "dynamic")
@pytest.mark.parametrize(("dialect", "dynamic"), [("aot", False), ("inductor", True)])
@pytest.mark.parametrize("name", CHAINS)
def test_each_spelling(name: str, dialect: str, dynamic: bool) -> None:
    chain = CHAINS[name]
    args = chain.inputs()
    check(chain, fuse(chain, args, dialect=dialect, dynamic=dynamic), args)


@pytest.mark.parametrize(("dialect", "dynamic"), [("aot", True), ("inductor", False)])
@pytest.mark.parametrize(
    "chain", [Chain(smooth=True, rank=3), Chain(tail="operators")], ids=["plain", "operators"]
)
def test_the_other_combinations(chain: Chain, dialect: str, dynamic: bool) -> None:
    args = chain.inputs()
    check(chain, fuse(chain, args, dialect=dialect, dynamic=dynamic, verify=True), args)


@pytest.mark.parametrize("tail", ["widened", "narrow", "operators"])
def test_zero_rows(tail: str) -> None:
    """The operator's scale is infinite there; what the graph gets is 0."""
    chain = Chain(tail=tail, guard="where")
    args = chain.inputs()
    args[0][3] = 0
    args[0][5, :HIDDEN] = 0
    outcome = fuse(chain, args)
    assert outcome.fused == {OPERATOR: 1}
    y, scale = outcome.result
    scale = scale.reshape(-1)
    zero = torch.zeros(TOKENS, dtype=torch.bool)
    zero[[3, 5]] = True
    assert torch.equal(scale == 0, zero)
    assert scale.isfinite().all()
    assert not y[zero].any()
    assert torch.equal(y[zero], outcome.expected[0][zero])


@pytest.mark.parametrize("tail", ["widened", "operators"])
def test_no_rows(tail: str) -> None:
    chain = Chain(tail=tail)
    x, smooth = chain.inputs()
    outcome = fuse(chain, [x[:0], smooth])
    assert outcome.fused == {OPERATOR: 1}
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        assert (have.shape, have.dtype) == (want.shape, want.dtype)


# Static


STATIC = {
    **_w8a8.STATIC,
    "x * scalar tensor": lambda h, s: h * s[0],
    "x * scalar + vector": lambda h, s: h * 32.0 + torch.round(s * 64),
    "x * vector, kept": lambda h, s: h * (s * 300),
    "x * vector + literal": lambda h, s: h * (s * 300) + 2.0,
}


@pytest.mark.by_turns("rank", "dialect", "dynamic")
@pytest.mark.parametrize(("rank", "dialect", "dynamic"), [(2, "aot", False), (3, "inductor", True)])
@pytest.mark.parametrize("name", STATIC)
def test_a_given_scale(name: str, rank: int, dialect: str, dynamic: bool) -> None:
    def chain(x: Tensor, s: Tensor) -> Tensor:
        first, second = x.float().chunk(2, -1)
        h = F.silu(second) * first
        return STATIC[name](h, s).round().clamp(-128, 127).to(torch.int8)

    x, s = Chain(rank=rank).inputs()
    s = s / 16
    outcome = fuse(chain, [x, s], dialect=dialect, dynamic=dynamic)
    assert outcome.fused == {OPERATOR: 1}
    after = outcome.report.operators_after
    assert after[f"npu.{OPERATOR}"] == 1
    assert not {"aten.silu", "aten.exp", "aten.div", "aten.clamp", "aten.clamp_min", "aten.split"} & set(
        after
    )
    (record,) = outcome.report.fusions
    multiplied = name.startswith("x * ") and name != "x * vector"  # that one multiplies by a reciprocal
    if multiplied and dialect == "aot":  # Inductor takes silu apart
        assert record.level == "strict"
        assert torch.equal(outcome.result, outcome.expected)
    else:
        assert record.level == "accurate"
        distance = (outcome.result.int() - outcome.expected.int()).abs()
        assert distance.max() <= 1
        assert distance.float().mean() < 0.005


def test_npu_quantize() -> None:
    def chain(x: Tensor, s: Tensor) -> Tensor:
        zero_points = torch.arange(HIDDEN, dtype=torch.float32)
        return npu.npu_quantize(npu.npu_swiglu(x), s, zero_points, torch.int8, -1, False)

    x, s = Chain(FP32).inputs()
    outcome = fuse(chain, [x, s * 10], numerics="strict")
    assert outcome.fused == {OPERATOR: 1}
    assert torch.equal(outcome.result, outcome.expected)


# Beside the larger fusion


def _mlp(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor) -> tuple[Tensor, Tensor]:
    """What vllm-ascend traces to."""
    x = npu.npu_quant_matmul(q, w, ws, pertoken_scale=ts, output_dtype=BF16)
    return npu.npu_dynamic_quant(npu.npu_swiglu(x))


def _dequantized(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor) -> Tensor:
    return torch._int_mm(q, w).float() * ws * ts[:, None]


def _plain_mlp(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor) -> tuple[Tensor, ...]:
    return Chain(FP32)(_dequantized(q, w, ws, ts), ws)


def _plain_mlp_that_keeps_a_value(q: Tensor, w: Tensor, ws: Tensor, ts: Tensor) -> tuple[Tensor, ...]:
    d = _dequantized(q, w, ws, ts)
    return *Chain(FP32)(d, ws), d.mean(-1)


def _mlp_inputs() -> list[Tensor]:
    q, w, ws, ts, *_ = _w8a8.Spelling().inputs()
    return [q, w, ws, ts.view(-1)]


def _mlp_exact(args: list[Tensor]) -> Tensor:
    q, w, ws, ts = (a.double() for a in args)
    return exact(q @ w * ws * ts[:, None])


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("mlp", [_mlp, _plain_mlp])
def test_the_larger_fusion_comes_first(mlp: Callable[..., Any], dialect: str) -> None:
    outcome = fuse(mlp, _mlp_inputs(), dialect=dialect)
    assert outcome.fused == {LARGER: 1}
    assert not outcome.report.refused


@pytest.mark.parametrize("options", [{"int32_bytes_per_token": 64}, {"dequant_swiglu_quant": False}], ids=str)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_where_the_larger_one_is_not_wanted(options: dict[str, Any], dialect: str) -> None:
    args = _mlp_inputs()
    outcome = fuse(_mlp, args, dialect=dialect, **options)
    assert outcome.fused == {OPERATOR: 1}
    assert outcome.report.operators_after["npu.npu_quant_matmul"] == 1  # in bfloat16, as it was
    refused = outcome.reasons("dequant_swiglu_quant")
    if "int32_bytes_per_token" in options:
        (reason,) = refused
        assert reason.startswith(
            "the int32 product needs more bytes per token than int32_bytes_per_token allows"
        )
        assert reason.endswith(": 4 x 64 bytes, limit 64")
    else:
        assert refused == []
    h = _mlp_exact(args)
    assert error(outcome.result, h) <= error(outcome.expected, h) * 1.002


@pytest.mark.parametrize("dialect", DIALECTS)
def test_where_the_dequantized_product_has_a_second_reader(dialect: str) -> None:
    args = _mlp_inputs()
    outcome = fuse(_plain_mlp_that_keeps_a_value, args, dialect=dialect)
    assert outcome.fused == {OPERATOR: 1}
    (reason,) = outcome.reasons("dequant_swiglu_quant")
    assert reason.startswith(
        "an intermediate value that the fused operator does not return has a second user"
    )
    y, scale, mean = outcome.result
    h = _mlp_exact(args)
    assert error((y, scale), h) <= error(outcome.expected[:2], h) * 1.002 + 1e-5
    assert torch.equal(mean, outcome.expected[2])


def test_a_float_matmul_says_why_the_larger_one_was_not_made() -> None:
    def mlp(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return Chain(tail="rounded")(x @ w, x)

    x = torch.randn(TOKENS, 48, dtype=BF16)
    outcome = fuse(mlp, [x, torch.randn(48, 2 * HIDDEN, dtype=BF16) / 4])
    assert outcome.fused == {OPERATOR: 1}
    assert outcome.reasons("dequant_swiglu_quant") == [
        "there is no int32 product: the matmul is done in floating point: mm gives the value"
    ]


# Near misses


def unfused(fn: Callable[..., Any], args: list[Tensor], **options: Any) -> Outcome:
    """Not this fusion, nor a smaller one: the result is eager's (Inductor takes silu apart)."""
    outcome = fuse(fn, args, swiglu=False, dynamic_quant=False, quantize=False, **options)
    assert outcome.fused == {}
    last_bits = 1e-5 if options.get("dialect") == "inductor" else 0.0
    torch.testing.assert_close(outcome.result, outcome.expected, rtol=last_bits, atol=0)
    return outcome


def _second_reader(x: Tensor, smooth: Tensor) -> tuple[Tensor, ...]:
    first, second = x.float().chunk(2, -1)
    h = F.silu(first) * second
    scale = h.abs().amax(-1, keepdim=True) / 127
    return (h / scale).round().clamp(-128, 127).to(torch.int8), scale, h.sum()


def _static_and_smooth(x: Tensor, smooth: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return (F.silu(first) * second * smooth * 16.0).round().clamp(-128, 127).to(torch.int8)


def _scale_per_row(x: Tensor, smooth: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    h = F.silu(first) * second
    return (h * smooth[:TOKENS, None]).round().clamp(-128, 127).to(torch.int8)


def _gelu(x: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.float().chunk(2, -1)
    return npu.npu_dynamic_quant(F.gelu(first) * second)


def _one_tensor(x: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    h = F.silu(x.float()) * smooth.sum()
    scale = h.abs().amax(-1, keepdim=True) / 127
    return (h / scale).round().clamp(-128, 127).to(torch.int8), scale


def _vector(x: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    return Chain()(x[0], smooth)


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (_second_reader, "an intermediate value that the fused operator does not return has a second user"),
        (_static_and_smooth, "static quantization has no smooth scales"),
        (_scale_per_row, "the scale is not along the last dimension: [16, 1]"),
        (_vector, "the operator takes two or more dimensions: 1"),
        (_gelu, None),
        (_one_tensor, None),
    ],
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_the_operator_cannot_say(chain: Callable[..., Any], reason: str | None, dialect: str) -> None:
    reasons = unfused(chain, Chain().inputs(), dialect=dialect).reasons("swiglu_quant")
    assert len(reasons) == (reason is not None)
    assert all(r.startswith(str(reason)) for r in reasons)


@pytest.mark.parametrize("tail", ["widened", "operators"])
def test_strict_refuses_a_scale_from_the_data(tail: str) -> None:
    chain = Chain(tail=tail)
    outcome = fuse(chain, chain.inputs(), numerics="strict")
    assert OPERATOR not in outcome.fused
    (reason,) = outcome.reasons("swiglu_quant")
    assert reason.startswith("numerics='strict' does not allow the difference: ")
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        assert torch.equal(have, want)


def test_a_width_that_the_hardware_does_not_take() -> None:
    x = torch.randn(2, 8194, dtype=BF16)
    outcome = fuse(Chain(tail="operators"), [x, x], target="ascend910b")
    assert outcome.fused == {}
    assert outcome.reasons("swiglu_quant") == ["the last dimension is larger than 8192: it is 8194"]
    assert fuse(Chain(tail="operators"), [x[:, :8192], x], target="ascend910b").fused == {OPERATOR: 1}


def test_an_open_width() -> None:
    x = torch.randn(2, 64, dtype=BF16)
    outcome = fuse(Chain(tail="operators"), [x, x], target="ascend910b", dynamic=True)
    assert outcome.fused == {}
    (reason,) = outcome.reasons("swiglu_quant")
    assert "symbolic sizes leave it open" in reason


def test_the_flag() -> None:
    chain = Chain()
    args = chain.inputs()
    assert unfused(chain, args, swiglu_quant=False).reasons("swiglu_quant") == []
    outcome = fuse(Chain(tail="rounded"), args, swiglu_quant=False)
    assert outcome.fused == {"npu_swiglu": 1, "npu_dynamic_quant": 1}
