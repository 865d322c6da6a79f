"""Symmetric int8 quantization per token becomes npu_dynamic_quant; every other quantization stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.passes import _w8a8
from tests.passes._harness import DIALECTS, Outcome, fuse, fuse_only
from tests.passes.test_dequant_swiglu_quant_refusals import QUANTIZATIONS

NAME = "dynamic_quant"
OPERATOR = "npu_dynamic_quant"


def alone(fn: Callable[..., Any], args: list[Tensor], **options: Any) -> Outcome:
    return fuse_only(NAME, fn, args, **options)


def value(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spelled(
    maximum: str = "amax of abs",
    maximum_guard: str = "none",
    scale: str = "m / 127",
    scale_guard: str = "none",
    quotient: str = "x / s",
    rounded: str = "round, clamp",
) -> Callable[[Tensor], Any]:
    def quantize(x: Tensor) -> Any:
        m = _w8a8.GUARDS_OF_MAXIMUM[maximum_guard](_w8a8.MAXIMA[maximum](x))
        s = _w8a8.GUARDS_OF_SCALE[scale_guard](_w8a8.SCALES[scale](m))
        q = _w8a8.QUOTIENTS[quotient](x, s, m)
        return _w8a8.ROUNDED[rounded](q).to(torch.int8), s.float()

    return quantize


TABLES = {
    "maximum": _w8a8.MAXIMA,
    "maximum_guard": _w8a8.GUARDS_OF_MAXIMUM,
    "scale": _w8a8.SCALES,
    "scale_guard": _w8a8.GUARDS_OF_SCALE,
    "quotient": _w8a8.QUOTIENTS,
    "rounded": _w8a8.ROUNDED,
}
CHOICES = [(name, choice) for name, table in TABLES.items() for choice in table]


def check(outcome: Outcome, x: Tensor) -> None:
    """Fused, nothing left of the chain, and no further from the exact quantization than eager."""
    assert outcome.fused == {OPERATOR: 1}, outcome.reasons(NAME)
    after = {name.split(".")[1] for name in outcome.report.operators_after}
    assert OPERATOR in after
    assert not after & {"abs", "amax", "amin", "aminmax", "max", "round", "div", "clamp", "maximum", "where"}
    step = x.double().abs().amax(-1, keepdim=True) / 127

    def error(result: Any) -> Tensor:
        y, s = result
        return ((y.double() * s.double().reshape(step.shape) - x.double()) / step).abs().mean()

    assert error(outcome.result) <= error(outcome.expected) * 1.002 + 1e-6
    assert outcome.result[1].shape == outcome.expected[1].shape


@pytest.mark.by_turns("dialect", "dynamic")
@pytest.mark.parametrize("dialect,dynamic", [("aot", False), ("inductor", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name,choice", CHOICES)
def test_each_choice(name: str, choice: str, dtype: torch.dtype, dialect: str, dynamic: bool) -> None:
    x = value(dtype, 3, 5, 24)
    check(alone(spelled(**{name: choice}), [x], dialect=dialect, dynamic=dynamic), x)


EXACT = {
    "maximum": tuple(_w8a8.MAXIMA),
    "scale": ("m / 127", "m / 127.0", "m / tensor"),
    "rounded": tuple(_w8a8.ROUNDED),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name,choice", [(n, c) for n, choices in EXACT.items() for c in choices])
def test_float32_is_strict(name: str, choice: str, dialect: str) -> None:
    x = value(torch.float32, 37, 45)
    outcome = alone(spelled(**{name: choice}), [x], numerics="strict", dialect=dialect)
    assert outcome.fused == {OPERATOR: 1}
    assert outcome.report.fusions[0].level == "strict"
    assert all(map(torch.equal, outcome.result, outcome.expected))


@pytest.mark.parametrize(
    "name,choice", [(n, c) for n, c in CHOICES if c not in (*EXACT.get(n, ()), "none", "x / s")]
)
def test_strict_refuses_the_others(name: str, choice: str) -> None:
    x = value(torch.float32, 8, 16)
    outcome = alone(spelled(**{name: choice}), [x], numerics="strict")
    assert outcome.fused == {}
    (reason,) = outcome.reasons(NAME)
    assert reason.startswith("numerics='strict' does not allow the difference: ")
    assert all(map(torch.equal, outcome.result, outcome.expected))


def test_bfloat16_widened_first_is_strict() -> None:
    x = value(torch.bfloat16, 8, 16)
    outcome = alone(lambda x: spelled()(x.float()), [x], numerics="strict")
    assert outcome.fused == {OPERATOR: 1}
    assert all(map(torch.equal, outcome.result, outcome.expected))
    assert "aten._to_copy" not in outcome.report.operators_after


@settings(max_examples=25, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    st.fixed_dictionaries({name: st.sampled_from(sorted(table)) for name, table in TABLES.items()}),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    st.sampled_from(DIALECTS),
    st.booleans(),
)
def test_any_combination(choices: dict[str, str], dtype: torch.dtype, dialect: str, dynamic: bool) -> None:
    x = value(dtype, 4, 6, 20)
    check(alone(spelled(**choices), [x], dialect=dialect, dynamic=dynamic), x)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smoothed(dtype: torch.dtype, dialect: str) -> None:
    x, smooth = value(dtype, 6, 32), value(dtype, 32, seed=1).abs() + 0.5
    outcome = alone(
        lambda x, f: spelled()(x.float() * f.float()), [x, smooth], numerics="strict", dialect=dialect
    )
    assert outcome.fused == {OPERATOR: 1}
    assert "smooth_scales" in outcome.code
    assert "aten.mul" not in outcome.report.operators_after
    assert all(map(torch.equal, outcome.result, outcome.expected))


def test_smoothed_by_another_dtype_keeps_the_product() -> None:
    x, smooth = value(torch.bfloat16, 6, 32), value(torch.float32, 32, seed=1).abs() + 0.5
    outcome = alone(lambda x, f: spelled()(x * f), [x, smooth])
    assert outcome.fused == {OPERATOR: 1}
    assert (outcome.result[0].int() - outcome.expected[0].int()).abs().max() <= 1
    torch.testing.assert_close(outcome.result[1], outcome.expected[1])


def test_a_rounded_product_is_quantized_as_rounded() -> None:
    x, smooth = value(torch.bfloat16, 6, 32), value(torch.bfloat16, 32, seed=1).abs() + 0.5
    outcome = alone(lambda x, f: spelled()((x * f).float()), [x, smooth], numerics="strict")
    assert outcome.fused == {OPERATOR: 1}
    assert all(map(torch.equal, outcome.result, outcome.expected))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", [c for c in QUANTIZATIONS if not c.startswith(("static", "fake"))])
def test_other_quantizations(case: str, dialect: str) -> None:
    quantize, reason = QUANTIZATIONS[case]
    outcome = alone(quantize, [value(torch.float32, 32, 32)], dialect=dialect)
    assert outcome.fused == {}
    if reason != "the scale is not along the last dimension":  # told by the static fusion
        assert any(said.startswith(reason) for said in outcome.reasons(NAME)), outcome.reasons(NAME)
    assert all(map(torch.equal, outcome.result, outcome.expected))


def test_scale_returned_in_16_bits() -> None:
    """What divides and what is returned are the same rounded number; a fused scale would not be."""

    def quantize(x: Tensor) -> Any:
        s = x.abs().amax(-1, keepdim=True) / 127
        return (x / s).round().clamp(-128, 127).to(torch.int8), s

    outcome = alone(quantize, [value(torch.bfloat16, 6, 32)])
    assert outcome.fused == {}
    (reason,) = outcome.reasons(NAME)
    assert reason.startswith(
        "an intermediate value that the fused operator does not return has a second user"
    )
    assert all(map(torch.equal, outcome.result, outcome.expected))


def test_scale_not_returned() -> None:
    outcome = alone(lambda x: spelled()(x)[:1], [value(torch.float32, 6, 32)], numerics="strict")
    assert outcome.fused == {OPERATOR: 1}
    assert torch.equal(outcome.result[0], outcome.expected[0])


def test_scale_used_guarded_and_not() -> None:
    def quantize(x: Tensor) -> Any:
        s = x.abs().amax(-1, keepdim=True) / 127
        guarded = s.clamp(min=1e-8)
        return (
            (x / guarded).round().clamp(-128, 127).to(torch.int8),
            s,
            guarded,
            s.squeeze(-1).bfloat16().float(),
        )

    outcome = alone(quantize, [value(torch.float32, 6, 32)])
    assert outcome.fused == {OPERATOR: 1}
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        assert have.shape == want.shape
        torch.testing.assert_close(have.float(), want.float(), rtol=5e-3, atol=0)


def test_three_times_the_same() -> None:
    def quantize(x: Tensor) -> Any:
        return [part for _ in range(3) for part in spelled()(x)]

    outcome = alone(quantize, [value(torch.float32, 6, 32)], numerics="strict")
    assert outcome.fused == {OPERATOR: 1}
    assert outcome.report.operators_after[f"npu.{OPERATOR}"] == 1
    assert all(map(torch.equal, outcome.result, outcome.expected))


def test_float64_stays() -> None:
    outcome = alone(spelled(), [value(torch.float64, 6, 32)])
    assert outcome.fused == {}
    assert outcome.reasons(NAME) == ["the values are not float32 or 16-bit floats: float64"]
    assert all(map(torch.equal, outcome.result, outcome.expected))


def test_target_takes_16_bits_only() -> None:
    outcome = alone(spelled(), [value(torch.float32, 6, 32)], target="ascend910b")
    assert outcome.fused == {}
    assert outcome.reasons(NAME) == ["npu_dynamic_quant takes float16 and bfloat16: float32"]
    assert alone(spelled(), [value(torch.bfloat16, 6, 32)], target="ascend910b").fused == {OPERATOR: 1}


def test_flag() -> None:
    outcome = fuse(spelled(), [value(torch.float32, 6, 32)], dynamic_quant=False)
    assert outcome.fused == {} and outcome.reasons(NAME) == []
