from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from enum import Enum
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npu_fusion.quantization import config as config_module
from npu_fusion.quantization._combinations import TABLE
from npu_fusion.quantization.config import QuantizationConfig, parse
from npu_fusion.quantization.scheme import INPUT_TYPES, WEIGHT_TYPES, InputScheme, Scheme, WeightScheme
from npu_fusion.quantization.user_algorithms import USER_ALGORITHMS, UserAlgorithm


def config(
    weights: Any = None, inputs: Any = None, algorithm: Any = "minmax", overrides: Any = None, **more: Any
) -> dict[str, Any]:
    quant_cfg: dict[str, Any] = {"weights": {"type": "int8"} if weights is None else weights}
    if inputs is not None:
        quant_cfg["inputs"] = inputs
    return {"quant_cfg": {**quant_cfg, **(overrides or {})}, "algorithm": algorithm, **more}


def scheme(parsed: QuantizationConfig, name: str = "model.layer") -> Scheme:
    found = parsed.scheme_for(name)
    assert found is not None
    return found


def refused(value: Any, error: type[Exception], message: str) -> None:
    before = copy.deepcopy(value)
    with pytest.raises(error, match="^" + re.escape(message)):
        parse(value)
    assert value == before


# ---------------------------------------------------------------------------- what is accepted


def test_the_example_of_the_documentation() -> None:
    parsed = parse(
        {
            "batch_num": 1,
            "quant_cfg": {"weights": {"type": "int8", "symmetric": True, "strategy": "tensor"}},
            "algorithm": {"minmax"},
        }
    )
    assert parsed.batch_num == 1
    assert parsed.skip_layers == ()
    assert scheme(parsed) == Scheme(WeightScheme("int8", True, "tensor"), None, "minmax", {})


def test_the_example_of_the_module() -> None:
    text = config_module.__doc__ or ""
    example = text[text.index("{") : text.index("``weights``")]
    parsed = parse(eval(example))
    assert scheme(parsed, "layers.0.down_proj").weights == WeightScheme("int8", True, "tensor")
    assert scheme(parsed, "layers.0.o_proj").inputs is None
    assert scheme(parsed, "layers.0.q_proj").inputs == InputScheme("int8", True, "token")
    assert parsed.scheme_for("lm_head") is None


@pytest.mark.parametrize(
    "algorithm", ["gptq", {"gptq"}, frozenset({"gptq"}), ["gptq"], ("gptq",), {"gptq": None}]
)
def test_spellings_of_an_algorithm(algorithm: Any) -> None:
    found = scheme(parse(config(algorithm=algorithm)))
    assert found.algorithm == "gptq"
    assert found.options == {"percdamp": 0.01, "block_size": 128, "act_order": True}


@pytest.mark.parametrize(
    ("algorithm", "inputs", "options"),
    [
        ("awq", None, {"grids_num": 20}),
        ({"awq": {"grids_num": 7}}, None, {"grids_num": 7}),
        ("smoothquant", {"type": "int8"}, {"smooth_strength": 0.5}),
        ({"smoothquant": {"smooth_strength": 0.75}}, {"type": "int8"}, {"smooth_strength": 0.75}),
        ({"smoothquant": {"smooth_strength": Fraction(1, 4)}}, {"type": "int8"}, {"smooth_strength": 0.25}),
        ("autoround", None, {"steps": 200, "lr": None}),
        ({"autoround": {"steps": 5, "lr": 1}}, None, {"steps": 5, "lr": 1.0}),
        (
            {"gptq": {"act_order": False, "percdamp": 0.1}},
            None,
            {"act_order": False, "percdamp": 0.1, "block_size": 128},
        ),
    ],
)
def test_options_and_their_defaults(algorithm: Any, inputs: Any, options: dict[str, Any]) -> None:
    found = scheme(parse(config(inputs=inputs, algorithm=algorithm)))
    assert found.options == options
    assert [type(value) for value in found.options.values()] == [
        type(options[name]) for name in found.options
    ]


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    parsed = parse(
        config(
            {"type": "int8", "strategy": "group", "group_size": numpy.int64(64)},
            algorithm={"gptq": {"percdamp": numpy.float32(0.5)}},
            batch_num=numpy.int32(3),
        )
    )
    assert json.loads(json.dumps(parsed.to_dict()))["batch_num"] == 3
    assert scheme(parsed).weights.group_size == 64
    assert scheme(parsed).options["percdamp"] == 0.5


def test_strings_that_are_enums_become_strings() -> None:
    class Kind(str, Enum):
        INT4 = "int4"

    weights = scheme(parse(config({"type": Kind.INT4}))).weights
    assert type(weights.type) is str
    assert weights.type == "int4"


@pytest.mark.parametrize(
    ("weights", "inputs", "algorithm", "expected"),
    [
        ({"type": "int8"}, None, "minmax", (WeightScheme("int8", True, "channel"), None)),
        (
            {"type": "mxfp8_e4m3fn"},
            {"type": "mxfp8_e4m3fn"},
            None,
            (WeightScheme("mxfp8_e4m3fn", True, "group", 32), InputScheme("mxfp8_e4m3fn", True, "group")),
        ),
        (
            {"type": "float4_e2m1", "group_size": 64},
            {"type": "float8_e4m3fn"},
            "minmax",
            (WeightScheme("float4_e2m1", True, "group", 64), InputScheme("float8_e4m3fn", True, "tensor")),
        ),
        (
            {"type": "int8", "strategy": "tensor", "group_size": None},
            {"type": "int8", "strategy": "token", "dynamic": True, "enable_quant": True},
            "minmax",
            (WeightScheme("int8", True, "tensor"), InputScheme("int8", True, "token")),
        ),
        (
            {"type": "int8"},
            {"type": "int8", "symmetric": False, "dynamic": False},
            "minmax",
            (WeightScheme("int8"), InputScheme("int8", False, "tensor")),
        ),
        (
            {"type": "int4", "symmetric": False},
            {"type": "int8", "enable_quant": False},
            "awq",
            (WeightScheme("int4", False, "channel"), None),
        ),
        ({"type": "int8"}, {"enable_quant": False}, "minmax", (WeightScheme("int8"), None)),
    ],
)
def test_defaults_of_weights_and_inputs(weights: Any, inputs: Any, algorithm: Any, expected: Any) -> None:
    found = scheme(parse(config(weights, inputs, algorithm)))
    assert (found.weights, found.inputs) == expected


@pytest.mark.parametrize("algorithm", [None, {}, set(), [], "", ()])
def test_mx_types_need_no_algorithm(algorithm: Any) -> None:
    for weights, inputs in (
        ("mxfp8_e4m3fn", {"type": "mxfp8_e4m3fn"}),
        ("mxfp4_e2m1", {"type": "mxfp8_e4m3fn"}),
        ("mxfp4_e2m1", None),
    ):
        value = config({"type": weights}, inputs, algorithm)
        assert scheme(parse(value)).algorithm == "mxquant"
    del value["algorithm"]
    assert scheme(parse(value)).algorithm == "mxquant"


def test_none_is_the_preset_and_a_configuration_is_itself() -> None:
    parsed = parse()
    assert parsed == parse("INT8_MINMAX_WEIGHT_QUANT_CFG")
    assert scheme(parsed) == Scheme(WeightScheme("int8", True, "channel"), None, "minmax", {})
    assert parse(parsed) is parsed


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (3, TypeError, "quantize: config is 3; accepted: a dict, the name of a preset, or None"),
        ([("batch_num", 1)], TypeError, "quantize: config is [('batch_num', 1)]; accepted: a dict"),
        ({}, ValueError, "quantize: quant_cfg is missing; accepted: a dict with the key 'weights'"),
        ({1: 2}, TypeError, "quantize: config has the key 1; accepted: strings"),
        (
            config(skip_layer=["a"]),
            ValueError,
            "quantize: skip_layer is an unknown key; accepted: 'batch_num', 'quant_cfg', 'algorithm', "
            "'skip_layers' (did you mean 'skip_layers'?)",
        ),
        ({"quant_cfg": 1}, TypeError, "quantize: quant_cfg is 1; accepted: a dict"),
        ({"quant_cfg": None}, TypeError, "quantize: quant_cfg is None; accepted: a dict"),
        (
            {"quant_cfg": {}},
            ValueError,
            "quantize: quant_cfg.weights is missing, or has",
        ),
        (
            {"quant_cfg": {"inputs": {"type": "int8"}}, "algorithm": "minmax"},
            ValueError,
            "quantize: quant_cfg.weights is missing",
        ),
        (config("int8"), TypeError, "quantize: quant_cfg.weights is 'int8'; accepted: a dict"),
        (config({}), ValueError, "quantize: quant_cfg.weights.type is missing; accepted: 'hifloat8', "),
        (
            config({"type": "int3"}),
            ValueError,
            "quantize: quant_cfg.weights.type is 'int3'; accepted: 'hifloat8', 'float8_e4m3fn', "
            "'mxfp8_e4m3fn', 'mxfp4_e2m1', 'float4_e2m1', 'float4_e1m2', 'int8', 'int4' (did you mean "
            "'int8'?)",
        ),
        (config({"type": 8}), TypeError, "quantize: quant_cfg.weights.type is 8; accepted: 'hifloat8'"),
        (
            config({"type": "int8", "symmetric": 1}),
            TypeError,
            "quantize: quant_cfg.weights.symmetric is 1; accepted: True, False",
        ),
        (
            config({"type": "hifloat8", "symmetric": False}),
            ValueError,
            "quantize: quant_cfg.weights.symmetric is False for 'hifloat8'; accepted: True (False only for "
            "'int8', 'int4')",
        ),
        (
            config({"type": "int8", "strategy": "per_channel"}),
            ValueError,
            "quantize: quant_cfg.weights.strategy is 'per_channel'; accepted: 'tensor', 'channel', 'group' "
            "(did you mean 'channel'?)",
        ),
        (
            config({"type": "mxfp4_e2m1", "strategy": "channel"}),
            ValueError,
            "quantize: quant_cfg.weights.strategy is 'channel' for 'mxfp4_e2m1'; accepted: 'group'",
        ),
        (
            config({"type": "int4", "strategy": "group"}),
            ValueError,
            "quantize: quant_cfg.weights.group_size is missing with strategy 'group'; accepted: a "
            "multiple of 32",
        ),
        (
            config({"type": "int4", "group_size": 64}),
            ValueError,
            "quantize: quant_cfg.weights.group_size is 64 with strategy 'channel'; accepted: only with "
            "strategy 'group'",
        ),
        (
            config({"type": "int4", "strategy": "group", "group_size": 48}),
            ValueError,
            "quantize: quant_cfg.weights.group_size is 48; accepted: an integer from 32 to 4294967295 in "
            "multiples of 32",
        ),
        (
            config({"type": "int4", "strategy": "group", "group_size": 0}),
            ValueError,
            "quantize: quant_cfg.weights.group_size is 0; ",
        ),
        (
            config({"type": "int4", "strategy": "group", "group_size": 64.0}),
            TypeError,
            "quantize: quant_cfg.weights.group_size is 64.0; ",
        ),
        (
            config({"type": "mxfp4_e2m1", "group_size": 64}),
            ValueError,
            "quantize: quant_cfg.weights.group_size is 64 for 'mxfp4_e2m1'; accepted: 32",
        ),
        (
            config(inputs={"type": "int4"}),
            ValueError,
            "quantize: quant_cfg.inputs.type is 'int4'; accepted: 'hifloat8', 'float8_e4m3fn', "
            "'mxfp8_e4m3fn', "
            "'int8' (did you mean 'int8'?)",
        ),
        (config(inputs={"strategy": "token"}), ValueError, "quantize: quant_cfg.inputs.type is missing"),
        (
            config(inputs={"type": "int8", "strategy": "channel"}),
            ValueError,
            "quantize: quant_cfg.inputs.strategy is 'channel'; accepted: 'tensor', 'token', 'group'",
        ),
        (
            config(inputs={"type": "int8", "strategy": "group"}),
            ValueError,
            "quantize: quant_cfg.inputs.strategy is 'group' for 'int8'; accepted: 'tensor', 'token'",
        ),
        (
            config({"type": "mxfp8_e4m3fn"}, {"type": "mxfp8_e4m3fn", "strategy": "token"}, None),
            ValueError,
            "quantize: quant_cfg.inputs.strategy is 'token' for 'mxfp8_e4m3fn'; accepted: 'group'",
        ),
        (
            config(inputs={"type": "int8", "strategy": "token", "symmetric": False}),
            ValueError,
            "quantize: quant_cfg.inputs.symmetric is False with strategy 'token'; accepted: True",
        ),
        (
            config({"type": "hifloat8"}, {"type": "hifloat8", "symmetric": False}, "ofmr"),
            ValueError,
            "quantize: quant_cfg.inputs.symmetric is False for 'hifloat8'; accepted: True (False only "
            "for 'int8')",
        ),
        (
            config(inputs={"type": "int8", "dynamic": True}),
            ValueError,
            "quantize: quant_cfg.inputs.dynamic is True with strategy 'tensor'; accepted: True with strategy "
            "'token', False with strategy 'tensor'",
        ),
        (
            config(inputs={"type": "int8", "strategy": "token", "dynamic": False}),
            ValueError,
            "quantize: quant_cfg.inputs.dynamic is False with strategy 'token'",
        ),
        (
            config({"type": "mxfp8_e4m3fn"}, {"type": "mxfp8_e4m3fn", "dynamic": True}, None),
            ValueError,
            "quantize: quant_cfg.inputs.dynamic is True with strategy 'group'",
        ),
        (
            config(inputs={"enable_quant": False, "strategy": "all"}),
            ValueError,
            "quantize: quant_cfg.inputs.strategy is 'all'",
        ),
        (
            config({"type": "int8", "symmetric": False}, {"type": "int8"}),
            ValueError,
            "quantize: quant_cfg.weights.symmetric is False for 'int8' with quant_cfg.inputs 'int8' per "
            "tensor; "
            "accepted: True",
        ),
        (
            config({"type": "int4"}, {"type": "int8"}),
            ValueError,
            "quantize: quant_cfg.weights.type is 'int4' with quant_cfg.inputs.type 'int8'; accepted with "
            "these "
            "inputs: weights 'int8'; with these weights: inputs none",
        ),
        (
            config({"type": "mxfp8_e4m3fn"}, None, "mxquant"),
            ValueError,
            "quantize: quant_cfg.weights.type is 'mxfp8_e4m3fn' with no quantized quant_cfg.inputs; "
            "accepted with "
            "these inputs: weights 'hifloat8', 'float8_e4m3fn', 'mxfp4_e2m1', 'float4_e2m1', 'float4_e1m2', "
            "'int8', 'int4'; with these weights: inputs 'mxfp8_e4m3fn'",
        ),
        (
            config({"type": "int8", "enable_quant": False}),
            ValueError,
            "quantize: quant_cfg.weights is missing, or has enable_quant False; accepted: a dict with 'type'",
        ),
        (
            config({"type": "int8", "strategy": "group", "group_size": 32}, {"type": "int8"}),
            ValueError,
            "quantize: quant_cfg.weights.strategy is 'group' for 'int8' with quant_cfg.inputs 'int8' per "
            "tensor; "
            "accepted: 'tensor', 'channel'",
        ),
        (
            config({"type": "float4_e2m1", "group_size": 32}, {"type": "float8_e4m3fn", "strategy": "token"}),
            ValueError,
            "quantize: quant_cfg.inputs.strategy is 'token' for 'float8_e4m3fn' with weights 'float4_e2m1'; "
            "accepted: 'tensor'",
        ),
        (
            config(algorithm=None),
            ValueError,
            "quantize: algorithm is empty, and quant_cfg.weights.type is 'int8'; accepted: 'minmax', 'gptq', "
            "'awq', 'autoround' (only mx types need no algorithm)",
        ),
        (
            config(algorithm=7),
            TypeError,
            "quantize: algorithm is 7; accepted: a name, a set or list of one name",
        ),
        (config(algorithm=[7]), TypeError, "quantize: algorithm is [7]; accepted: a name"),
        (config(algorithm={7: {}}), TypeError, "quantize: algorithm has the key 7; accepted: strings"),
        (
            config(algorithm="smooth_quant"),
            ValueError,
            "quantize: algorithm is 'smooth_quant'; accepted: 'minmax', 'smoothquant', 'awq', 'gptq', "
            "'ofmr', "
            "'mxquant', 'autoround', 'cast', 'quantile', or a name registered by algorithm_register (did you "
            "mean 'smoothquant'?)",
        ),
        (
            config(algorithm={"minmax", "awq"}),
            ValueError,
            "quantize: algorithm has 'awq' and 'minmax', both for Linear; accepted: one for each class "
            "of layers",
        ),
        (config(algorithm=["awq", "awq"]), ValueError, "quantize: algorithm has 'awq' and 'awq', both for"),
        (
            config(algorithm={"awq": {"grid_num": 20}}),
            ValueError,
            "quantize: algorithm.awq.grid_num is an unknown key; accepted: 'grids_num' (did you mean "
            "'grids_num'?)",
        ),
        (config(algorithm={"awq": 20}), TypeError, "quantize: algorithm.awq is 20; accepted: a dict"),
        (
            config(algorithm={"awq": {"grids_num": 0}}),
            ValueError,
            "quantize: algorithm.awq.grids_num is 0; accepted: an integer from 1",
        ),
        (
            config(algorithm={"awq": {"grids_num": True}}),
            TypeError,
            "quantize: algorithm.awq.grids_num is True; accepted: an integer",
        ),
        (
            config(algorithm={"minmax": {"strength": 1}}),
            ValueError,
            "quantize: algorithm.minmax.strength is an unknown key",
        ),
        (
            config(algorithm={"gptq": {"act_order": 1}}),
            TypeError,
            "quantize: algorithm.gptq.act_order is 1; accepted: True, False",
        ),
        (
            config(algorithm={"gptq": {"percdamp": 0.0}}),
            ValueError,
            "quantize: algorithm.gptq.percdamp is 0.0; accepted: a number greater than 0 and at most 1",
        ),
        (
            config(algorithm={"autoround": {"lr": "1"}}),
            TypeError,
            "quantize: algorithm.autoround.lr is '1'; accepted: a number greater than 0 and at most 1, "
            "or None",
        ),
        (
            config(algorithm="gptq", inputs={"type": "int8"}),
            ValueError,
            "quantize: algorithm is 'gptq' for quant_cfg.weights 'int8' with quant_cfg.inputs 'int8' per "
            "tensor; "
            "accepted: 'minmax', 'smoothquant'",
        ),
        (
            config(batch_num=0),
            ValueError,
            "quantize: batch_num is 0; accepted: an integer from 1 to 4294967295",
        ),
        (config(batch_num=2**32), ValueError, "quantize: batch_num is 4294967296; "),
        (config(batch_num=True), TypeError, "quantize: batch_num is True; accepted: an integer from 1"),
        (config(batch_num=1.0), TypeError, "quantize: batch_num is 1.0; "),
        (config(batch_num=None), TypeError, "quantize: batch_num is None; "),
        (config(batch_num=10**9999), ValueError, "quantize: batch_num is <integer of 33216 bits>; "),
        (config(skip_layers=1), TypeError, "quantize: skip_layers is 1; accepted: a string, or a set, list"),
        (config(skip_layers=["a", 1]), TypeError, "quantize: skip_layers is ['a', 1]; "),
        (config(skip_layers=""), ValueError, "quantize: skip_layers is ''; "),
        (config(skip_layers=["a", ""]), ValueError, "quantize: skip_layers is ['a', '']; "),
        (
            config(overrides={"kvcache": {"type": "hifloat8"}}),
            ValueError,
            "quantize: quant_cfg.kvcache asks for a quantized KV cache, which is not available; ",
        ),
        (
            config(overrides={"*self_attn.kvcache": {}}),
            ValueError,
            "quantize: quant_cfg['*self_attn.kvcache'] asks for a quantized KV cache, which is not "
            "available; ",
        ),
        (
            config(overrides={"*q_proj.weight": {}}),
            ValueError,
            "quantize: quant_cfg['*q_proj.weight'] is an unknown key; accepted: 'weights', 'inputs', and "
            "for some "
            "layers '<pattern>.weights', '<pattern>.inputs' (did you mean 'weights'?)",
        ),
        (
            config(overrides={".weights": {}}),
            ValueError,
            "quantize: quant_cfg['.weights'] is an unknown key; ",
        ),
        (
            config(overrides={"activations": {}}),
            ValueError,
            "quantize: quant_cfg.activations is an unknown key; ",
        ),
        (
            config(overrides={"*.weights": None}),
            TypeError,
            "quantize: quant_cfg['*.weights'] is None; accepted: ",
        ),
        (
            config(overrides={"*up.weights": {"strategy": "group"}}),
            ValueError,
            "quantize: quant_cfg['*up.weights'].group_size is missing with strategy 'group'; accepted: a "
            "multiple "
            "of 32 that is less than the inputs of a layer (the rest is from quant_cfg.weights)",
        ),
        (
            config(overrides={"*up.weights": {"typ": "int4"}}),
            ValueError,
            "quantize: quant_cfg['*up.weights'].typ is an unknown key; ",
        ),
        (
            config(inputs={"type": "int8"}, overrides={"*up.weights": {"type": "int4"}}),
            ValueError,
            "quantize: quant_cfg['*up.weights'].type is 'int4' with quant_cfg.inputs.type 'int8'; ",
        ),
        (
            config(
                inputs={"type": "int8"},
                algorithm="smoothquant",
                overrides={"*up.inputs": {"enable_quant": False}},
            ),
            ValueError,
            "quantize: algorithm is 'smoothquant' for quant_cfg.weights 'int8' without quantized "
            "quant_cfg['*up.inputs']; accepted: ",
        ),
        (
            config(
                {"type": "mxfp4_e2m1"},
                None,
                None,
                overrides={"*up.weights": {"type": "int8", "strategy": "tensor"}},
            ),
            ValueError,
            "quantize: algorithm is empty, and quant_cfg['*up.weights'].type is 'int8'; ",
        ),
    ],
)
def test_refusals(value: Any, error: type[Exception], message: str) -> None:
    refused(value, error, message)


@pytest.mark.parametrize(
    "strength", [0, 1, 0.0, 1.0, -0.5, 2, float("nan"), float("inf"), 10**400, Fraction(1, 10**400)]
)
def test_smooth_strength_is_between_0_and_1(strength: Any) -> None:
    refused(
        config(inputs={"type": "int8"}, algorithm={"smoothquant": {"smooth_strength": strength}}),
        ValueError,
        "quantize: algorithm.smoothquant.smooth_strength is ",
    )
    with pytest.raises(ValueError, match="accepted: a number greater than 0 and less than 1$"):
        parse(config(inputs={"type": "int8"}, algorithm={"smoothquant": {"smooth_strength": strength}}))


def test_true_is_no_number() -> None:
    value = {"smoothquant": {"smooth_strength": True}}
    refused(
        config(inputs={"type": "int8"}, algorithm=value),
        TypeError,
        "quantize: algorithm.smoothquant.smooth_strength is True; accepted: a number",
    )
    refused(
        config(algorithm={"autoround": {"lr": True}}), TypeError, "quantize: algorithm.autoround.lr is True; "
    )


def test_long_values_are_shortened() -> None:
    with pytest.raises(ValueError) as caught:
        parse(config({"type": "x" * 10_000}))
    assert len(str(caught.value)) < 400


# ---------------------------------------------------------------------------- skip_layers


@pytest.mark.parametrize(
    ("skip_layers", "name", "skipped"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "lm", False),
        ("0", "layers.1.q_proj", False),
        ({"1"}, "layers.1.q_proj", True),
        ({"1"}, "layers.10.q_proj", True),
        (["layers.1."], "layers.10.q_proj", False),
        (("*layers.1.*",), "model.layers.1.q_proj", True),
        (("*layers.1.*",), "model.layers.10.q_proj", False),
        ("q_proj", "layers.0.q_proj", True),
        ("*q_proj", "layers.0.q_proj.lora", False),
        ("layers.[02].fc", "layers.2.fc", True),
        ("layers.?.fc", "layers.12.fc", False),
        ("LM_HEAD", "lm_head", False),
        (None, "lm_head", False),
    ],
)
def test_skip_layers(skip_layers: Any, name: str, skipped: bool) -> None:
    parsed = parse(config(skip_layers=skip_layers))
    assert parsed.excludes(name) is skipped
    assert (parsed.scheme_for(name) is None) is skipped


def test_the_order_of_skip_layers_has_no_meaning() -> None:
    assert parse(config(skip_layers=["b", "a", "b"])) == parse(config(skip_layers={"a", "b"}))


# ---------------------------------------------------------------------------- overrides


def test_an_override_takes_what_it_leaves_out_from_the_global_value() -> None:
    parsed = parse(
        config(
            {"type": "int4", "symmetric": False, "strategy": "group", "group_size": 64},
            overrides={
                "*a.weights": {"group_size": 128},
                "*b.weights": {"strategy": "channel"},
                "*c.weights": {"type": "int8"},
                "*d.weights": {"type": "mxfp4_e2m1", "symmetric": True},
                "*e.weights": {},
            },
        )
    )
    assert {name: scheme(parsed, name).weights for name in "abcdef"} == {
        "a": WeightScheme("int4", False, "group", 128),
        "b": WeightScheme("int4", False, "channel"),
        "c": WeightScheme("int8", False, "group", 64),
        "d": WeightScheme("mxfp4_e2m1", True, "group", 32),
        "e": WeightScheme("int4", False, "group", 64),
        "f": WeightScheme("int4", False, "group", 64),
    }


def test_inputs_of_an_override() -> None:
    parsed = parse(
        config(
            inputs={"type": "int8", "strategy": "token", "dynamic": True, "enable_quant": False},
            overrides={
                "*a.inputs": {},
                "*b.inputs": {"strategy": "tensor", "symmetric": False},
                "*c.inputs": {"enable_quant": False},
                "layers.0.d.inputs": {"type": "int8"},
            },
        )
    )
    assert {name: scheme(parsed, f"layers.0.{name}").inputs for name in "abcde"} == {
        "a": InputScheme("int8", True, "token"),
        "b": InputScheme("int8", False, "tensor"),
        "c": None,
        "d": InputScheme("int8", True, "token"),
        "e": None,
    }


def test_the_last_key_that_matches_counts_alone() -> None:
    first, second = {"strategy": "tensor"}, {"type": "int4"}
    parsed = parse(config(overrides={"*proj.weights": first, "*q_proj.weights": second}))
    assert scheme(parsed, "q_proj").weights == WeightScheme("int4", True, "channel")
    assert scheme(parsed, "k_proj").weights == WeightScheme("int8", True, "tensor")
    parsed = parse(config(overrides={"*q_proj.weights": second, "*proj.weights": first}))
    assert scheme(parsed, "q_proj").weights == WeightScheme("int8", True, "tensor")


def test_overrides_alone_quantize_only_what_they_match() -> None:
    parsed = parse({"quant_cfg": {"*.mlp.*.weights": {"type": "int8"}}, "algorithm": "minmax"})
    assert scheme(parsed, "0.mlp.up").weights == WeightScheme("int8")
    assert parsed.scheme_for("0.attn.q") is None
    assert parsed.excludes("0.attn.q")


def test_weights_can_be_switched_off_for_some_layers() -> None:
    parsed = parse(config(inputs={"type": "int8"}, overrides={"*head.weights": {"enable_quant": False}}))
    assert parsed.scheme_for("lm_head") is None
    assert scheme(parsed, "fc").inputs == InputScheme("int8")


def test_overrides_that_meet_in_a_layer_are_checked_there() -> None:
    parsed = parse(
        config(
            inputs={"type": "int8"},
            overrides={"*down*.weights": {"type": "int4"}, "*proj.inputs": {"enable_quant": False}},
        )
    )
    assert scheme(parsed, "down_proj") == Scheme(WeightScheme("int4"), None, "minmax", {})
    message = (
        "quantize: quant_cfg['*down*.weights'].type is 'int4' with quant_cfg.inputs.type 'int8'; "
        "accepted with "
        "these inputs: weights 'int8'; with these weights: inputs none (layer 'down')"
    )
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        parsed.scheme_for("down")


# ---------------------------------------------------------------------------- algorithms of the user

MINE: Mapping[str, tuple[str, ...]] = {"mine": ("Conv2d", "Attention"), "other": ("Linear",)}


def test_a_users_algorithm_beside_a_built_in_one() -> None:
    parsed = parse(config(algorithm={"minmax": None, "mine": {"levels": [1, 2.5, None, "x"]}}), MINE)
    assert scheme(parsed).algorithm == "minmax"
    for layer_class in ("Conv2d", "Attention"):
        found = parsed.scheme_for("x", layer_class)
        assert found is not None
        assert (found.algorithm, found.options) == ("mine", {"levels": (1, 2.5, None, "x")})
        assert isinstance(hash(found), int)
    assert parsed.scheme_for("x", "Embedding") is None
    assert parsed.to_dict()["algorithm"] == {"mine": {"levels": [1, 2.5, None, "x"]}, "minmax": {}}
    assert parse(json.loads(json.dumps(parsed.to_dict())), MINE) == parsed


def test_the_order_of_registration_has_no_meaning() -> None:
    assert parse(config(algorithm="mine"), {"mine": ("Attention", "Conv2d")}) == parse(
        config(algorithm="mine"), MINE
    )


def test_a_users_algorithm_takes_any_combination() -> None:
    parsed = parse(config({"type": "int4"}, {"type": "int8"}, {"other"}), MINE)
    assert scheme(parsed) == Scheme(WeightScheme("int4"), InputScheme("int8"), "other", {})
    assert parsed.for_layer("fc") == {
        "batch_num": 1,
        "weights_cfg": {"quant_type": "int4", "symmetric": True, "strategy": "channel"},
        "inputs_cfg": {"quant_type": "int8", "symmetric": True, "strategy": "tensor", "dynamic": None},
        "kvcache_cfg": {"enable_quant": False},
        "algorithm": {"other": {}},
    }


def test_what_a_quant_op_is_given() -> None:
    parsed = parse(
        config({"type": "int8", "strategy": "group", "group_size": 32}, None, {"other": {"a": 1}}), MINE
    )
    given = parsed.for_layer("fc")
    assert given["weights_cfg"]["group_size"] == 32
    assert given["inputs_cfg"] == {"enable_quant": False}
    assert given["algorithm"] == {"other": {"a": 1}}
    token = parse(config(inputs={"type": "int8", "strategy": "token"}, algorithm="other"), MINE)
    assert token.for_layer("fc")["inputs_cfg"]["dynamic"] is True
    with pytest.raises(ValueError, match="layer 'fc' of class Conv2d is left in float by the configuration"):
        parsed.for_layer("fc", "Conv2d")


@pytest.mark.parametrize(
    ("algorithm", "error", "message"),
    [
        ({"ofmr", "mine"}, ValueError, "quantize: algorithm has 'mine' and 'ofmr', both for Conv2d; "),
        ({"minmax", "other"}, ValueError, "quantize: algorithm has 'minmax' and 'other', both for Linear; "),
        ({"mine": {"a": {}}}, TypeError, "quantize: algorithm.mine.a is {}; accepted: None, a bool, an int"),
        ({"mine": {"a": [[1]]}}, TypeError, "quantize: algorithm.mine.a is [1]; "),
        ({"mine": {"a": float("nan")}}, ValueError, "quantize: algorithm.mine.a is nan; "),
        ({"mine": 3}, TypeError, "quantize: algorithm.mine is 3; accepted: a dict"),
        ({"miner"}, ValueError, "quantize: algorithm is 'miner'; accepted: 'minmax'"),
    ],
)
def test_refused_algorithms_of_the_user(algorithm: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        parse(config(algorithm=algorithm), MINE)


def test_registered_algorithms_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    entry = UserAlgorithm(torch.nn.Identity, torch.nn.Identity)
    monkeypatch.setitem(USER_ALGORITHMS, "registered", {"Linear": entry})
    assert scheme(parse(config(algorithm="registered"))).algorithm == "registered"


# ---------------------------------------------------------------------------- frozen, and stored


def test_a_scheme_is_the_callers_own() -> None:
    parsed = parse(config(algorithm="awq"))
    options = scheme(parsed).options
    assert isinstance(options, dict)
    options["grids_num"] = 3
    assert scheme(parsed).options == {"grids_num": 20}
    assert isinstance(hash(parsed), int)
    assert copy.deepcopy(scheme(parsed)) == scheme(parsed)
    with pytest.raises(AttributeError):
        parsed.batch_num = 2  # type: ignore[misc]


def test_to_dict_has_every_default() -> None:
    parsed = parse(
        config(
            inputs={"type": "int8", "strategy": "token"},
            overrides={"*b.weights": {"strategy": "tensor"}, "*a.inputs": {"enable_quant": False}},
            skip_layers="x",
        )
    )
    stored = parsed.to_dict()
    assert stored == {
        "batch_num": 1,
        "quant_cfg": {
            "weights": {"type": "int8", "symmetric": True, "strategy": "channel"},
            "inputs": {"type": "int8", "symmetric": True, "strategy": "token"},
            "*b.weights": {"type": "int8", "symmetric": True, "strategy": "tensor"},
            "*a.inputs": {"enable_quant": False},
        },
        "algorithm": {"minmax": {}},
        "skip_layers": ["x"],
    }
    assert list(stored["quant_cfg"])[2:] == ["*b.weights", "*a.inputs"]


def test_cache_keys_differ_with_content_and_not_with_the_process() -> None:
    values = [
        config(),
        config(batch_num=2),
        config({"type": "int4"}),
        config(algorithm="awq"),
        config(skip_layers={"a", "b"}),
        config(overrides={"*a.weights": {}, "*b.weights": {}}),
        config(overrides={"*b.weights": {}, "*a.weights": {}}),
    ]
    keys = [parse(value).cache_key() for value in values]
    assert len(set(keys)) == len(keys)
    assert keys[4] == "bf86abd67bb252114a387b618ac0f334ae8d9256ff75a1be0d9a43bafa2e0f5d"


# ---------------------------------------------------------------------------- any input

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([*WEIGHT_TYPES, "tensor", "channel", "token", "group", 32, 64, 0.5, 10**400, "fp8"]),
    st.lists(st.none() | st.text(max_size=3) | st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3) | st.integers(), st.none() | st.integers() | st.text(), max_size=2),
)
NAMES = ("minmax", "smoothquant", "awq", "gptq", "ofmr", "mxquant", "autoround", "cast", "quantile", "mine")
STRATEGIES = st.sampled_from(["tensor", "channel", "token", "group"])
WEIGHTS: dict[str, st.SearchStrategy[Any]] = {
    "type": st.sampled_from(WEIGHT_TYPES),
    "symmetric": st.booleans(),
    "strategy": STRATEGIES,
    "group_size": st.sampled_from([32, 64, 33, None]),
    "enable_quant": st.booleans(),
}
INPUTS: dict[str, st.SearchStrategy[Any]] = {
    "type": st.sampled_from(INPUT_TYPES),
    "symmetric": st.booleans(),
    "strategy": STRATEGIES,
    "dynamic": st.booleans(),
    "enable_quant": st.booleans(),
}
OPTIONS_OF: dict[str, st.SearchStrategy[Any]] = {
    "smooth_strength": st.floats(0, 1),
    "grids_num": st.integers(0, 3),
    "steps": st.integers(0, 3),
    "lr": st.none() | st.floats(0, 1),
    "percdamp": st.floats(0, 1),
    "act_order": st.booleans(),
}


def wild(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of these keys, whose values need not go together."""
    return st.fixed_dictionaries({}, optional=fields)


quant_cfgs = st.fixed_dictionaries(
    {"weights": wild(WEIGHTS)},
    optional={
        "inputs": wild(INPUTS),
        "*a.weights": wild(WEIGHTS),
        "[ab].weights": wild(WEIGHTS),
        "*b.inputs": wild(INPUTS),
        "*.inputs": wild(INPUTS),
    },
)
algorithms = st.one_of(
    st.sampled_from(NAMES),
    st.dictionaries(st.sampled_from(NAMES), st.none() | wild(OPTIONS_OF), max_size=2),
    st.sets(st.sampled_from(NAMES), max_size=2),
)
patterns = st.text(min_size=1, max_size=4)
configurations = st.fixed_dictionaries(
    {"quant_cfg": quant_cfgs, "algorithm": algorithms},
    optional={
        "skip_layers": st.one_of(patterns, st.lists(patterns, max_size=2), st.sets(patterns, max_size=2)),
        "batch_num": st.integers(1, 5),
    },
)
PATH = re.compile(r"quantize: ((config|batch_num|quant_cfg|algorithm|skip_layers)\b|\w+ is an unknown key;)")


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict):
        return [path]
    return [path] + [leaf for key in value for leaf in leaves(value[key], (*path, key))]


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """A configuration in which one value, or the name of one key, is anything."""
    value = draw(configurations)
    paths = leaves(value)
    path = draw(st.sampled_from(paths))
    if not path:
        return draw(junk)
    place = value
    for key in path[:-1]:
        place = place[key]
    if draw(st.booleans()):
        place[path[-1]] = draw(junk)
    else:
        place[draw(st.text(max_size=3) | st.integers())] = place.pop(path[-1])
    return value


@st.composite
def documented(draw: st.DrawFn) -> Any:
    """A configuration that has to be accepted: all of it is of one row of the table."""
    row = draw(st.sampled_from([row for row in TABLE if row.layer == "Linear"]))
    algorithm = draw(st.sampled_from(row.algorithms))

    def weights(part: tuple[str, ...]) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "type": row.weights,
            "strategy": draw(st.sampled_from(row.weight_strategies)),
        }
        if fields["strategy"] == "group":
            sizes = [32] if row.weights.startswith("mx") else [32, 96, 4096]
            fields["group_size"] = draw(st.sampled_from(sizes))
        if row.asymmetric == "weights":
            fields["symmetric"] = draw(st.booleans())
        return {key: value for key, value in fields.items() if key in part or key == "group_size"}

    def inputs() -> dict[str, Any]:
        fields: dict[str, Any] = {"type": row.inputs, "strategy": row.input_strategy}
        if row.asymmetric == "inputs":
            fields["symmetric"] = draw(st.booleans())
        if row.input_strategy != "group" and draw(st.booleans()):
            fields["dynamic"] = row.input_strategy == "token"
        return fields

    every = ("type", "strategy", "symmetric")
    quant_cfg: dict[str, Any] = {"weights": weights(every)}
    if row.inputs is not None:
        quant_cfg["inputs"] = inputs()
    for pattern in draw(st.lists(st.sampled_from(["*a", "b", "[ab]", "*", "x?"]), max_size=3)):
        kind = draw(st.sampled_from(["part", "whole", "off", "inputs"]))
        if kind == "part":
            quant_cfg[f"{pattern}.weights"] = weights(("strategy", "symmetric"))
        elif kind == "whole":
            quant_cfg[f"{pattern}.weights"] = weights(every)
        elif kind == "off":
            quant_cfg[f"{pattern}.weights"] = {"enable_quant": False}
        elif row.inputs is not None:
            quant_cfg[f"{pattern}.inputs"] = inputs()
    value: dict[str, Any] = {
        "quant_cfg": quant_cfg,
        "algorithm": draw(st.sampled_from([algorithm, {algorithm}])),
    }
    if draw(st.booleans()):
        value["skip_layers"] = draw(st.sets(patterns))
    return value


def check_round_trip(parsed: QuantizationConfig) -> None:
    stored = parsed.to_dict()
    again = parse(stored, MINE)
    assert again == parsed
    assert again == parse(json.loads(json.dumps(stored)), MINE)
    assert hash(again) == hash(parsed)
    assert again.cache_key() == parsed.cache_key()
    for name in ("a", "b", "xa", "c"):
        found, message = None, ""
        try:
            found = parsed.scheme_for(name)
        except ValueError as error:
            message = str(error)
        if message:
            assert f"(layer {name!r})" in message
        else:
            assert again.scheme_for(name) == found
            assert (found is None) == (parsed.excludes(name) or parsed.algorithm_for("Linear") is None)


@settings(max_examples=300, deadline=None)
@given(documented())
def test_what_is_documented_is_accepted_and_stored(value: Any) -> None:
    check_round_trip(parse(value, MINE))


@settings(max_examples=300, deadline=None)
@given(configurations | damaged())
def test_any_value_is_parsed_or_refused_by_its_key(value: Any) -> None:
    parsed, message = None, ""
    try:
        parsed = parse(value, MINE)
    except (ValueError, TypeError) as error:
        message = str(error)
    if parsed is None:
        assert PATH.match(message), message
        assert "accepted" in message
    else:
        check_round_trip(parsed)


VALID = [
    config(
        {"type": "int4", "symmetric": False, "strategy": "group", "group_size": 64},
        None,
        {"awq": {"grids_num": 5}},
        {"*a.weights": {"strategy": "channel"}},
        batch_num=2,
        skip_layers=["x"],
    ),
    config(
        {"type": "int8", "symmetric": True, "strategy": "tensor"},
        {"type": "int8", "symmetric": True, "strategy": "token", "dynamic": True},
        {"smoothquant": {"smooth_strength": 0.5}},
        {"*b.inputs": {"strategy": "tensor", "symmetric": False}},
    ),
    config({"type": "mxfp8_e4m3fn"}, {"type": "mxfp8_e4m3fn"}, None),
]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_one_wrong_value_is_named(data: st.DataObject) -> None:
    value = copy.deepcopy(data.draw(st.sampled_from(VALID)))
    path = data.draw(st.sampled_from(leaves(value)[1:]))
    place = value
    for key in path[:-1]:
        place = place[key]
    # Of a type that is right nowhere, so that nothing but this value can be at fault.
    place[path[-1]] = data.draw(st.sampled_from([object(), b"int8", 1j, range(3)]))
    shown = "".join(f".{key}" if key.isidentifier() else f"[{key!r}]" for key in path).lstrip(".")
    with pytest.raises(TypeError, match=f"^quantize: {re.escape(shown)} is .*; accepted: "):
        parse(value)


@pytest.mark.parametrize("value", VALID)
def test_the_values_of_that_test_are_valid(value: Any) -> None:
    check_round_trip(parse(value))
