"""npu_rms_norm: every spelling of the norm, its near misses, and what a fused result is worth."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from npu_fusion.config import FusionConfig
from npu_fusion.passes import pipeline
from tests.passes._harness import DIALECTS, fuse

npu = torch.ops.npu
EPS = 1e-6
H = 48

Norm = Callable[[Tensor, Tensor], Tensor]


def hugging_face(x: Tensor, g: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return g * wide.to(x.dtype)


def weight_last(x: Tensor, g: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * g


def one_rounding(x: Tensor, g: Tensor) -> Tensor:
    wide = x.float()
    return (g * (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + EPS))).to(x.dtype)


def never_widened(x: Tensor, g: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * g


def functional(x: Tensor, g: Tensor) -> Tensor:
    return F.rms_norm(x, (H,), g, EPS)


def default_epsilon(x: Tensor, g: Tensor) -> Tensor:
    return F.rms_norm(x, (H,), g)


def divided_by_root(x: Tensor, g: Tensor) -> Tensor:
    wide = x.float()
    return (wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * g).to(x.dtype)


def times_one_over_root(x: Tensor, g: Tensor) -> Tensor:
    wide = x.float()
    return (wide * (1 / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)) * g).to(x.dtype)


def power_of_minus_half(x: Tensor, g: Tensor) -> Tensor:
    wide = x.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + EPS).pow(-0.5) * g).to(x.dtype)


def sum_over_count(x: Tensor, g: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) / x.shape[-1] + EPS) * g).to(x.dtype)


def sum_times_inverse(x: Tensor, g: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) * (1 / H) + EPS) * g).to(x.dtype)


def unsqueezed_mean(x: Tensor, g: Tensor) -> Tensor:
    wide = x.float()
    variance = wide.pow(2).mean(x.dim() - 1)
    return (wide * torch.rsqrt(variance + EPS).unsqueeze(-1) * g).to(x.dtype)


def folded_weight(x: Tensor, g: Tensor) -> Tensor:
    wide = x.float()
    return (wide * (torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * g)).to(x.dtype)


def no_epsilon(x: Tensor, g: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True)) * g).to(x.dtype)


def expanded_weight(x: Tensor, g: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * g.view(1, 1, H).expand(x.shape)).to(x.dtype)


STRICT = [one_rounding, functional, default_epsilon, power_of_minus_half, sum_over_count, unsqueezed_mean]
STRICT += [no_epsilon, expanded_weight]
"""Bit-identical in every dtype: they round once, and by the same formula."""
STRICT_IN_FLOAT32 = [hugging_face, weight_last, never_widened]
ACCURATE = [divided_by_root, times_one_over_root, sum_times_inverse, folded_weight]
SPELLINGS = STRICT + STRICT_IN_FLOAT32 + ACCURATE


def data(dtype: torch.dtype, *lead: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*(lead or (2, 5)), H, generator=generator) * 3 + 0.5
    return x.to(dtype), (torch.randn(H, generator=generator) + 1).to(dtype)


def oracle(x: Tensor, g: Tensor, epsilon: float = EPS) -> Tensor:
    wide = x.double()
    return wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + epsilon) * g.double()


def assert_no_worse(fused: Tensor, eager: Tensor, exact: Tensor) -> None:
    error, source = (torch.linalg.vector_norm(t.double() - exact) for t in (fused, eager))
    assert error <= source * 1.05 + 1e-7 * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("norm", SPELLINGS, ids=lambda f: f.__name__)
def test_spelling(norm: Norm, dialect: str) -> None:
    args = data(torch.bfloat16)
    got = fuse(norm, args, dialect=dialect)
    assert got.fused == {"npu_rms_norm": 1}
    after = got.report.operators_after
    assert after["npu.npu_rms_norm"] == 1
    assert not {"aten.rsqrt", "aten.sqrt", "aten.pow", "aten.mean", "aten.sum", "aten.mul"} & set(after)
    level = got.report.fusions[0].level
    assert level == ("strict" if norm in STRICT else "accurate")
    assert got.result.dtype == torch.bfloat16
    if level == "strict":
        assert torch.equal(got.result, got.expected)
    exact = oracle(*args, {no_epsilon: 0.0, default_epsilon: torch.finfo(torch.float32).eps}.get(norm, EPS))
    assert_no_worse(got.result, got.expected, exact)


@pytest.mark.parametrize("norm", SPELLINGS, ids=lambda f: f.__name__)
def test_float32(norm: Norm) -> None:
    args = data(torch.float32)
    got = fuse(norm, args, dynamic=norm is not sum_times_inverse)
    assert got.fused == {"npu_rms_norm": 1}
    if norm in ACCURATE:
        assert got.report.fusions[0].level == "accurate"
        torch.testing.assert_close(got.result, got.expected)
    else:
        assert got.report.fusions[0].level == "strict"
        assert torch.equal(got.result, got.expected)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_dynamic_sizes(dtype: torch.dtype, dynamic: bool, dialect: str) -> None:
    args = data(dtype, 3, 2, 4)
    got = fuse(hugging_face, args, dynamic=dynamic, dialect=dialect, verify=True)
    assert got.fused == {"npu_rms_norm": 1}
    assert got.result.dtype == dtype
    assert_no_worse(got.result, got.expected, oracle(*args))


def test_float16_does_not_overflow_where_the_source_does() -> None:
    x, g = data(torch.float16)
    x = x * 1000  # squares beyond 65504
    got = fuse(never_widened, (x, g))
    assert got.fused == {"npu_rms_norm": 1}
    assert not got.expected.any()  # x * rsqrt(inf)
    torch.testing.assert_close(got.result.double(), oracle(x, g), rtol=1e-3, atol=1e-3)


def test_epsilon_is_passed_as_it_is_found() -> None:
    args = data(torch.float32)
    got = fuse(functional, args)
    assert "9.999999974752427e-07" in got.code  # F.rms_norm rounds it to float32
    code = fuse(hugging_face, args).code
    assert "npu_rms_norm.default(arg0_1, arg1_1)" in code  # 1e-6 is the operator's default


@pytest.mark.parametrize("dialect", DIALECTS)
def test_float32_weight_of_a_16_bit_model(dialect: str) -> None:
    x, g = data(torch.bfloat16)[0], data(torch.float32)[1]
    got = fuse(one_rounding, (x, g), dialect=dialect)
    assert got.fused == {"npu_rms_norm": 1}
    assert torch.equal(got.result, got.expected)
    assert got.report.operators_before != got.report.operators_after
    assert "f32[48]" in got.code


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gemma_adds_one_to_the_weight(dtype: torch.dtype, dialect: str) -> None:
    def gemma(x: Tensor, w: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (wide * (1.0 + w.float())).type_as(x)

    args = data(dtype)
    got = fuse(gemma, args, dialect=dialect)
    assert got.fused == {"npu_rms_norm": 1}
    assert got.report.fusions[0].level == "strict"
    assert torch.equal(got.result, got.expected)


def test_result_kept_in_float32() -> None:
    def norm(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * g
        return y, y.to(x.dtype)

    got = fuse(norm, data(torch.bfloat16))
    assert got.fused == {"npu_rms_norm": 1}
    assert [t.dtype for t in got.result] == [torch.float32, torch.bfloat16]
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_only_rows_that_are_contiguous_are_strict() -> None:
    x, g = data(torch.float32)
    padded = F.pad(x, (0, 8)).transpose(0, 1).contiguous().transpose(0, 1)[..., :H]
    got = fuse(functional, (padded, g))
    assert got.report.fusions[0].level == "strict"
    assert torch.equal(got.result, got.expected)
    columns = torch.randn(2, H, 5, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    got = fuse(functional, (columns, g))
    assert got.report.fusions[0].level == "accurate"
    assert_no_worse(got.result, got.expected, oracle(columns, g))
    refused = fuse(functional, (columns, g), numerics="strict")
    assert refused.fused == {}
    assert refused.reasons("rms_norm") == [
        "numerics='strict' does not allow the difference: the squares of a row that is not contiguous "
        "are added in another order (needs 'accurate')"
    ]
    assert torch.equal(refused.result, refused.expected)


def test_strict_refuses_the_second_rounding() -> None:
    got = fuse(hugging_face, data(torch.bfloat16), numerics="strict")
    assert got.fused == {}
    (reason,) = got.reasons("rms_norm")
    assert reason.startswith("numerics='strict' does not allow the difference")
    assert torch.equal(got.result, got.expected)


def test_two_norms_of_one_tensor() -> None:
    def norms(x: Tensor, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return functional(x, g), functional(x, h)

    x, g = data(torch.bfloat16)
    got = fuse(norms, (x, g, g * 2))
    assert got.fused == {"npu_rms_norm": 2}
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_a_norm_whose_root_is_read_elsewhere() -> None:
    def norm(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.float()
        root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (wide * root * g).to(x.dtype), root

    got = fuse(norm, data(torch.bfloat16))
    assert got.fused == {}
    (reason,) = got.reasons("rms_norm")
    assert reason.startswith(
        "an intermediate value that the fused operator does not return has a second user: rsqrt"
    )
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def norm_with(
    mean: Callable[[Tensor], Tensor] = lambda s: s.mean(-1, keepdim=True),
    add: Callable[[Tensor], Tensor] = lambda v: v + EPS,
    center: bool = False,
) -> Norm:
    def norm(x: Tensor, g: Tensor) -> Tensor:
        wide = x.float()
        if center:
            wide = wide - wide.mean(-1, keepdim=True)
        return (wide * torch.rsqrt(add(mean(wide.pow(2)))) * g).to(x.dtype)

    return norm


NEAR_MISSES = {
    "other dimension": (
        norm_with(mean=lambda s: s.mean(1, keepdim=True)),
        "the mean is not over the last dimension alone: dimension 1 of 3",
    ),
    "two dimensions": (
        norm_with(mean=lambda s: s.mean((1, 2), keepdim=True)),
        "the mean is not over the last dimension alone: dimension 1, 2 of 3",
    ),
    "whole tensor": (
        norm_with(mean=lambda s: s.mean((0, 1, 2), keepdim=True)),
        "the mean is not over the last dimension alone: all dimensions",
    ),
    "layer norm": (norm_with(center=True), "the mean is subtracted: this is a LayerNorm: "),
    "epsilon outside": (
        lambda x, g: (x.float() / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + EPS) * g).to(x.dtype),
        "epsilon is added to the root, not to the mean: ",
    ),
    "other tensor": (
        lambda x, g: ((x.float() + 1) * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS) * g).to(
            x.dtype
        ),
        "the mean square is of another tensor than the one scaled: ",
    ),
    "no weight": (
        lambda x, g: (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) + g,
        "there is no weight: ",
    ),
    "weight per entry": (
        lambda x, g: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * (x + g),
        "the weight is not one value per entry of the last dimension: [2, 5, 48] for [2, 5, 48]",
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss(case: str, dialect: str) -> None:
    norm, reason = NEAR_MISSES[case]
    got = fuse(norm, data(torch.float32), dialect=dialect)
    assert got.fused == {}
    assert got.reasons("rms_norm") == [reason]
    assert torch.equal(got.result, got.expected)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, g: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS) * g,  # an L2 norm
        lambda x, g: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (H + 1) + EPS) * g,
        lambda x, g: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + EPS) * g,
        lambda x, g: x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + EPS) * g,
        lambda x, g: F.layer_norm(x, (H,), g, None, EPS),
        lambda x, g: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp_min(EPS)) * g,
        lambda x, g: x / (x.pow(2).mean(-1, keepdim=True) + EPS) * g,
    ],
)
def test_something_else(norm: Norm) -> None:
    got = fuse(norm, data(torch.float32))
    assert got.fused == {}
    assert torch.equal(got.result, got.expected)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_epsilon_as_a_tensor_says_what_to_do(dialect: str) -> None:
    def norm(x: Tensor, g: Tensor, epsilon: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * g

    got = fuse(
        norm, (*data(torch.float32), torch.tensor(EPS, dtype=torch.float64)), dialect=dialect, dynamic=True
    )
    assert got.fused == {}
    (reason,) = got.reasons("rms_norm")
    assert reason.startswith("epsilon is a tensor, the operator takes a number")
    assert "torch._dynamo.config.specialize_float=True" in reason
    assert torch.equal(got.result, got.expected)


def test_float64_is_left_alone() -> None:
    got = fuse(lambda x, g: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * g, data(torch.float64))
    assert got.fused == {}
    assert got.reasons("rms_norm") == [
        "npu_rms_norm takes float16, bfloat16 and float32: x float64, weight float64"
    ]
    assert torch.equal(got.result, got.expected)


def test_a_call_of_the_operator_stays() -> None:
    got = fuse(lambda x, g: npu.npu_rms_norm(x, g, EPS)[0], data(torch.bfloat16))
    assert got.fused == {}
    assert got.report.refused == []
    assert torch.equal(got.result, got.expected)


def run_on(
    fn: Callable[..., Tensor], args: tuple[Tensor, ...]
) -> tuple[dict[str, int], list[str], fx.GraphModule]:
    """The pipeline on a graph that holds the ATen operators as they are."""
    graph_module = make_fx(fn, tracing_mode="fake", pre_dispatch=True)(*args)
    graph_module.graph.eliminate_dead_code()
    report = pipeline.run(graph_module.graph, FusionConfig(strict=True))
    graph_module.recompile()
    return report.fused, [f"{r.reason}: {r.detail}" for r in report.refused], graph_module


def composite(epsilon: float | None) -> Norm:
    return lambda x, g: torch.ops.aten.rms_norm.default(x, [H], g, epsilon)


def fused_kernel(epsilon: float | None) -> Norm:
    return lambda x, g: torch.ops.aten._fused_rms_norm.default(x, [H], g, epsilon)[0]


ATEN = [composite] + ([fused_kernel] if hasattr(torch.ops.aten, "_fused_rms_norm") else [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("epsilon", [EPS, None])
@pytest.mark.parametrize("operator", ATEN, ids=lambda f: f.__name__)
def test_aten_operator(
    operator: Callable[[float | None], Norm], epsilon: float | None, dtype: torch.dtype
) -> None:
    args = data(dtype)
    with torch.no_grad():
        fused, _, graph_module = run_on(operator(epsilon), args)
    assert fused == {"npu_rms_norm": 1}
    expected = operator(epsilon)(*args)
    result = graph_module(*args)
    assert result.dtype == dtype
    assert_no_worse(
        result, expected, oracle(*args, torch.finfo(torch.float32).eps if epsilon is None else epsilon)
    )


@pytest.mark.parametrize("operator", ["rms_norm"] + (["_fused_rms_norm"] if len(ATEN) > 1 else []))
def test_aten_operator_without_weight_or_of_two_dimensions(operator: str) -> None:
    call = getattr(torch.ops.aten, operator).default

    def first(y: Tensor | tuple[Tensor, ...]) -> Tensor:
        return y if isinstance(y, Tensor) else y[0]

    x = data(torch.float32)[0]
    with torch.no_grad():
        fused, reasons, _ = run_on(lambda x: first(call(x, [H], None, EPS)), (x,))
        assert fused == {}
        assert reasons == ["there is no weight: "]
        fused, reasons, _ = run_on(lambda x, g: first(call(x, [5, H], g, EPS)), (x, torch.ones(5, H)))
    assert fused == {}
    assert reasons == []


def test_switched_off() -> None:
    got = fuse(hugging_face, data(torch.bfloat16), rms_norm=False)
    assert got.fused == {}
    assert torch.equal(got.result, got.expected)


def test_head_dimension_of_a_view() -> None:
    """Qwen3 normalizes each head: [B, S, N * D] viewed as [B, S, N, D]."""

    def norm(x: Tensor, g: Tensor) -> Tensor:
        return hugging_face(x.view(*x.shape[:-1], -1, 16), g).transpose(1, 2)

    x, g = data(torch.bfloat16)
    got = fuse(norm, (x, g[:16].clone()), dynamic=True)
    assert got.fused == {"npu_rms_norm": 1}
    assert math.prod(got.result.shape) == x.numel()
    torch.testing.assert_close(got.result, got.expected, rtol=2**-7, atol=1e-6)
