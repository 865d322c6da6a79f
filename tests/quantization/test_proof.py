"""What the algorithms are for, on a trained model: the demo's Llama, with planted channels of outliers.

The same claims for every size of outlier, more bits and more types are slow; ``python -m
benchmarks.quantization`` measures them all.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import quantization
from benchmarks.quantization import (
    ALONE,
    FULL,
    PRESETS,
    SIZES,
    configured,
    loss,
    planted,
    quantized,
    with_bits,
)
from npu_fusion.demo.outliers import plant_outliers

pytest.importorskip("transformers")

NAIVE = "int8, weights and inputs per tensor (naive)"
LARGE = 256


@pytest.fixture(autouse=True)
def _data(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is fast has a quarter of the calibration data and half of the text of the documented tables."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(quantization, "BATCHES", 2)
        monkeypatch.setattr(quantization, "EVALUATED", slice(100_000, 108_192))
    quantization.windows.cache_clear()
    yield
    quantization.windows.cache_clear()


def float_loss() -> float:
    return loss(planted())


def change(config: object, size: float = 1) -> float:
    """Of the loss, as a part of it."""
    return loss(quantized(config, size)) / float_loss() - 1


def of_sizes(*fast: int) -> list[object]:
    return [pytest.param(s, marks=() if s in fast else pytest.mark.slow) for s in SIZES]


@pytest.mark.parametrize("size", of_sizes(LARGE))
def test_planting_outliers_does_not_change_the_model(size: int) -> None:
    assert loss(planted(size)) == float_loss()


def test_naive_int8_collapses() -> None:
    assert change(FULL[NAIVE], LARGE) > 1


@pytest.mark.parametrize("size", of_sizes(LARGE))
def test_smoothquant_stays_within_half_a_percent(size: int) -> None:
    assert abs(change(PRESETS["INT8_SMOOTHQUANT_CFG"], size)) < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name", ["smoothquant, weights and inputs per tensor", "W8A8_DYNAMIC_SMOOTHQUANT_CFG: inputs per token"]
)
def test_other_forms_of_smoothquant_do_too(name: str, size: int) -> None:
    assert abs(change(FULL[name], size)) < 0.005


@pytest.mark.parametrize("size", of_sizes())
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "hifloat8"])
def test_eight_bit_floats_stay_within_a_fifth_of_a_percent(kind: str, size: int) -> None:
    assert abs(change(FULL[f"{kind}, ofmr, weights per channel"], size)) < 0.002


@pytest.mark.parametrize(
    ("bits", "size"),
    [
        # Four bits in groups of 32 lose so little that all the data is needed to see the difference.
        pytest.param(bits, size, marks=() if (bits, size) == (3, 1) else pytest.mark.slow)
        for bits in (4, 3)
        for size in SIZES
    ],
)
def test_gptq_and_autoround_are_below_rounding_to_nearest(bits: int, size: int) -> None:
    nearest, gptq, autoround = (loss(with_bits(by, bits, size)) for by in ("minmax", "gptq", "autoround"))
    assert gptq < nearest
    assert autoround < nearest


@pytest.mark.parametrize("size", [LARGE])
def test_awq_is_below_rounding_to_nearest_where_there_are_outliers(size: int) -> None:
    nearest, awq = (change(configured({by}, ALONE["int4 in groups of 32"]), size) for by in ("minmax", "awq"))
    assert awq < nearest


def test_refusals_of_planting() -> None:
    with pytest.raises(ValueError, match="size is 0; accepted: a positive number"):
        plant_outliers(torch.nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="Linear has no decoder layers like those of Llama"):
        plant_outliers(torch.nn.Linear(2, 2), 2)
