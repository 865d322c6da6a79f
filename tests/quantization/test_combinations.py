"""The table of combinations, against the two tables of the documentation written down a second time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from npu_fusion.quantization._combinations import TABLE, layers_of, markdown
from npu_fusion.quantization._options import OPTIONS
from npu_fusion.quantization.algorithms import ALGORITHMS
from npu_fusion.quantization.config import parse
from npu_fusion.quantization.scheme import INPUT_TYPES, WEIGHT_TYPES

FULL_ROWS = {"tensor", "channel"}
WEIGHTS_ALONE: dict[str, tuple[set[str], set[str]]] = {
    "hifloat8": (FULL_ROWS, {"minmax", "gptq", "ofmr", "cast", "quantile"}),
    "float8_e4m3fn": (FULL_ROWS, {"minmax", "gptq", "ofmr", "cast", "quantile"}),
    "mxfp4_e2m1": ({"group"}, {"minmax", "gptq", "awq", "autoround", "mxquant"}),
    "float4_e2m1": ({"group"}, {"minmax", "gptq", "awq", "autoround"}),
    "float4_e1m2": ({"group"}, {"minmax", "gptq", "awq", "autoround"}),
    "int8": ({*FULL_ROWS, "group"}, {"minmax", "gptq", "awq", "autoround"}),
    "int4": ({*FULL_ROWS, "group"}, {"minmax", "gptq", "awq", "autoround"}),
}
"""Type -> strategies, algorithms."""
BOTH: dict[tuple[str, str], tuple[set[str], set[str], set[str]]] = {
    ("hifloat8", "hifloat8"): ({"tensor", "token"}, FULL_ROWS, {"ofmr", "cast", "quantile", "smoothquant"}),
    ("float8_e4m3fn", "float8_e4m3fn"): ({"tensor", "token"}, FULL_ROWS, {"ofmr", "smoothquant"}),
    ("mxfp8_e4m3fn", "mxfp8_e4m3fn"): ({"group"}, {"group"}, {"mxquant"}),
    ("mxfp8_e4m3fn", "mxfp4_e2m1"): ({"group"}, {"group"}, {"mxquant"}),
    ("float8_e4m3fn", "float4_e2m1"): ({"tensor"}, {"group"}, {"minmax", "smoothquant"}),
    ("int8", "int8"): ({"tensor", "token"}, FULL_ROWS, {"minmax", "smoothquant"}),
}
"""Inputs, weights -> strategies of inputs, of weights, algorithms."""


def documented(weights: dict[str, Any], inputs: dict[str, Any] | None, algorithm: str) -> bool:
    if inputs is None:
        strategies, algorithms = WEIGHTS_ALONE.get(weights["type"], (set(), set()))
        symmetry = weights["symmetric"] or weights["type"] in ("int8", "int4")
        return weights["strategy"] in strategies and algorithm in algorithms and symmetry
    row = BOTH.get((inputs["type"], weights["type"]))
    if row is None or not weights["symmetric"]:
        return False
    if not inputs["symmetric"] and (inputs["type"], inputs["strategy"]) != ("int8", "tensor"):
        return False
    if algorithm == "cast" and inputs["strategy"] == "token":
        return False
    return inputs["strategy"] in row[0] and weights["strategy"] in row[1] and algorithm in row[2]


INPUTS: list[dict[str, Any] | None] = [None] + [
    {"type": kind, "symmetric": symmetric, "strategy": strategy}
    for kind, symmetric, strategy in itertools.product(
        INPUT_TYPES, (True, False), ("tensor", "token", "group")
    )
]


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
def test_exactly_the_documented_combinations_are_accepted(kind: str) -> None:
    accepted = 0
    for strategy, symmetric, inputs, algorithm in itertools.product(
        ("tensor", "channel", "group"), (True, False), INPUTS, OPTIONS
    ):
        weights: dict[str, Any] = {"type": kind, "symmetric": symmetric, "strategy": strategy}
        if strategy == "group":
            weights["group_size"] = 32
        quant_cfg = {"weights": weights, **({} if inputs is None else {"inputs": inputs})}
        scheme, message = None, ""
        try:
            scheme = parse({"quant_cfg": quant_cfg, "algorithm": algorithm}).scheme_for("layer")
        except ValueError as error:
            message = str(error)
        assert documented(weights, inputs, algorithm) is (message == ""), (
            weights,
            inputs,
            algorithm,
            message,
        )
        if message:
            assert message.startswith(("quantize: quant_cfg.", "quantize: algorithm is "))
            assert "accepted" in message
        else:
            assert scheme is not None
            accepted += 1
    assert accepted > 0


def test_no_two_rows_are_for_the_same_layer() -> None:
    keys = [(row.layer, row.inputs, row.weights, row.input_strategy) for row in TABLE]
    assert len(set(keys)) == len(keys)


def test_dtypes_are_the_documented_ones() -> None:
    sixteen, every = {torch.float16, torch.bfloat16}, {torch.float16, torch.bfloat16, torch.float32}
    expected = {
        (None, "int4"): every,
        (None, "int8"): sixteen,
        ("int8", "int8"): sixteen,
        ("hifloat8", "hifloat8"): every,
        ("float8_e4m3fn", "float8_e4m3fn"): every,
        ("mxfp8_e4m3fn", "mxfp8_e4m3fn"): {torch.bfloat16},
        ("mxfp8_e4m3fn", "mxfp4_e2m1"): {torch.bfloat16},
        ("float8_e4m3fn", "float4_e2m1"): {torch.bfloat16},
    }
    for row in TABLE:
        assert set(row.dtypes) == expected.get((row.inputs, row.weights), sixteen), row


def test_algorithms_of_table_options_and_registry_are_the_same() -> None:
    assert set(OPTIONS) == {name for row in TABLE for name in row.algorithms} == set(ALGORITHMS)


def test_convolutions_are_for_ofmr_only() -> None:
    assert layers_of("ofmr") == ("Linear", "Conv2d")
    assert {name for name in OPTIONS if "Conv2d" in layers_of(name)} == {"ofmr"}


def test_markdown_has_every_row_and_limit() -> None:
    lines = markdown().splitlines()
    assert len(lines) == 2 + len(TABLE)
    assert {line.count(" | ") for line in lines[2:]} == {lines[0].count(" | ")} == {8}
    (int4,) = [line for line in lines if "`int4`" in line]
    assert int4 == (
        "| `Linear` | not quantized |  | `int4` | tensor, channel, group | weights | `minmax`, `gptq`, "
        "`awq`, "
        "`autoround` | float16, bfloat16, float32 | K and N in multiples of 64; K and N up to 65535; "
        "group_size < K |"
    )
    (two_level,) = [line for line in lines if "| `float8_e4m3fn` | tensor | `float4_e2m1`" in line]
    assert two_level.endswith("| bfloat16 | K in multiples of 64; no bias; group_size < K |")
