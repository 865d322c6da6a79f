"""Every spelling of a W8A8 MLP's middle becomes one npu_dequant_swiglu_quant."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.passes import _w8a8
from tests.passes._harness import Outcome, fuse
from tests.passes._w8a8 import Spelling

OPERATOR = "npu_dequant_swiglu_quant"
SPELLINGS = _w8a8.one_by_one()

OPEN_WHEN_SYMBOLIC = ("narrow", "tensor_split")
"""Halves that say nothing about whether the size is even: with a symbolic 2H they may be none."""


def check(spelling: Spelling, outcome: Outcome, args: list[torch.Tensor], dialect: str = "aot") -> None:
    """Fused once, nothing of the chain left, and as good as the level promises."""
    assert outcome.fused == {OPERATOR: 1}, outcome.reasons("dequant_swiglu_quant")
    before, after = outcome.report.operators_before, outcome.report.operators_after
    assert f"npu.{OPERATOR}" not in before
    assert after[f"npu.{OPERATOR}"] == 1
    gone = {"silu", "sigmoid", "exp", "round", "abs", "amax", "amin", "aminmax", "linalg_vector_norm", "neg"}
    left = {name.split(".")[1] for name in after}
    allowed = {"round"} if spelling.static is not None else set()  # the zero point of some is rounded
    assert not (left & gone) - allowed
    (record,) = outcome.report.fusions
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        assert (have.shape, have.dtype) == (want.shape, want.dtype)
    if spelling.exact and dialect == "aot":  # Inductor takes silu apart
        assert record.level == "strict" and not record.notes
        for have, want in zip(outcome.result, outcome.expected, strict=True):
            assert torch.equal(have, want)
        return
    assert record.level == "accurate" and record.notes
    fused, eager = (_w8a8.error(r, spelling, args) for r in (outcome.result, outcome.expected))
    assert fused <= eager * 1.002 + 1e-5


@pytest.mark.by_turns("dialect", "dynamic")
@pytest.mark.parametrize("dialect,dynamic", [("aot", False), ("inductor", True)])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=_w8a8.described)
def test_each_choice(spelling: Spelling, dialect: str, dynamic: bool) -> None:
    args = spelling.inputs()
    if spelling.halves in OPEN_WHEN_SYMBOLIC:
        torch._dynamo.mark_static(args[1])
    numerics = "strict" if spelling.exact and dialect == "aot" else "accurate"
    outcome = fuse(spelling.function(), args, dialect=dialect, dynamic=dynamic, numerics=numerics)
    check(spelling, outcome, args, dialect)


@pytest.mark.parametrize("halves", _w8a8.HALVES)
def test_halves_of_symbolic_width_in_the_other_combinations(halves: str) -> None:
    spelling = Spelling(halves=halves, left=False, rank=3)
    for dialect, dynamic in (("aot", True), ("inductor", False)):
        args = spelling.inputs()
        if halves in OPEN_WHEN_SYMBOLIC:
            torch._dynamo.mark_static(args[1])
        check(spelling, fuse(spelling.function(), args, dialect=dialect, dynamic=dynamic), args, dialect)


@pytest.mark.parametrize("halves", OPEN_WHEN_SYMBOLIC)
def test_symbolic_width_that_may_be_odd(halves: str) -> None:
    spelling = Spelling(halves=halves)
    args = spelling.inputs()
    outcome = fuse(spelling.function(), args, dynamic=True, dynamic_quant=False)
    assert outcome.fused == {}
    (reason,) = outcome.reasons("dequant_swiglu_quant")
    assert reason.startswith("the last dimension is not even: it is s") and "symbolic='guard'" in reason
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        assert torch.equal(have, want)
    guarded = fuse(spelling.function(), args, dynamic=True, symbolic="guard")
    check(spelling, guarded, args)


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if not s.exact], ids=_w8a8.described)
def test_strict_refuses_what_is_not_bit_equal(spelling: Spelling) -> None:
    outcome = fuse(spelling.function(), spelling.inputs(), numerics="strict")
    assert OPERATOR not in outcome.fused
    (reason,) = outcome.reasons("dequant_swiglu_quant")
    assert reason.startswith("numerics='strict' does not allow the difference: ")
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        assert torch.equal(have, want)


def _choices(table: object) -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(table))  # type: ignore[call-overload]


WITHOUT_SHRINKING = (
    Phase.explicit,
    Phase.generate,
)  # a failing example says enough, and shrinking compiles for minutes

SOME = st.builds(
    Spelling,
    product=_choices(_w8a8.PRODUCTS),
    dequantized=_choices(_w8a8.DEQUANTIZED),
    halves=_choices([h for h in _w8a8.HALVES if h not in OPEN_WHEN_SYMBOLIC]),
    activation=_choices(_w8a8.ACTIVATIONS),
    left=st.booleans(),
    gate_first=st.booleans(),
    maximum=_choices(_w8a8.MAXIMA),
    maximum_guard=_choices(_w8a8.GUARDS_OF_MAXIMUM),
    scale=_choices(_w8a8.SCALES),
    scale_guard=_choices(_w8a8.GUARDS_OF_SCALE),
    quotient=_choices(_w8a8.QUOTIENTS),
    rounded=_choices(_w8a8.ROUNDED),
    bias=_choices(("none", "int32", "float32", "bfloat16")),
    smooth=st.booleans(),
    rank=st.sampled_from((2, 3)),
    roundings=st.frozensets(st.sampled_from(_w8a8.ROUNDINGS), max_size=3),
    bfloat16_tail=st.booleans(),
    channel_dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)


@settings(max_examples=25, deadline=None, derandomize=True, phases=WITHOUT_SHRINKING)
@given(SOME, st.sampled_from(("aot", "inductor")), st.booleans(), st.integers(0, 99))
def test_any_combination(spelling: Spelling, dialect: str, dynamic: bool, seed: int) -> None:
    args = spelling.inputs(seed)
    outcome = fuse(spelling.function(), args, dialect=dialect, dynamic=dynamic)
    check(spelling, outcome, args, dialect)


@settings(max_examples=12, deadline=None, derandomize=True, phases=WITHOUT_SHRINKING)
@given(SOME, _choices(_w8a8.STATIC), st.sampled_from(("aot", "inductor")), st.booleans())
def test_any_combination_with_a_given_scale(
    spelling: Spelling, static: str, dialect: str, dynamic: bool
) -> None:
    if spelling.rounded in ("round, symmetric clamp", "no clamp"):
        spelling = dataclasses.replace(spelling, rounded="clamp, round")
    spelling = dataclasses.replace(spelling, static=static, smooth=False, roundings=frozenset())
    args = spelling.inputs()
    outcome = fuse(spelling.function(), args, dialect=dialect, dynamic=dynamic)
    unused = {"scale": "m / 127", "maximum_guard": "none", "scale_guard": "none", "quotient": "x / s"}
    check(dataclasses.replace(spelling, **unused), outcome, args, dialect)
