"""SwiGLU of two halves becomes npu_swiglu, in every spelling and dtype; what is none stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes import _w8a8
from tests.passes._harness import DIALECTS, Outcome, fuse, fuse_only
from tests.passes.test_dequant_swiglu_quant_refusals import GATES

OPEN_WHEN_SYMBOLIC = ("narrow", "tensor_split")


def alone(fn: Callable[..., Any], args: list[Tensor], **options: Any) -> Outcome:
    return fuse_only("swiglu", fn, args, **options)


def value(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)


def spelled(halves: str, activation: str, gate_first: bool = True) -> Callable[[Tensor], Tensor]:
    def swiglu(x: Tensor) -> Tensor:
        a, b = _w8a8.HALVES[halves](x)
        act = _w8a8.ACTIVATIONS[activation](a)
        return act * b if gate_first else b * act

    return swiglu


def check(outcome: Outcome, x: Tensor) -> None:
    assert outcome.fused == {"npu_swiglu": 1}, outcome.reasons("swiglu")
    after = {name.split(".")[1] for name in outcome.report.operators_after}
    assert "npu_swiglu" in after and not after & {
        "silu",
        "sigmoid",
        "exp",
        "div",
        "reciprocal",
        "split",
        "mul",
    }
    assert outcome.result.dtype == x.dtype and outcome.result.shape == outcome.expected.shape
    a, b = x.double().chunk(2, -1)
    exact = F.silu(a) * b
    fused, eager = ((r.double() - exact).abs().mean() for r in (outcome.result, outcome.expected))
    assert fused <= eager * 1.001 + 1e-7


@pytest.mark.by_turns("dialect", "dynamic")
@pytest.mark.parametrize("dialect,dynamic", [("aot", False), ("aot", True), ("inductor", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("halves", _w8a8.HALVES)
def test_halves(halves: str, dtype: torch.dtype, dialect: str, dynamic: bool) -> None:
    x = value(dtype, 3, 5, 32)
    if halves in OPEN_WHEN_SYMBOLIC:
        torch._dynamo.mark_static(x)
    check(alone(spelled(halves, "silu"), [x], dialect=dialect, dynamic=dynamic), x)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", _w8a8.ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype, gate_first: bool, dialect: str) -> None:
    x = value(dtype, 7, 16)
    check(alone(spelled("chunk", activation, gate_first), [x], dialect=dialect), x)


def test_float32_silu_is_strict() -> None:
    x = value(torch.float32, 33, 46)
    outcome = alone(spelled("chunk", "silu"), [x], numerics="strict")
    assert outcome.fused == {"npu_swiglu": 1}
    assert outcome.report.fusions[0].level == "strict"
    assert torch.equal(outcome.result, outcome.expected)


@pytest.mark.parametrize("activation,dtype", [("silu", torch.bfloat16), ("x * sigmoid(x)", torch.float32)])
def test_strict_refuses(activation: str, dtype: torch.dtype) -> None:
    x = value(dtype, 8, 16)
    outcome = alone(spelled("chunk", activation), [x], numerics="strict")
    assert outcome.fused == {}
    (reason,) = outcome.reasons("swiglu")
    assert reason.startswith("numerics='strict' does not allow the difference: ")
    assert torch.equal(outcome.result, outcome.expected)


def test_after_a_bfloat16_matmul() -> None:
    x, w = value(torch.bfloat16, 2, 8, 24), value(torch.bfloat16, 24, 32)

    def mlp(x: Tensor, w: Tensor) -> Tensor:
        a, b = (x @ w).chunk(2, -1)
        return F.silu(a) * b

    outcome = alone(mlp, [x, w])
    assert outcome.fused == {"npu_swiglu": 1}
    torch.testing.assert_close(outcome.result, outcome.expected, rtol=2e-2, atol=1e-2)


def test_of_a_product_that_is_rounded() -> None:
    """The operator takes the rounded product, not the float32 one inside it."""
    x, scale = value(torch.bfloat16, 8, 32), value(torch.bfloat16, 32)

    def scaled(x: Tensor, scale: Tensor) -> Tensor:
        a, b = (x * scale).chunk(2, -1)
        return F.silu(a) * b

    outcome = alone(scaled, [x, scale])
    assert outcome.fused == {"npu_swiglu": 1}
    torch.testing.assert_close(outcome.result, outcome.expected, rtol=2e-2, atol=1e-2)


def test_second_half_activated() -> None:
    def right(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return a * F.silu(b)

    outcome = alone(right, [value(torch.float32, 8, 16)])
    assert outcome.fused == {}
    assert outcome.reasons("swiglu") == ["npu_swiglu activates the first half, the model the second: "]
    assert torch.equal(outcome.result, outcome.expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", GATES)
def test_other_gates(case: str, dtype: torch.dtype) -> None:
    act, reason = GATES[case]
    outcome = alone(act, [value(dtype, 32, 64)])
    assert outcome.fused == {}
    assert reason is not None and any(said.startswith(reason) for said in outcome.reasons("swiglu"))
    assert torch.equal(outcome.result, outcome.expected)


def test_float32_halves_rounded_at_the_end() -> None:
    def narrowing(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return (F.silu(a) * b).bfloat16()

    outcome = alone(narrowing, [value(torch.float32, 8, 16)])
    assert outcome.fused == {"npu_swiglu": 1}
    assert torch.equal(outcome.result, outcome.expected)


def test_other_dtypes_stay() -> None:
    outcome = alone(spelled("chunk", "silu"), [value(torch.float64, 8, 16)])
    assert outcome.fused == {}
    assert torch.equal(outcome.result, outcome.expected)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_second_user(which: int) -> None:
    def returned(x: Tensor) -> Any:
        a, b = x.chunk(2, -1)
        act = F.silu(a)
        return act * b, (a, b, act)[which] * 2

    outcome = alone(returned, [value(torch.float32, 8, 16)])
    assert outcome.fused == {}
    (reason,) = outcome.reasons("swiglu")
    assert reason.startswith(
        "an intermediate value that the fused operator does not return has a second user"
    )
    assert all(map(torch.equal, outcome.result, outcome.expected))


def test_flag() -> None:
    x = value(torch.float32, 8, 16)
    assert fuse(spelled("chunk", "silu"), [x], swiglu=False).fused == {}
