"""What every algorithm has to keep, whatever it is asked and has seen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from npu_fusion.quantization.algorithms import ALGORITHMS
from npu_fusion.quantization.inner_scale import nearest_inner_scale
from npu_fusion.quantization.qparams import round_to_nearest
from npu_fusion.quantization.scheme import InputScheme, WeightScheme
from tests.quantization.algorithms._problems import (
    INT8,
    WEIGHT_SCHEMES,
    correlated,
    problem,
    random,
    same,
    scheme_id,
    solve,
)

NAMES = ("autoround", "awq", "cast", "gptq", "minmax", "mxquant", "ofmr", "quantile", "smoothquant")
FAST = {"steps": 5, "grids_num": 3}
INPUTS = (
    None,
    InputScheme("int8", symmetric=False),
    InputScheme("float8_e4m3fn"),
    InputScheme("hifloat8"),
    InputScheme("int8", strategy="token"),
)


def test_all_are_registered() -> None:
    assert tuple(sorted(ALGORITHMS)) == NAMES
    assert {name for name, a in ALGORITHMS.items() if a.smooths} == {"smoothquant", "awq"}


def weights() -> list[Tensor]:
    # 70 inputs: the last group is partial.
    return [random(24, 70, seed=1), random(8, 70, seed=2)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("scheme", "inputs"),
    [
        *((scheme, INPUTS[2]) for scheme in WEIGHT_SCHEMES),
        *((INT8, inputs) for inputs in INPUTS),
    ],
    ids=scheme_id,
)
def test_solutions_are_complete(name: str, scheme: WeightScheme, inputs: InputScheme | None) -> None:
    given, x = weights(), correlated(64, 70)
    before = [weight.clone() for weight in given]
    solution = solve(name, given, x, scheme, inputs, torch.bfloat16, FAST)

    assert all(torch.equal(weight, old) for weight, old in zip(given, before, strict=True))
    assert len(solution.weights) == 2
    smooth = solution.smooth_scales
    if smooth is not None:
        assert ALGORITHMS[name].smooths
        assert (smooth.dtype, smooth.shape) == (torch.bfloat16, (70,))
        assert (smooth > 0).all() and smooth.isfinite().all()
    for weight, quantized in zip(given, solution.weights, strict=True):
        reference = round_to_nearest(weight, scheme, inputs)
        for field in ("codes", "scale", "offset", "channel_scale"):
            got, expected = getattr(quantized, field), getattr(reference, field)
            assert (got is None) == (expected is None)
            assert got is None or (got.dtype, got.shape) == (expected.dtype, expected.shape)
        value = quantized.dequantize() * (1 if smooth is None else smooth.float())
        if quantized.channel_scale is not None:
            assert torch.equal(nearest_inner_scale(quantized.scale), quantized.scale)
        # All of them are quantizations of this weight: their error is of the size of rounding's.
        error, usual = (value - weight).norm(), (reference.dequantize() - weight).norm()
        assert error <= 4 * usual
    static = inputs is not None and not inputs.dynamic
    assert (solution.inputs is not None) == static
    if solution.inputs is not None:
        assert solution.inputs.scale.shape == (1,) and (solution.inputs.scale > 0).all()
        assert (solution.inputs.offset is not None) == (inputs == INPUTS[1] and name != "cast")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES, ids=scheme_id)
def test_a_layer_that_never_ran_is_rounded_to_nearest(name: str, scheme: WeightScheme) -> None:
    solution = solve(name, weights(), None, scheme, InputScheme("int8"), options=FAST)
    assert solution.smooth_scales is None
    assert solution.inputs is not None and solution.inputs.scale.tolist() == [1.0]
    expected = [round_to_nearest(weight, scheme) for weight in weights()]
    assert all(same(a, b) for a, b in zip(solution.weights, expected, strict=True))


def strange_inputs() -> dict[str, Tensor]:
    infinite, dead, huge = (correlated(16, 70) for _ in range(3))
    infinite[3, 5], infinite[7, 9] = math.inf, math.nan
    dead[:, ::3] = 0
    huge[:, 1] *= 1e30
    tiny = correlated(16, 70) * 1e-25
    return {"infinite": infinite, "dead": dead, "huge": huge, "tiny": tiny, "zero": torch.zeros(16, 70)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", strange_inputs())
def test_strange_inputs_give_finite_weights(name: str, dtype: torch.dtype, kind: str) -> None:
    x = strange_inputs()[kind]
    given = [*weights(), torch.zeros(4, 70)]
    for scheme in (WeightScheme("int4", False, "group", 32), WeightScheme("float8_e4m3fn")):
        solution = solve(name, given, x, scheme, InputScheme("int8"), dtype, FAST)
        assert all(quantized.dequantize().isfinite().all() for quantized in solution.weights)
        assert (solution.weights[-1].dequantize() == 0).all()
        assert solution.inputs is not None and solution.inputs.scale.isfinite().all()
        if solution.smooth_scales is not None:
            assert solution.smooth_scales.isfinite().all() and (solution.smooth_scales > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_again(name: str) -> None:
    scheme = WeightScheme("int4", strategy="group", group_size=32)
    one, two = (
        solve(name, weights(), correlated(64, 70), scheme, InputScheme("int8"), options=FAST)
        for _ in range(2)
    )
    assert all(same(a, b) for a, b in zip(one.weights, two.weights, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_range_is_needed_for_static_inputs_only(name: str) -> None:
    scheme = WeightScheme("int8")
    weight_only = problem(name, weights(), None, scheme).statistics.needs
    dynamic = problem(name, weights(), None, scheme, InputScheme("int8", strategy="token")).statistics.needs
    static = problem(name, weights(), None, scheme, InputScheme("int8")).statistics.needs
    assert weight_only == dynamic
    assert ("range" in weight_only) == (name == "smoothquant")
    assert ("range" in static) == (name != "cast")
    assert bool(weight_only) == (name in ("autoround", "awq", "gptq", "ofmr", "smoothquant"))
