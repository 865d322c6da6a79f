"""minmax, mxquant, quantile and cast: rounding to nearest, with different parameters of the input."""

from __future__ import annotations

import pytest
import torch

from npu_fusion.quantization.qparams import round_to_nearest
from npu_fusion.quantization.scheme import InputScheme
from tests.quantization.algorithms._problems import FP4, HIF8, INT8, MXFP4, MXFP8, random, same, solve

X = torch.tensor([[1.0, -6.0, 0.5, 2.0] * 16, [3.0, 2.0, 0.1, -1.0] * 16])


@pytest.mark.parametrize("name", ["minmax", "mxquant", "quantile", "cast"])
def test_weights_are_rounded_to_nearest(name: str) -> None:
    weights = [random(6, 64, seed=1), -random(5, 64, seed=2).abs()]
    for scheme in (INT8, HIF8, MXFP4, MXFP8):
        solution = solve(name, weights, X, scheme)
        assert all(
            same(q, round_to_nearest(w, scheme)) for q, w in zip(solution.weights, weights, strict=True)
        )
        assert (solution.inputs, solution.smooth_scales) == (None, None)


def test_minmax_gives_two_levels_beside_float8() -> None:
    (quantized,) = solve("minmax", [random(6, 64)], X, FP4, InputScheme("float8_e4m3fn")).weights
    assert same(quantized, round_to_nearest(random(6, 64), FP4, InputScheme("float8_e4m3fn")))
    assert quantized.channel_scale is not None


@pytest.mark.parametrize(
    ("name", "inputs", "scale"),
    [
        ("minmax", InputScheme("int8"), 6 / 128),
        ("minmax", InputScheme("float8_e4m3fn"), 6 / 448),
        ("minmax", InputScheme("hifloat8"), 6 / 16),
        ("quantile", InputScheme("hifloat8"), 6 / 16),
        ("cast", InputScheme("hifloat8"), 1.0),
    ],
)
def test_scale_of_the_input(name: str, inputs: InputScheme, scale: float) -> None:
    solution = solve(name, [random(6, 64)], X, HIF8, inputs)
    assert solution.inputs is not None
    assert solution.inputs.scale.tolist() == torch.tensor([scale]).tolist()
    assert solution.inputs.offset is None


def test_asymmetric_input() -> None:
    solution = solve("minmax", [random(6, 64)], X, INT8, InputScheme("int8", symmetric=False))
    assert solution.inputs is not None and solution.inputs.offset is not None
    assert solution.inputs.scale.tolist() == torch.tensor([9 / 255]).tolist()
    assert solution.inputs.offset.tolist() == [round(-128 + 6 * 255 / 9)]
